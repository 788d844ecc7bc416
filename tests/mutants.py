"""Planted bugs: proof that the tests would notice, and an exercise in finding bugs.

A test is worth something if it fails when the code is wrong. Each Mutant is one way to be wrong: a line of one source
file, what it becomes, and the test that must then fail. The lists are in tests/ledger/, a file for each part.

    python -m tests.mutants                   plant every bug in turn; ends with "N of M caught", exit code 1 unless all
    python -m tests.mutants --only "rotary"   those with the word in their file or name
    python -m tests.mutants --minutes 20      as many as that time allows, drawn by --seed; all if it allows
    python -m tests.mutants --list            all of them, numbered, and the tests that catch them

Find the bug: `python -m tests.mutants --puzzle 17` plants number 17 and prints what its tests then say, and nothing
else. The file on your disk stays healthy, so there is nothing to spot in it: from the failure alone, find the line and
say what it was changed to. `--list` has the name of the answer and tests/ledger/ the answer. Then go the other way:
write a bug of your own into the ledger, as quiet as you can, and see whether the tests catch it. If they do not, you
have found a test to write.

How it works: the libraries are imported once, our own modules never; each mutant gets a fork of that process, in which
one module is compiled from changed source and pytest runs. No file is written. Hence the limits: Python modules only,
and a test sees the bug in its own process and the processes it forks, not in a fresh `python` that it starts. A mutant
counts as caught if its tests fail, or hang for --limit seconds. It does not count if a test cannot be collected, if the
changed code cannot even run (a name that does not exist proves nothing), or if the text to change is not in the file
exactly once (STALE).
"""

