"""Mutation check: apply each mutation of `mutants.toml` to a copy of the project and see that its tests fail.

`python -m tests.mutants [--only WORD] [--jobs N]` (`make mutants`). General mutation testers (mutmut, cosmic-ray) make
thousands of mutants of their own and run a suite for each; this checks a list of chosen faults, each against the test
file that should see it. A mutant survives where its tests pass. The exit code is the number of survivors, at most 100.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
COPIED = ("hasten", "tests", "recipes", "benchmarks", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")
SECONDS = 600  # for the tests of one mutant; a mutant that never ends counts as killed


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, the only occurrence of `old` becomes `new`; pytest with the arguments `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def source(self, root: Path) -> str:
        """The mutated text of the file. Raises ValueError where `old` does not occur exactly once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} holds the text to replace {count} times, expected once")
        return text.replace(self.old, self.new)


def load() -> list[Mutant]:
    """The mutants of `mutants.toml`."""
    return [Mutant(**row) for row in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["mutant"]]


def copy_project(folder: Path) -> None:
    """What the tests need of the project, in `folder`."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        if (source := ROOT / name).is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.is_file():
            shutil.copy(source, folder / name)


def passes(folder: Path, tests: str) -> bool:
    """Whether pytest passes in a copy of the project. Raises RuntimeError where it ran no test."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests.split()]
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):  # 1: tests failed; others: no tests, a wrong argument, an interrupted run
        raise RuntimeError(f"pytest {tests} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode == 0


def survives(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests pass in a copy of the project with the mutation; the copy is restored."""
    file = folder / mutant.file
    original = file.read_text()
    try:
        file.write_text(mutant.source(folder))
        return passes(folder, mutant.tests)
    finally:
        file.write_text(original)


def check(mutants: Iterable[Mutant], jobs: int) -> list[Mutant]:
    """The survivors, and a line about every mutant on stdout. Raises RuntimeError where tests fail without a mutation."""
    chosen = list(mutants)
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(jobs) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            (folder := Path(parent) / str(number)).mkdir()
            copy_project(folder)
            free.put(folder)

        def in_copy(run, argument):  # type: ignore[no-untyped-def]
            folder = free.get()
            try:
                return run(folder, argument)
            finally:
                free.put(folder)

        suites = sorted({mutant.tests for mutant in chosen})
        good = dict(zip(suites, pool.map(lambda tests: in_copy(passes, tests), suites)))
        for tests in suites:
            if not good[tests]:
                print(f"FAILS     without any mutation: pytest {tests}", flush=True)
        survivors, chosen = [], [mutant for mutant in chosen if good[mutant.tests]]
        results = pool.map(lambda mutant: in_copy(lambda folder, one: survives(one, folder), mutant), chosen)
        for mutant, alive in zip(chosen, results):
            print(f"{'SURVIVED' if alive else 'killed  '}  {mutant.name}", flush=True)
            survivors += [mutant] if alive else []
    print(f"{len(survivors)} of {len(chosen)} mutants survived")
    if not all(good.values()):
        raise RuntimeError("some tests fail without any mutation, see above")
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose name or file holds this word")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the project tested at once (default: 2)")
    options = parser.parse_args()
    chosen = [one for one in load() if options.only in one.name or options.only in one.file]
    if not chosen:
        parser.error(f"no mutant holds {options.only!r}")
    return min(len(check(chosen, options.jobs)), 100)


if __name__ == "__main__":
    raise SystemExit(main())
