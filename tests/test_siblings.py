"""The scripts stay alike: same parts under the same titles in the same order, same flags, nothing done at import."""

import ast
import importlib
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from data.formats import UserError
from loop import COMMON
from model import Config, Transformer, save

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = ("sft.py", "reward.py", "dpo.py", "ppo.py", "grpo.py", "lora.py", "distill.py", "vlm.py")
TRANSFORMERS = ("quantize.py", "prune.py", "merge.py", "edit.py")
OUTER = ["# 1. The objective", "# 2. Data", "# 3. Config"]
INNER = {
    **dict.fromkeys(TRAINERS, ["# 4. Setup", "# 5. Train", "# 6. Evaluate"]),
    **dict.fromkeys(TRANSFORMERS, ["# 4. Calibrate", "# 5. Apply", "# 6. Evaluate"]),
}
EVERYWHERE = {"--model", "--data", "--out", "--seed", "--device"}
IN_TRAINERS = EVERYWHERE | {
    "--steps", "--batch-size", "--micro-batch-size", "--lr", "--grad-clip", "--dtype", "--compile", "--log-every",
    "--eval-every", "--save-every", "--resume",
}  # fmt: skip

# sft.py in any case, so that the list is never empty
pytestmark = pytest.mark.parametrize("script", [s for s in INNER if s == "sft.py" or (ROOT / s).exists()])


@cache
def tree(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def function(script: str, name: str) -> ast.FunctionDef:
    (found,) = [node for node in tree(script).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """Calls of `name(...)` and `something.name(...)` anywhere in `node`."""
    found = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    return [call for call in found if getattr(call.func, "id", getattr(call.func, "attr", None)) == name]


def test_sections_have_the_same_titles_in_the_same_order(script):
    lines = (ROOT / script).read_text().splitlines()
    main = function(script, "main")
    titles = [(n, line) for n, line in enumerate(lines, start=1) if re.match(r" *# \d+\. ", line)]
    assert [line.strip() for _, line in titles] == OUTER + INNER[script]
    for n, line in titles:
        inside = main.lineno < n <= main.end_lineno
        assert inside == (line.strip() in INNER[script]), f"line {n}: which titles are in main"
        assert line.startswith("    #" if inside else "#"), f"line {n}: indentation"


def test_functions_stand_under_their_titles(script):
    lines = (ROOT / script).read_text().splitlines()
    first, data, config = (lines.index(title) + 1 for title in OUTER)
    get_args, main = function(script, "get_args"), function(script, "main")
    assert first < data < config < get_args.lineno < main.lineno
    for node in tree(script).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.lineno > first, f"{node.name} stands above the first title"


def test_docstring_gives_the_source_and_the_commands(script):
    text = ast.get_docstring(tree(script)) or ""
    assert re.search(r"arXiv:? ?\d{4}\.\d{4,5}", text), "the paper's arXiv number"
    assert f"python {script}" in text, "the command that runs it"
    assert script in TRANSFORMERS or "torchrun" in text, "the command for several processes"


def test_get_args_and_main_take_the_same_arguments(script):
    get_args, main = function(script, "get_args"), function(script, "main")
    assert ast.unparse(get_args.args).replace(" ", "").split("=")[-1] == "None"
    assert [a.arg for a in get_args.args.args] == ["argv"]
    assert [a.arg for a in main.args.args] == ["args"]


def test_ends_by_running_main(script):
    body = tree(script).body
    assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    run(main, get_args)"
    imported = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "loop"]
    assert "run" in [alias.name for node in imported for alias in node.names]


def test_common_flags_are_in_the_common_order(script):
    (call,) = calls(function(script, "get_args"), "parser")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    assert set(keywords) == {"flags", "defaults"}
    flags = ast.literal_eval(keywords["flags"])
    order = [list(COMMON).index(flag) for flag in flags]
    assert all(a < b for a, b in pairwise(order)), flags
    assert set(flags) >= (IN_TRAINERS if script in TRAINERS else EVERYWHERE)


def test_own_flags_are_explained_and_new(script):
    for call in calls(function(script, "get_args"), "add_argument"):
        name = ast.literal_eval(call.args[0])
        assert name.startswith("--"), f"{name}: everything is a flag"
        assert name not in COMMON
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "help" in keywords, f"{name} is not explained"
        assert getattr(keywords.get("type"), "id", "") != "bool", f"{name}: type=bool takes every word for true"


def test_what_an_adapter_takes_of_the_context_counts(script):
    """`check_length` comes after `adapt`."""
    adapted = [call.lineno for call in calls(function(script, "main"), "adapt")]
    checked = [call.lineno for call in calls(function(script, "main"), "check_length")]
    assert len(checked) == 1 and (not adapted or min(adapted) < checked[0])


def test_a_chat_format_holds_for_all_and_is_saved(script):
    """The tokenizer itself is changed, before it renders anything."""
    asked = [call.lineno for call in calls(function(script, "main"), "with_chat_format")]
    of_rows = (calls(function(script, "main"), name) for name in ("examples", "tasks_of", "world_data"))
    used = [call.lineno for some in of_rows for call in some]
    assert len(asked) == 1 and used and asked[0] < min(used)


def test_nothing_runs_at_import(script):
    body = tree(script).body
    assert ast.get_docstring(tree(script))
    for node in body[1:-1]:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            found = [call for call in ast.walk(node.value or node) if isinstance(call, ast.Call)]
            assert not found, f"line {node.lineno}: {ast.unparse(node)}"
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef), f"line {node.lineno}"


def test_a_start_without_a_tokenizer_is_refused(script, tmp_path):
    if script in TRAINERS:
        save(Transformer(Config.from_depth(1, 1024, 64)), None, tmp_path / "mute")
        module = importlib.import_module(script[:-3])
        with pytest.raises(UserError, match="mute: no tokenizer.json in it"):
            module.main(module.get_args(["--model", str(tmp_path / "mute"), "--out", str(tmp_path / "out")]))