import argparse
import contextlib
import importlib
import math
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
import tqdm

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("numpy", "tiktoken", "torch", "torch._dynamo", "torch._inductor.compile_fx", "transformers")
STARTED = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
BROKEN = re.compile(r"^E +((NameError|UnboundLocalError|ImportError|ModuleNotFoundError): .*)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A bug: `old`, found once in `file` (from the root), becomes `new`; `test` (pytest node ids) must then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str | tuple[str, ...]

    @property
    def tests(self) -> tuple[str, ...]:
        return (self.test,) if isinstance(self.test, str) else self.test


def ledger() -> list[Mutant]:
    """Every mutant of every module in tests/ledger/."""
    import tests.ledger

    modules = [importlib.import_module(f"tests.ledger.{m.name}") for m in pkgutil.iter_modules(tests.ledger.__path__)]
    return [mutant for module in modules for mutant in module.MUTANTS]


def changed(mutant: Mutant) -> str:
    """The source of the mutant's file with the bug in it; ValueError if the bug does not fit."""
    path = ROOT / mutant.file
    source = path.read_text() if path.exists() else ""
    if (n := source.count(mutant.old)) != 1:
        raise ValueError(f"STALE: the text to change is in {mutant.file} {n} times, not once")
    planted = source.replace(mutant.old, mutant.new)
    try:
        compile(planted, mutant.file, "exec")
    except SyntaxError as error:
        raise ValueError(f"ERROR: the changed file does not compile: {error}") from None
    return planted


class Planted(SourceFileLoader):
    """Finds and loads one module of ours from the `source` given, not from its file; no bytecode is kept."""

    def __init__(self, file: str, source: str):
        super().__init__(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."), str(ROOT / file))
        self.planted = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str):
        return self.source_to_code(self.planted.encode(), self.path)


def child(finder: Planted | None, options: list[str], output: Path, one_thread: bool) -> None:
    """The forked process: plant the bug, run pytest with `options`, leave what it prints in `output`."""
    os.setsid()  # whoever kills this group reaches the processes that the tests started, too
    with output.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    folder = output.with_suffix("")
    folder.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    if one_thread:
        import torch

        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    if finder:
        sys.meta_path.insert(0, finder)
    # not the options of pyproject.toml: doctests would import our modules in pytest's own way, without the bug
    ours = ["-q", "-o", "addopts=", "-m", "slow or not slow", "-p", "no:cacheprovider", f"--basetemp={folder}/pytest",
            "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip
    sys.exit(int(pytest.main([f"--rootdir={ROOT}", *ours, *options])))


def run(jobs: dict[object, tuple[Planted | None, list[str]]], at_once: int, limit: float, minutes: float = math.inf
        ) -> Iterator[tuple]:  # fmt: skip
    """Run each job in a fork, `at_once` at a time: yields (its key, exit code or None if it hung, what it printed).

    After `minutes` no more are begun.
    """
    end = time.monotonic() + 60 * minutes
    waiting, running = list(jobs.items()), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                if time.monotonic() > end:
                    waiting.clear()
                while waiting and len(running) < at_once:
                    key, (finder, options) = waiting.pop(0)
                    output = Path(folder, f"{len(waiting)}.txt")
                    process = STARTED.Process(target=child, args=(finder, options, output, at_once > 1))
                    process.start()
                    running[process] = key, output, time.monotonic() + limit
                multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.2)
                for process, (key, output, deadline) in list(running.items()):
                    hung = process.is_alive() and time.monotonic() > deadline
                    if hung or not process.is_alive():
                        kill(process)
                        del running[process]
                        yield key, None if hung else process.exitcode, output.read_text(errors="replace").strip()
        finally:
            for process in running:
                kill(process)


def kill(process: multiprocessing.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def verdict(code: int | None, printed: str, limit: float) -> str:
    """What exit code and output of pytest say about the mutant: it is caught if this begins with "caught"."""
    last = printed.splitlines()[-1] if printed else ""
    if code is None:
        return f"caught: its tests hung for {limit:.0f} seconds"
    if code == pytest.ExitCode.TESTS_FAILED and (broken := BROKEN.search(printed)):
        return f"ERROR: the changed code cannot run: {broken[1]}"
    if code == pytest.ExitCode.TESTS_FAILED:
        return "caught"
    return f"SURVIVED: {last}" if code == pytest.ExitCode.OK else f"ERROR: pytest ended with code {code}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with TEXT in their file or name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no more after this time")
    parser.add_argument("--seed", default="0", help="which ones, where --minutes are too short for all")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--puzzle", type=int, metavar="N", help="plant number N and print how its tests fail")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a mutant (default: %(default)s)")
    args = parser.parse_args()
    os.chdir(ROOT)
    mutants = [(n, m) for n, m in enumerate(ledger(), start=1) if args.only in f"{m.file}: {m.name}"]
    if args.list:
        for n, mutant in mutants:
            print(f"{n:4} {mutant.file}: {mutant.name}\n       {' '.join(mutant.tests)}")
        return 0
    if STARTED is None:
        parser.exit(2, "the mutants need a system that can fork: Linux, macOS or WSL\n")
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if args.puzzle:
        mutants = [(n, m) for n, m in mutants if n == args.puzzle]

    jobs, verdicts = {}, {}
    for n, mutant in mutants:
        try:
            jobs[n] = Planted(mutant.file, changed(mutant)), ["-x", *mutant.tests]
        except ValueError as error:
            verdicts[n] = str(error)
    if args.puzzle:
        for _, _, printed in run(jobs, 1, args.limit):
            print(printed)
        print(*verdicts.values(), sep="\n", end="")
        return 0

    tests = list(dict.fromkeys(test for n, mutant in mutants if n in jobs for test in mutant.tests))
    print(f"{len(tests)} tests without a bug: ", end="", flush=True)
    for _, code, printed in run({None: (None, tests)} if tests else {}, 1, 10 * args.limit):
        if code != pytest.ExitCode.OK:
            print(f"they must pass first\n{printed}")
            return 1
        print(printed.splitlines()[-1])
    tqdm.tqdm.monitor_interval = 0  # no thread of its own: we fork
    if args.minutes < math.inf:
        keys = random.Random(args.seed).sample(list(jobs), len(jobs))
        jobs = {n: jobs[n] for n in keys}
    often = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm.tqdm(total=len(jobs), unit="mutant", mininterval=often) as bar:
        for n, code, printed in run(jobs, args.jobs, args.limit, args.minutes):
            verdicts[n] = verdict(code, printed, args.limit)
            bar.update()
    caught = [n for n, words in verdicts.items() if words.startswith("caught")]
    for n, mutant in mutants:
        if verdicts.get(n, "caught") != "caught":
            print(f"{n:4} {mutant.file}: {mutant.name}\n       {verdicts[n]}\n       {' '.join(mutant.tests)}")
    if len(verdicts) < len(mutants):
        print(f"{len(mutants) - len(verdicts)} not run: --minutes {args.minutes:g}")
    print(f"{len(caught)} of {len(verdicts)} caught")
    return 0 if len(caught) == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
