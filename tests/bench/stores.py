"""``python -m tests.bench.stores``: a store as source and as target, against its library's own plain copy.

Starts a server for S3 on this machine: s3rver (npm) where it is found, else moto, which is slow. Server, library and
tpshard share the machine's cores, so that the ratios tell more than the rates.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from tests.bench.measure import Sample, remove, run, warm
from tests.bench.models import llama
from tests.stores import servers
from tpshard.cli.options import Count, Size
from tpshard.cli.render import size as shown
from tpshard.cli.render import table

TPSHARD = [sys.executable, "-m", "tpshard"]
PLAIN = [sys.executable, "-m", "tests.bench.stores_plain"]


@click.command()
@click.option("--size", type=Size(), default="1GB", show_default=True, help="Of the checkpoint.")
@click.option("--tp", type=Count(), default=4, show_default=True)
@click.option("--rounds", type=Count(), default=3, show_default=True)
@click.option("--s3rver", type=click.Path(path_type=Path), help="The program s3rver; without it, moto.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Where to work.")
def main(size: int, tp: int, rounds: int, s3rver: Path | None, scratch: Path | None) -> None:
    """Medians, each beside the plain copy that ran right before it."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, server(s3rver, Path(folder)) as root:
        model = llama(Path(folder) / "model", size)
        warm(model)
        run([*PLAIN, "up", str(model), f"{root}/model"])
        rows = [["", "plain copy", "tpshard", "rate", "ratio", "memory"]]
        for name, plain, own in jobs(root, model, Path(folder), tp):
            rows.append(measured(name, plain, own, rounds, Path(folder), model))
        click.echo(table(rows, right=frozenset(range(1, 6))))


def jobs(root: str, model: Path, folder: Path, tp: int) -> Iterator[tuple[str, list[str], list[str]]]:
    down, cut = [*PLAIN, "down", f"{root}/model", str(folder / "out")], ["--tp", str(tp), "--json"]
    yield "split s3 -> disk", down, [*TPSHARD, "split", f"{root}/model", str(folder / "out"), *cut]
    up = [*PLAIN, "up", str(model), f"{root}/NUMBER"]
    yield "split disk -> s3", up, [*TPSHARD, "split", str(model), f"{root}/NUMBER", *cut]
    run([*TPSHARD, "split", str(model), f"{root}/shards", *cut])
    down = [*PLAIN, "down", f"{root}/shards", str(folder / "out")]
    yield "merge s3 -> disk", down, [*TPSHARD, "merge", f"{root}/shards", str(folder / "out"), "--json"]
    one = [*PLAIN, "down", f"{root}/shards/rank-00001-of-{tp:05d}.safetensors", str(folder / "out")]
    yield "fetch a rank", one, [*TPSHARD, "fetch", f"{root}/model", str(folder / "out"), "--rank", "1", *cut]


def measured(name: str, plain: list[str], own: list[str], rounds: int, folder: Path, model: Path) -> list[str]:
    pairs: list[tuple[Sample, Sample]] = []
    for _ in range(rounds):
        samples = []
        for command in (plain, own):
            remove(folder / "out")
            os.sync()
            warm(model)
            samples.append(run([word.replace("NUMBER", f"n{time.monotonic_ns()}") for word in command]))
        pairs.append((samples[0], samples[1]))
    ratio = statistics.median(first.seconds / second.seconds for first, second in pairs)
    before, after = (statistics.median(pair[n].seconds for pair in pairs) for n in (0, 1))
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    memory = shown(max(second.anonymous for _, second in pairs))
    return [name, f"{before:.2f} s", f"{after:.2f} s", f"{shown(total / after)}/s", f"{ratio:.2f}", memory]


@contextlib.contextmanager
def server(s3rver: Path | None, folder: Path) -> Iterator[str]:
    if s3rver is None:
        with servers.s3() as moto:
            os.environ.update(moto.environment)
            yield moto.root
        return
    port = servers.free_port()
    (folder / "s3").mkdir()
    own = ["-d", str(folder / "s3"), "-a", "127.0.0.1", "-p", str(port), "--no-vhost-buckets", "--silent"]
    os.environ.update(servers.s3_environment(port) | {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"})
    with servers.program([str(s3rver), *own, "--configure-bucket", servers.BUCKET], port):
        yield f"s3://{servers.BUCKET}"


if __name__ == "__main__":
    main()
