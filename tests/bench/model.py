"""``python -m tests.bench.model``: how long a split takes on 1 to 64 nodes, by a model on paper.

What each process reads and writes is not a guess: a DeepSeek-V3-shaped checkpoint is planned and dealt as tpshard does
it, and the bytes are counted. What a byte costs is measured here (``--measure``) or taken from what others publish.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import click

from tests.bench import models
from tpshard.cli.render import table
from tpshard.conversion import Options
from tpshard.convert import plan_split
from tpshard.digest import TREE
from tpshard.execute import SLAB
from tpshard.fingerprint import fingerprint
from tpshard.plan import Plan, Transfer
from tpshard.shares import Lot, deal
from tpshard.slabs import cut_into_slabs

# Measured by --measure, and by python -m tests.bench on 2 GB: two cores, ext4 on a virtual disk, Python 3.11.
COPY = 1.0e9  # bytes a second and core: read, cut, digest, write, all in the page cache
START = 0.8  # seconds: a process, and the end of one
PLANNING = 3.1  # seconds: headers, policy, fingerprint, dealing: of 94,736 tensors for 16 ranks
MANIFEST = 2.3  # seconds: of the same
# Assumed.
CORES = 8  # of a node, which are the threads of its one process
NETWORK = 3.1e9  # bytes a second and node, each way: 25 GbE
CONNECTION = 85e6  # bytes a second and request in flight, of an object store (what Amazon says of S3)
REQUESTS = 16  # in flight of one process, as tpshard has them
NODES = (1, 2, 4, 8, 16, 32, 64)
RANKS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """``read``, ``written``: by the process that has most; ``total``: read by all, as a multiple of the checkpoint."""

    nodes: int
    read: float
    written: float
    total: float

    @property
    def shared(self) -> float:
        """Seconds where source and target are on a file system that keeps up with all nodes."""
        return self._seconds(NETWORK)

    @property
    def store(self) -> float:
        """Seconds where the source is in an object store."""
        return self._seconds(min(NETWORK, CONNECTION * REQUESTS))

    def _seconds(self, reading: float) -> float:
        copying = max(self.read / reading, self.written / NETWORK, max(self.read, self.written) / (COPY * CORES))
        return START + PLANNING + copying + MANIFEST


def rows(plan: Plan, nodes: Sequence[int] = NODES) -> Iterator[Row]:
    transfers = [transfer for _, transfer in plan.transfers()]
    size = sum(transfer.size for transfer in transfers)
    for count in nodes:
        loads = [_load(plan, transfers, lot) for lot in deal(plan, [], count)]
        most = max(loads)
        yield Row(count, most[0], max(load[1] for load in loads), sum(load[0] for load in loads) / size)


def _load(plan: Plan, transfers: Sequence[Transfer], lot: Lot) -> tuple[int, int]:
    """Bytes that a process reads and writes."""
    read = written = 0
    names, wholes = lot
    for outputs in plan.parts():
        ranks = frozenset(output.rank for output in outputs if output.name in names)
        for index in range(outputs[0].first, outputs[0].last) if ranks else ():
            transfer = transfers[index]
            own = ranks & {holding.rank for holding in transfer.writes}
            needs_all = index in wholes or bool(own & transfer.whole)
            read += transfer.size if needs_all else _needed(transfer, own)
            written += _volume(transfer, own)
    return read, written


@cache
def _needed(transfer: Transfer, ranks: frozenset[int]) -> int:
    """What is read of a tensor for some ranks alone."""
    writes = tuple(holding for holding in transfer.writes if holding.rank in ranks)
    return sum(slab.size for slab in cut_into_slabs(dataclasses.replace(transfer, writes=writes), SLAB, False))


@cache
def _volume(transfer: Transfer, ranks: frozenset[int]) -> int:
    return sum(holding.volume for holding in transfer.writes if holding.rank in ranks)


def planned(scratch: Path, limit: int | None) -> Plan:
    """The DeepSeek-V3-shaped checkpoint, headers only, for 16 ranks."""
    source = scratch / "deepseek"
    if not source.exists():
        models.deepseek(source)
    options = Options(max_shard_size=limit)
    return plan_split(source, scratch / "none", RANKS, str(scratch / "policy.yaml"), options).plan


def report(plan: Plan) -> str:
    """The table as the docs have it."""
    head = ["nodes", "most read by one", "most written by one", "read by all", "shared file system", "from a store"]
    lines = [
        [
            str(row.nodes),
            f"{row.read / 1e9:.0f} GB",
            f"{row.written / 1e9:.0f} GB",
            f"{row.total:.2f} ×",
            f"{row.shared:.0f} s",
            f"{row.store:.0f} s",
        ]
        for row in rows(plan)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def measured(scratch: Path) -> str:
    """What the figures above are made from."""
    begin = time.perf_counter()
    options = Options()
    conversion = plan_split(scratch / "deepseek", scratch / "none", RANKS, str(scratch / "policy.yaml"), options)
    planning = time.perf_counter()
    fingerprint(conversion.plan, conversion.policy, conversion.roles, conversion.mesh, {}, "", TREE)
    printed = time.perf_counter()
    deal(conversion.plan, [], 64)
    dealt = time.perf_counter()
    size = _manifest_size(conversion)
    end = time.perf_counter()
    found = [("plan", planning - begin), ("fingerprint", printed - planning), ("deal", dealt - printed)]
    found.append((f"manifest of {size / 1e6:.0f} MB", end - dealt))
    return table([[name, f"{seconds:.1f} s"] for name, seconds in found])


def _manifest_size(conversion: object) -> int:
    from tpshard.conversion import Conversion, manifest_of
    from tpshard.manifest import FileRecord, manifest_bytes
    from tpshard.share import Written

    assert isinstance(conversion, Conversion)
    plan, digest = conversion.plan, "0" * 32
    files = tuple(FileRecord(output.name, output.rank, output.part, 1, digest) for output in plan.outputs)
    written = Written(files, (digest,) * len(plan.items), ((digest,) * RANKS,) * len(plan.items))
    return len(manifest_bytes(manifest_of(conversion, written, (), TREE)))


@click.command()
@click.option("--measure", is_flag=True, help="Print what the figures are made from, too.")
def main(measure: bool) -> None:
    """Print the tables of docs/many.md."""
    with tempfile.TemporaryDirectory(prefix="tpshard-model-") as name:
        for limit in (None, 10**9):
            click.echo(f"{report(planned(Path(name), limit))}\n")
        if measure:
            click.echo(measured(Path(name)))


if __name__ == "__main__":
    main()
