"""``python -m tests.bench.verify``: the model checks of verify against the unsharded model in float64."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tpshard.cli.options import Count, Size
from tpshard.cli.render import table

from . import models
from .measure import Sample, run, warm

TPSHARD = [sys.executable, "-m", "tpshard"]
STREAMED = [sys.executable, "-m", "tests.bench.streamed"]


def checks(report: Path) -> dict[str, float]:
    """The seconds of each check, from the JUnit file."""
    import xml.etree.ElementTree as ElementTree

    return {case.get("name", ""): float(case.get("time", 0)) for case in ElementTree.parse(report).iter("testcase")}


@click.command()
@click.option("--size", type=Size(), default="2GB", show_default=True, help="Of the checkpoint.")
@click.option("--rounds", type=Count(), default=3, show_default=True)
@click.option("--tp", type=Count(), default=8, show_default=True)
@click.option("--level", default="forward", show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False), help="Folder for what is written.")
def main(size: int, rounds: int, tp: int, level: str, scratch: Path | None) -> None:
    """Measure verify on a Llama-shaped BF16 checkpoint, each run right after the unsharded model's."""
    runs: list[tuple[Sample, Sample, dict[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=scratch, prefix="tpshard-bench-") as name:
        source, shards, report = models.llama(Path(name, "source"), size), Path(name, "shards"), Path(name, "r.xml")
        subprocess.run([*TPSHARD, "split", str(source), str(shards), "--tp", str(tp), "-q"], check=True)
        for _ in range(rounds):
            warm(source)
            alone = run([*STREAMED, str(source)])
            warm(shards)
            words = ["verify", str(shards), "--against", str(source), "--level", level, "--junit", str(report)]
            whole = run([*TPSHARD, *words, "--json"])
            runs.append((alone, whole, checks(report)))
        total = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    rows = [["", "seconds", "× unsharded", "anonymous MB"]]
    unsharded = statistics.median(alone.seconds for alone, _, _ in runs)
    rows.append(["unsharded, streamed", f"{unsharded:.1f}", "1", f"{max(a.anonymous for a, _, _ in runs) / 1e6:.0f}"])
    for check in runs[0][2]:
        seconds = statistics.median(found[check] for _, _, found in runs)
        ratio = statistics.median(found[check] / alone.seconds for alone, _, found in runs)
        rows.append([check, f"{seconds:.1f}", f"{ratio:.2f}", ""])
    seconds = statistics.median(whole.seconds for _, whole, _ in runs)
    ratio = statistics.median(whole.seconds / alone.seconds for alone, whole, _ in runs)
    rows.append(["verify, all", f"{seconds:.1f}", f"{ratio:.2f}", f"{max(w.anonymous for _, w, _ in runs) / 1e6:.0f}"])
    click.echo(
        f"{total:.1f} GB, tp {tp}, --level {level}, {rounds} rounds\n\n{table(rows, right=frozenset({1, 2, 3}))}"
    )


if __name__ == "__main__":
    main()
