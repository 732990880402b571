"""``python -m tests.bench``: split, merge and reshard against ``cp -r`` and the usual ways; and a very large plan."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from tpshard import __version__
from tpshard.cli.options import Count, Size
from tpshard.cli.render import table
from tpshard.conversion import DEFAULT_DIGEST
from tpshard.digest import ALGORITHMS

from . import models
from .measure import Sample, cool, remove, run, touch, warm

TPSHARD = [sys.executable, "-m", "tpshard"]
USUAL = [sys.executable, "-m", "tests.bench.usual"]
COPY = "cp -r"
SMALL = 100_000
HISTORY = ("date", "version", "commit", "what", "method", "rounds", "ratio", "least", "most", "seconds", "anonymous MB")


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
    cold: bool

    def trial(self, method: str, command: Sequence[str], source: Path, target: Path) -> Trial:
        """``cp -r`` of the source, removed again, then the command; both with the source in the page cache, or with
        nothing in it, and nothing unwritten."""
        samples = []
        for each in (["cp", "-r", str(source), str(target)], list(command)):
            remove(target)
            os.sync()
            cool() if self.cold else warm(source)
            if self.touched:
                touch(self.touched)
            samples.append(run(each))
        return Trial(method, samples[1], samples[0])


def one_round(bench: Bench, source: Path, tp: int, usual: Sequence[str], digest: str) -> Iterator[Trial]:
    """Every method once; leaves the source only."""
    shards, target, trial = bench.scratch / "shards", bench.scratch / "target", bench.trial
    note = "" if digest == DEFAULT_DIGEST else f", {digest}"
    for way in usual:
        yield trial(f"usual: {way}", [*USUAL, way, str(source), str(target), str(tp)], source, target)
        remove(target)
    split = ["split", str(source), str(shards), "--tp", str(tp), "--digest", digest, "--json"]
    yield trial(f"split 1→{tp}{note}", [*TPSHARD, *split], source, shards)
    merge = ["merge", str(shards), str(target), "--json"]
    yield trial(f"merge {tp}→1{note}", [*TPSHARD, *merge], shards, target)
    half = max(1, tp // 2)
    reshard = ["reshard", str(shards), str(target), "--tp", str(half), "--json"]
    yield trial(f"reshard {tp}→{half}{note}", [*TPSHARD, *reshard], shards, target)
    remove(target)
    remove(shards)


def small_round(bench: Bench, source: Path) -> Iterator[Trial]:
    """A file of very many small tensors to one rank and to eight; leaves the source only."""
    target, policy = bench.scratch / "target", bench.scratch / "small.yaml"
    policy.write_text(models.SMALL_POLICY)
    for tp in (1, 8):
        split = ["split", str(source), str(target), "--tp", str(tp), "--policy", str(policy), "--json"]
        yield bench.trial(f"{SMALL} tensors of 1 KB to {tp}", [*TPSHARD, *split], source, target)
        remove(target)


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


def bench_plan(scratch: Path, rounds: int) -> Iterator[Trial]:
    """Planning alone, headers only."""
    source = models.deepseek(scratch / "deepseek")
    command = [*TPSHARD, "split", str(source), str(scratch / "none"), "--dry-run", "--json"]
    command += ["--policy", str(scratch / "policy.yaml")]
    nothing = Sample(1.0, 0.0, 0, 0)
    for _ in range(rounds):
        for ranks in (16, 32, 64):
            yield Trial(f"plan, {ranks} ranks", run([*command, "--tp", str(ranks)]), nothing)
    remove(source)


def append_history(path: Path, results: Mapping[str, Sequence[Trial]]) -> None:
    """A line for each method: when, which version, of what, and the ratios to ``cp -r``."""
    new = not path.exists()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HISTORY)
        for label, trials in results.items():
            for method in dict.fromkeys(t.method for t in trials):
                ratios = [t.ratio for t in trials if t.method == method]
                seconds = statistics.median(t.sample.seconds for t in trials if t.method == method)
                peak = max(t.sample.anonymous for t in trials if t.method == method)
                numbers = [statistics.median(ratios), min(ratios), max(ratios), seconds]
                day, rounds = datetime.date.today().isoformat(), len(ratios)
                texts = [f"{number:.2f}" for number in numbers]
                if label == "plan":  # it is compared with nothing
                    texts[:3] = "", "", ""
                writer.writerow([day, __version__, commit.stdout.strip(), label, method, rounds, *texts, peak // 10**6])


@click.command()
@click.option("--size", "sizes", type=Size(), multiple=True, help="Of a checkpoint, e.g. 2GB; may be given again.")
@click.option("--rounds", type=Count(), default=3, show_default=True)
@click.option("--tp", type=Count(), default=8, show_default=True)
@click.option("--usual", type=click.Choice(["loop", "held"]), multiple=True, help="Compare with these as well.")
@click.option(
    "--engines", "with_engines", is_flag=True, help="Measure conversions between engines, not split and so on."
)
@click.option("--plan", "with_plan", is_flag=True, help="Plan a checkpoint of 94,000 tensors for 16 to 64 ranks.")
@click.option("--small", "with_small", is_flag=True, help=f"Split a file of {SMALL} tensors of 1 KB.")
@click.option("--digest", type=click.Choice(ALGORITHMS), default=DEFAULT_DIGEST, show_default=True)
@click.option("--cold", is_flag=True, help="Drop the page cache before each run (as root).")
@click.option("--sparse", is_flag=True, help="A source of holes, where the disk is short.")
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), help="Folder for what is written.")
@click.option("--touch", "touched", type=Size(), metavar="SIZE", help="Where the host takes back free memory.")
@click.option("--history", type=click.Path(path_type=Path), help="Append the ratios to this CSV file.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run's numbers here.")
def main(
    sizes: tuple[int, ...],
    rounds: int,
    tp: int,
    usual: tuple[str, ...],
    with_engines: bool,
    with_plan: bool,
    with_small: bool,
    digest: str,
    cold: bool,
    sparse: bool,
    scratch: Path | None,
    touched: int | None,
    history: Path | None,
    json_file: Path | None,
) -> None:
    """Measure split, merge and reshard against cp -r, and with --plan the planning of a very large checkpoint."""
    results: dict[str, list[Trial]] = {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="tpshard-bench-") as name:
        bench = Bench(Path(name), touched or 0, cold)
        for size in sizes or (() if with_plan or with_small else (2 * 10**9,)):
            source = models.llama(Path(name, "source"), size, sparse=sparse)
            label = f"{sum(path.stat().st_size for path in source.iterdir()) / 1e9:.1f} GB{', cold' if cold else ''}"
            turns = (
                engines_round(bench, source, tp) if with_engines else one_round(bench, source, tp, usual, digest)
                for _ in range(rounds)
            )
            results[label] = [trial for turn in turns for trial in turn]
            remove(source)
            click.echo(f"{label}, {rounds} rounds\n\n{report(results[label])}\n")
        if with_small:
            source = models.small(Path(name, "source"), SMALL)
            results["small"] = [trial for _ in range(rounds) for trial in small_round(bench, source)]
            click.echo(f"{rounds} rounds\n\n{report(results['small'])}\n")
        if with_plan:
            results["plan"] = list(bench_plan(Path(name), rounds))
            for method in dict.fromkeys(t.method for t in results["plan"]):
                samples = [t.sample for t in results["plan"] if t.method == method]
                seconds, peak = spread([s.seconds for s in samples]), max(s.anonymous for s in samples)
                click.echo(f"{method}: {seconds} seconds, {peak / 1e6:.0f} MB anonymous")
    if history:
        append_history(history, results)
    if json_file:
        data = {label: [dataclasses.asdict(t) for t in trials] for label, trials in results.items()}
        json_file.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
