"""The README says what is: its results are those of results/*.json, the files of its map exist, no path is private."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.readme import (
    BENCH_END,
    BENCH_START,
    FIELDS,
    RESULTS,
    ROOT,
    TABLES,
    bench_table,
    between,
    fill,
    marks,
    of_runs,
    rates_table,
    results,
    table,
    variants_table,
)

# folders of one machine or one person
PRIVATE = re.compile(r"(?<![\w.\-])/(?:work|root|tmp)/|(?<![\w.\-])/(?:work|root)\b|(?<![\w.\-])/home/\w")


def readme() -> str:
    assert (ROOT / "README.md").exists()
    return (ROOT / "README.md").read_text(encoding="utf-8")


def files() -> list[Path]:
    """Every file of the repository that git tracks or would; without git, all but hidden and generated ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    left_out = {"out", "venv", "__pycache__"}
    inside = [(path, path.relative_to(ROOT).parts) for path in ROOT.rglob("*") if path.is_file()]
    return [path for path, parts in inside if not left_out & {*parts} and not any(p[0] == "." for p in parts[:-1])]


@pytest.mark.parametrize("name", RESULTS)
def test_results_tables_are_the_generated_ones(name):
    text = readme()
    start, end = between(text, f"<!-- {name} -->", f"<!-- /{name} -->")
    assert text[start:end].strip() == table(of_runs(results(), RESULTS[name])), "run: python -m tests.readme"


def test_every_result_stands_in_one_of_the_tables():
    found = results()
    parts = [of_runs(found, with_out) for with_out in RESULTS.values()]
    assert len(parts[0]) > 8 and sorted(map(str, sum(parts, []))) == sorted(map(str, found))
    assert all(" --out " not in row["command"] for row in parts[0]), "a default run"


def test_bench_table_is_the_generated_one():
    text = readme()
    start, end = between(text, BENCH_START, BENCH_END)
    assert text[start:end].strip() == bench_table(), "run: python -m tests.readme"
    assert text[start:end].count("\n") > 10, "there are figures of speed"


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_variants_are_the_generated_ones(name):
    text = readme()
    start, end = between(text, *marks(name))
    path = ROOT / "results" / "tables" / f"{name}.json"
    assert text[start:end].strip() == variants_table(path), "run: python -m tests.readme"


def test_table_of_rates_is_the_generated_one():
    text = readme()
    start, end = between(text, "<!-- lora rates -->", "<!-- /lora rates -->")
    assert text[start:end].strip() == rates_table(ROOT / "results" / "tables" / "lora-tune.json")


def test_rates_stand_in_a_line_a_method(tmp_path):
    """
    | method | rate: task / old skills |  |
    | --- | --- | --- |
    | full | ×0.1 0.500 / 0.900 | **×1 0.750 / 0.250** |
    | lora | **×2 0.250 / 0.125** |  |
    """
    rows = [("SFT", 0.0, 0.9), ("full:lr=0.1", 0.5, 0.9), ("full:lr=1", 0.75, 0.25), ("lora:lr=2", 0.25, 0.125)]
    rows = [{"method": name, "task": {"mean": x}, "old skills": {"mean": y}} for name, x, y in rows]
    (tmp_path / "rates.json").write_text(json.dumps({"rows": rows}))
    wanted = [line.strip() for line in test_rates_stand_in_a_line_a_method.__doc__.strip().splitlines()]
    assert rates_table(tmp_path / "rates.json").splitlines() == wanted


def test_variants_have_means_and_spreads(tmp_path):
    one, three = {"mean": 0.5, "spread": None}, {"mean": 0.75, "spread": 0.0625}
    rows = [
        {"loss": "dpo", "seeds": 3, "KL": three, "seconds": three},
        {"loss": "ipo", "seeds": 1, "KL": one, "seconds": one},
    ]
    (tmp_path / "dpo.json").write_text(json.dumps({"rows": rows}))
    assert variants_table(tmp_path / "dpo.json").splitlines() == [
        "| loss | seeds | KL | seconds |", "| --- | --- | --- | --- |", "| dpo | 3 | 0.750 ± 0.062 | 1 |",
        "| ipo | 1 | 0.500 | 0 |"]  # fmt: skip


def test_there_are_results_and_each_has_the_fields():
    found = results()
    assert found
    for result in found:
        assert tuple(result) == FIELDS, result["command"]
        assert result["command"].split()[0] in ("python", "torchrun"), "a reader must be able to repeat it"


def test_table_is_replaced_and_nothing_else():
    text = "before [old] after"
    filled = fill(text, "new", "[", "]")
    assert filled == fill(filled, "new", "[", "]") == "before [\nnew\n] after"
    for wrong in ("no marker", "][", "[[]"):
        with pytest.raises(ValueError, match="expected"):
            fill(wrong, "new", "[", "]")


def test_files_of_the_map_exist():
    text = readme()
    start, end = between(text, "<!-- files -->", "<!-- /files -->")
    names = [name for name in re.findall(r"`([^`\s]+)`", text[start:end]) if re.search(r"\.\w+$|/$", name)]
    assert len(names) >= 8
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_no_file_names_a_private_path():
    named = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text
        named += [f"{path.relative_to(ROOT)}: {match[0]}" for match in PRIVATE.finditer(text)]
    assert named == []


@pytest.mark.parametrize("text", ["see {}work/x", "`{}tmp/a`", "cd {}root", "'{}home/me/x'", "({}work)"])
def test_private_paths_are_seen(text):
    assert PRIVATE.search(text.format("/"))


@pytest.mark.parametrize("text", ["net{0}work", "a{0}worker", "{0}rooted", "src{0}tmp{0}x"])
def test_other_paths_are_not(text):
    assert not PRIVATE.search(text.format("/"))
