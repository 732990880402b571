"""``python -m tests.bench``: split, merge and reshard against ``cp -r`` and the usual ways; and a very large plan."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from tpshard.cli.options import Count, Size
from tpshard.cli.render import table

from . import models
from .measure import Sample, remove, run, touch, warm

TPSHARD = [sys.executable, "-m", "tpshard"]
USUAL = [sys.executable, "-m", "tests.bench.usual"]
COPY = "cp -r"


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A run of one method, and the ``cp -r`` of its input that ran right before it."""

    method: str
    sample: Sample
    copy: Sample

    @property
    def ratio(self) -> float:
        return self.sample.seconds / self.copy.seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """Where to work, and how much memory to touch before each run."""

    scratch: Path
    touched: int

    def trial(self, method: str, command: Sequence[str], source: Path, target: Path) -> Trial:
        """``cp -r`` of the source, removed again, then the command; both from a warm page cache, nothing unwritten."""
        samples = []
        for each in (["cp", "-r", str(source), str(target)], list(command)):
            remove(target)
            os.sync()
            warm(source)
            if self.touched:
                touch(self.touched)
            samples.append(run(each))
        return Trial(method, samples[1], samples[0])


def one_round(bench: Bench, source: Path, tp: int, usual: Sequence[str]) -> Iterator[Trial]:
    """Every method once; leaves the source only."""
    shards, target, trial = bench.scratch / "shards", bench.scratch / "target", bench.trial
    for way in usual:
        yield trial(f"usual: {way}", [*USUAL, way, str(source), str(target), str(tp)], source, target)
        remove(target)
    split = ["split", str(source), str(shards), "--tp", str(tp), "--json"]
    yield trial(f"split 1→{tp}", [*TPSHARD, *split], source, shards)
    merge = ["merge", str(shards), str(target), "--json"]
    yield trial(f"merge {tp}→1", [*TPSHARD, *merge], shards, target)
    half = max(1, tp // 2)
    reshard = ["reshard", str(shards), str(target), "--tp", str(half), "--json"]
    yield trial(f"reshard {tp}→{half}", [*TPSHARD, *reshard], shards, target)
    remove(target)
    remove(shards)


def engines_round(bench: Bench, source: Path, tp: int) -> Iterator[Trial]:
    """Between engines: joined rows, and heads by groups; leaves the source only."""
    shards, target, trial = bench.scratch / "shards", bench.scratch / "target", bench.trial
    half = max(1, tp // 2)
    joined = ["split", str(source), str(target), "--tp", str(tp), "--engine", "vllm", "--json"]
    yield trial(f"Hugging Face → vLLM tp={tp}", [*TPSHARD, *joined], source, target)
    remove(target)
    grouped = ["split", str(source), str(shards), "--tp", str(half), "--engine", "megatron", "--json"]
    yield trial(f"Hugging Face → Megatron tp={half}", [*TPSHARD, *grouped], source, shards)
    merge = ["merge", str(shards), str(target), "--json"]
    yield trial(f"Megatron tp={half} → Hugging Face", [*TPSHARD, *merge], shards, target)
    across = ["reshard", str(shards), str(target), "--to", "vllm", "--tp", str(max(1, half // 2)), "--json"]
    yield trial(f"Megatron tp={half} → vLLM tp={max(1, half // 2)}", [*TPSHARD, *across], shards, target)
    remove(target)
    remove(shards)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def report(trials: Sequence[Trial]) -> str:
    """Medians and ranges, one row for each method; ``cp -r`` over all its runs first."""
    rows = [["method", "seconds", "× cp -r", "fsync s", "anonymous MB", "resident MB"]]
    rows.append([COPY, spread([t.copy.seconds for t in trials]), "1", "-", "-", "-"])
    for method in dict.fromkeys(t.method for t in trials):
        mine = [t for t in trials if t.method == method]
        sync = spread([t.sample.sync for t in mine]) if any(t.sample.sync for t in mine) else "-"
        anonymous = f"{max(t.sample.anonymous for t in mine) / 1e6:.0f}"
        resident = f"{max(t.sample.resident for t in mine) / 1e6:.0f}"
        seconds, ratio = spread([t.sample.seconds for t in mine]), spread([t.ratio for t in mine])
        rows.append([method, seconds, ratio, sync, anonymous, resident])
    return table(rows, right=frozenset({1, 2, 3, 4, 5}))


def bench_plan(scratch: Path, rounds: int) -> list[Trial]:
    """Planning alone, headers only."""
    source = models.deepseek(scratch / "deepseek")
    policy = str(scratch / "policy.yaml")
    command = [*TPSHARD, "split", str(source), str(scratch / "none"), "--tp", "16", "--dry-run", "--json"]
    nothing = Sample(1.0, 0.0, 0, 0)
    return [Trial("plan, 16 ranks", run([*command, "--policy", policy]), nothing) for _ in range(rounds)]


@click.command()
@click.option("--size", "sizes", type=Size(), multiple=True, help="Of a checkpoint, e.g. 2GB; may be given again.")
@click.option("--rounds", type=Count(), default=3, show_default=True)
@click.option("--tp", type=Count(), default=8, show_default=True)
@click.option("--usual", type=click.Choice(["loop", "held"]), multiple=True, help="Compare with these as well.")
@click.option(
    "--engines", "with_engines", is_flag=True, help="Measure conversions between engines, not split and so on."
)
@click.option("--plan", "with_plan", is_flag=True, help="Plan a checkpoint of 94,000 tensors for 16 ranks.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), help="Folder for what is written.")
@click.option("--touch", "touched", type=Size(), metavar="SIZE", help="Where the host takes back free memory.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run's numbers here.")
def main(
    sizes: tuple[int, ...],
    rounds: int,
    tp: int,
    usual: tuple[str, ...],
    with_engines: bool,
    with_plan: bool,
    scratch: Path | None,
    touched: int | None,
    json_file: Path | None,
) -> None:
    """Measure split, merge and reshard against cp -r, and with --plan the planning of a very large checkpoint."""
    results: dict[str, list[Trial]] = {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="tpshard-bench-") as name:
        for size in sizes or (() if with_plan else (2 * 10**9,)):
            source = models.llama(Path(name, "source"), size)
            label = f"{sum(path.stat().st_size for path in source.iterdir()) / 1e9:.1f} GB"
            bench = Bench(Path(name), touched or 0)
            turns = (
                engines_round(bench, source, tp) if with_engines else one_round(bench, source, tp, usual)
                for _ in range(rounds)
            )
            results[label] = [trial for turn in turns for trial in turn]
            remove(source)
            click.echo(f"{label}, {rounds} rounds\n\n{report(results[label])}\n")
        if with_plan:
            results["plan"] = bench_plan(Path(name), rounds)
            seconds = spread([t.sample.seconds for t in results["plan"]])
            peak = max(t.sample.anonymous for t in results["plan"])
            click.echo(f"plan: {seconds} seconds, {peak / 1e6:.0f} MB anonymous")
    if json_file:
        data = {label: [dataclasses.asdict(t) for t in trials] for label, trials in results.items()}
        json_file.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
