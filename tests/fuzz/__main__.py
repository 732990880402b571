"""``python -m tests.fuzz [--target NAME] [--runs N | --seconds S] [--keep FOLDER]``: look for inputs that end in a
traceback, take longer than 10 s or more than 1 GB; print how many were tried. Needs atheris (``pip install -e '.[fuzz]'``).

Inputs that reach new code are kept in FOLDER for the next run; without it they are thrown away. What fails is kept in
any case, in ``fuzz-found/``: once it is understood, it goes into ``tests/fuzz/corpus/`` and the tests replay it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from tests.fuzz.targets import SCRATCH, TARGETS, scratch_in_memory

HERE = Path(__file__).parent
LONGEST_INPUT = 8192  # bytes: what is longer is slower, and says little that is new
OPTIONS = ("-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1", f"-max_len={LONGEST_INPUT}")


@dataclass(frozen=True)
class Outcome:
    """Of one target. ``seconds``: of its slowest input; ``memory`` in MB."""

    target: str
    inputs: int
    seconds: int
    memory: int
    failure: str

    def row(self) -> str:
        return (
            f"{self.target:<12}{self.inputs:>12,}{self.seconds:>10}{self.memory:>12}  {self.failure or 'nothing found'}"
        )


def fuzz(target: str, runs: int, seconds: int, kept: Path, found: Path = Path("fuzz-found")) -> Outcome:
    (kept / target).mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    words = [f"-dict={HERE / 'words.dict'}", f"-artifact_prefix={found}/{target}-", *OPTIONS]
    words += [f"-runs={runs}"] if runs else []
    words += [f"-max_total_time={seconds}"] if seconds else []
    seeds = HERE / "corpus" / target
    folders = [str(kept / target), *([str(seeds)] if seeds.is_dir() else [])]
    command = [sys.executable, "-m", "tests.fuzz.engine", target, *folders, *words]
    with scratch_in_memory() as scratch:
        environment = {**os.environ, SCRATCH: scratch}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if not any(found.iterdir()):
        found.rmdir()

    def told(what: str) -> int:
        said = re.findall(rf"stat::{what}:\s+(\d+)", done.stderr)
        return int(said[-1]) if said else 0

    failure = ""
    if done.returncode:
        told_by_all = done.stdout + done.stderr
        lines = re.findall(r"^\w*(?:Error|Exception)\b.*", told_by_all, re.MULTILINE)
        lines += re.findall(r"ERROR: libFuzzer.*", told_by_all)
        failure = lines[0] if lines else f"exit code {done.returncode}: {done.stderr[-300:]}"
    return Outcome(
        target, told("number_of_executed_units"), told("slowest_unit_time_sec"), told("peak_rss_mb"), failure
    )


@click.command()
@click.option(
    "--target", type=click.Choice(list(TARGETS)), multiple=True, help="May be given several times; default: all."
)
@click.option("--runs", default=0, help="Inputs for each target.")
@click.option("--seconds", default=0, help="For each target; 3 where --runs is not given.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for inputs that reach new code.")
def main(target: tuple[str, ...], runs: int, seconds: int, keep: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="tpshard-fuzz-") as scratch:
        click.echo(f"{'target':<12}{'inputs':>12}{'slowest s':>10}{'memory MB':>12}  outcome")
        outcomes = []
        for name in target or TARGETS:
            outcomes.append(fuzz(name, runs, seconds or (0 if runs else 3), keep or Path(scratch)))
            click.echo(outcomes[-1].row())
    click.echo(f"{sum(outcome.inputs for outcome in outcomes):,} inputs")
    sys.exit(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    main()
