"""The README's tables, made from what lies in results/ and its folders: `python -m tests.readme` rewrites them."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {"results": False, "more results": True}  # what stands between these marks: whether runs with an --out
# of --loss or --method all, in results/tables, each between its marks
TABLES = ("dpo", "grpo", "lora", "distill", "quantize", "prune", "vlm")
BENCH_START, BENCH_END = "<!-- bench -->", "<!-- /bench -->"
ORDER = ("sft", "reward", "dpo", "ppo", "grpo", "lora", "distill", "quantize", "prune", "reason", "merge", "edit",
         "rag", "vlm")  # fmt: skip
FIELDS = ("script", "variant", "metric", "higher_is_better", "before", "after", "n", "ci95", "metrics", "baselines",
          "seconds", "tokens_per_second", "peak_memory_mb", "device", "seed", "command", "torch", "git")  # fmt: skip
COLUMNS = ("script", "variant", "metric", "before", "after", "± 95%", "n", "baselines", "seconds", "command", "commit")


def results(folder: Path = ROOT / "results") -> list[dict]:
    """What runs left in their result.json files, collected in `folder`, in the order of the README."""
    found = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return [result for _, result in sorted(found, key=lambda item: (ORDER.index(item[1]["script"]), item[0]))]


def of_runs(rows: list[dict], with_out: bool) -> list[dict]:
    """Those of the default runs, each script by its name alone, or all others, whose folders were named."""
    return [row for row in rows if (" --out " in row["command"]) == with_out]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, one line a result.

    >>> row = dict.fromkeys(FIELDS) | {"script": "sft", "metric": "exact match", "before": 0, "after": 0.951, "n": 512}
    >>> print(table([row | {"baselines": {"a|b": 0.5}, "seconds": 61.2, "command": "python sft.py"}]).splitlines()[-1])
    | sft |  | exact match | 0.000 | 0.951 |  | 512 | a\\|b 0.500 | 61 | `python sft.py` |  |
    """
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        baselines = ", ".join(f"{name} {value:.3f}" for name, value in (row["baselines"] or {}).items())
        interval = "" if row["ci95"] is None else f"{row['ci95']:.3f}"
        lines.append([
            row["script"], row["variant"] or "", row["metric"], f"{row['before']:.3f}", f"{row['after']:.3f}", interval,
            str(row["n"]), baselines, f"{row['seconds']:.0f}", f"`{row['command']}`", (row["git"] or "")[:7],
        ])  # fmt: skip
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} table -->", f"<!-- /{name} table -->"


def variants_table(path: Path) -> str:
    """The table.json of `--loss all` as a Markdown table: means, and ± the spread over seeds if there are several."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    label, _, *columns = rows[0]
    lines = [[label, "seeds", *columns], ["---"] * (2 + len(columns))]
    for row in rows:
        lines.append([row[label], str(row["seeds"])])
        for column in columns:
            digits, (mean, spread) = {"seconds": 0, "peak MB": 0, "tokens/s": 0}.get(column, 3), row[column].values()
            spread = spread if digits else None
            lines[-1].append(f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}"))
    return markdown(lines)


def rates_table(path: Path) -> str:
    """The table.json of `lora.py --tune`, a line a method: rate, task / old skills, the best in bold."""
    from lora import tuned

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    cells: dict[str, list[str]] = {}
    best = tuned(rows)
    for row in rows[1:]:
        name, rate = re.split("[:,]lr=", row["method"])
        cell = f"×{rate} {row['task']['mean']:.3f} / {row['old skills']['mean']:.3f}"
        cells.setdefault(name, []).append(f"**{cell}**" if best[name] == float(rate) else cell)
    width = max(map(len, cells.values()))
    lines = [["method", "rate: task / old skills", *[""] * (width - 1)], ["---"] * (1 + width)]
    lines += [[name, *some, *[""] * (width - len(some))] for name, some in cells.items()]
    return markdown(lines)


def bench_table(folder: Path = ROOT / "results" / "bench") -> str:
    """What bench.py left in results/bench/AREA.json, errors left out, as a Markdown table."""
    lines = [["bench.py", "what", "ours", "peer", "unit", "ratio"], ["---"] * 6]
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if not row["name"].endswith("error"):
                figures = f"{row['ours']:.4g}", f"{row['peer']:.4g}", row["unit"], f"{row['ratio']:.2f}"
                lines.append([path.stem, row["name"], *figures])
    return markdown(lines)


def between(text: str, start: str, end: str) -> tuple[int, int]:
    """Where the text between two markers begins and ends; each marker must be there once."""
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"README.md: expected {start} and then {end}, each once")
    return text.index(start) + len(start), text.index(end)


def fill(text: str, made: str, start: str, end: str) -> str:
    """The README `text` with `made` between the markers."""
    start, end = between(text, start, end)
    return f"{text[:start]}\n{made}\n{text[end:]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    filled = readme.read_text(encoding="utf-8")
    for name, with_out in RESULTS.items():
        filled = fill(filled, table(of_runs(results(), with_out)), f"<!-- {name} -->", f"<!-- /{name} -->")
    for name in TABLES:
        filled = fill(filled, variants_table(ROOT / "results" / "tables" / f"{name}.json"), *marks(name))
    rates = rates_table(ROOT / "results" / "tables" / "lora-tune.json")
    filled = fill(filled, rates, "<!-- lora rates -->", "<!-- /lora rates -->")
    readme.write_text(fill(filled, bench_table(), BENCH_START, BENCH_END), encoding="utf-8")
