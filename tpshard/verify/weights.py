"""Check 2, weights: every byte of every rank against the whole, replicas and padding included.

The whole is the source checkpoint where it is given; else it is rebuilt from the shards and must have the digest
that the manifest recorded of the source. Comparison is of bytes, so NaN, -0.0 and FP8 need no thought.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.digest import TENSORS, Hasher, hasher_factory
from tpshard.errors import InputError, printable
from tpshard.execute import SLAB
from tpshard.folder import CONFIG
from tpshard.header import DTYPE_BITS, parse_json_object
from tpshard.layout import Layout
from tpshard.plan import plan
from tpshard.slabs import Bytes, Contact, Rooms, cut_into_slabs
from tpshard.sources import SourceFiles
from tpshard.verify.folding import fold
from tpshard.verify.report import CheckResult, Finding


def check_weights(
    shards: Checkpoint,
    source: Checkpoint | None,
    workers: int,
    progress: Callable[[int], object],
    only: Collection[int] | None = None,
) -> CheckResult:
    """Compare all shards with the whole; at most one finding for each tensor and rank.

    ``only``: the ranks that are compared, with the source; who has rank 0 compares all that belongs to no rank, too.
    """
    names, counted = list(shards.tensors), fold(shards).tensors
    ranks = range(shards.ranks) if only is None else only
    findings = _name_findings(shards, source) if source and 0 in ranks else []
    common = [name for name in names if source is None or comparable(shards, source, name)]

    def compare(name: str) -> list[Finding]:
        with SourceFiles(shards) as own, SourceFiles(source or shards) as other:
            whole = source.tensors[name] if source else shards.tensors[name]
            found = _Comparison(shards, shards.tensors[name], whole, own, other, ranks, counted[name]).run(
                source is not None
            )
        held = [shards.tensors[name].layout.shards[rank] for rank in ranks]
        progress(sum(shard.volume for shard in held if shard))
        return found

    with ThreadPoolExecutor(workers) as pool:
        findings += itertools.chain.from_iterable(pool.map(compare, common))
    shards.check_unchanged()
    if source:
        source.check_unchanged()
    covered = {"tensors": len(common), "ranks": len(ranks), "bytes": sum(file.size for file in shards.files)}
    what = "the source's bytes" if source else "the digests recorded of the source"
    if source is None and shards.manifest and not shards.manifest.recorded:
        unproven = "no digests are recorded and no source is given: only copies and padding were compared"
        return CheckResult("weights", tuple(findings), covered, unproven="" if findings else unproven)
    return CheckResult("weights", tuple(findings), covered, notes=(f"compared with {what}",))


def _name_findings(shards: Checkpoint, source: Checkpoint) -> list[Finding]:
    findings = [
        Finding("is in the source, but in no shard", tensor=name)
        for name in source.tensors
        if name not in shards.tensors
    ]
    for name, tensor in shards.tensors.items():
        if name not in source.tensors:
            findings.append(Finding("is not in the source", tensor=name))
            continue
        other = source.tensors[name]
        if tensor.dtype != other.dtype:
            findings.append(Finding(f"dtype {other.dtype} became {tensor.dtype}", tensor=name))
        elif tensor.shape != other.shape:
            findings.append(Finding(f"shape {list(other.shape)} became {list(tensor.shape)}", tensor=name))
    return findings + _carried_findings(shards, source)


def _carried_findings(shards: Checkpoint, source: Checkpoint) -> list[Finding]:
    """config.json decides what the weights mean: it has to be the source's."""
    findings = []
    for name in shards.carried:
        theirs, ours = source.folder / name, shards.folder / name
        if theirs.is_file() and ours.is_file() and not _alike(theirs.read_bytes(), ours.read_bytes(), name):
            findings.append(Finding("is not the source's", file=name))
    return findings


def _alike(theirs: bytes, ours: bytes, name: str) -> bool:
    """Equal; or, of configurations that went through an engine, of the same content."""
    if theirs == ours or name != CONFIG:
        return theirs == ours
    try:
        return parse_json_object(theirs, name) == parse_json_object(ours, name)
    except InputError:
        return False


def comparable(shards: Checkpoint, source: Checkpoint, name: str) -> bool:
    """Whether both have the tensor, of one dtype and shape."""
    tensor, other = shards.tensors.get(name), source.tensors.get(name)
    return tensor is not None and other is not None and (tensor.dtype, tensor.shape) == (other.dtype, other.shape)


def same_tensors(shards: Checkpoint, source: Checkpoint) -> bool:
    """Whether the two have the same tensors, of the same dtypes and shapes."""
    return all(comparable(shards, source, name) for name in {*shards.tensors, *source.tensors})


class _Comparison:
    """One tensor: the whole read slab by slab, and every rank's own bytes beside it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensor: Stored,
        whole: Stored,
        own: SourceFiles,
        other: SourceFiles,
        ranks: Collection[int],
        counted: Stored,
    ) -> None:
        self.ranks, self.counted = ranks, counted
        assert checkpoint.manifest is not None
        self.tensor, self.whole, self.own, self.other = tensor, whole, own, other
        self.bits = DTYPE_BITS[tensor.dtype]
        self.new_hasher = hasher_factory(TENSORS)
        self.hashers: list[Hasher] = [self.new_hasher() for _ in range(checkpoint.ranks)]
        self.findings: dict[int, Finding] = {}
        self.rooms = Rooms()

    def run(self, against_source: bool) -> list[Finding]:
        lost = _unheld(self.tensor)
        if lost and not against_source:
            return lost  # there is no whole to compare with
        try:
            transfer = plan(self.whole.layout, self.tensor.layout, self.bits)
        except InputError as error:
            return [Finding(error.message, tensor=self.tensor.name)]
        general = [*lost, *_row_overlap(self.counted)] if 0 in self.ranks else []
        hasher = self.new_hasher()
        for slab in cut_into_slabs(transfer, SLAB):
            own = [contact for contact in slab.writes if contact.rank in self.ranks]
            if not own and 0 not in self.ranks:
                continue
            data = self.rooms.get(0, slab.size)
            self.other.fill([(self.whole, slab, 0)], data)
            hasher.update(data.data)
            for contact in own:
                self._compare(contact, data.reshape(slab.shape))
        for holding in transfer.writes:
            if holding.rank in self.ranks:
                self._finish(holding.rank)
        whole = self._digest_findings(hasher.hexdigest(), against_source) if 0 in self.ranks else []
        return [*general, *whole, *self.findings.values()]

    def _digest_findings(self, digest: str, against_source: bool) -> list[Finding]:
        record = self.tensor.record
        assert record is not None
        if digest == record.digest or not record.digest or (self.findings and not against_source):
            return []
        if against_source:
            return [Finding("the source's bytes are not those that were cut: its digest differs", tensor=record.name)]
        return [Finding(f"rebuilt, its digest is {digest}; the source's was {record.digest}", tensor=record.name)]

    def _compare(self, contact: Contact, slab: Bytes) -> None:
        rank, begin = contact.rank, contact.offset - contact.lead
        for offset in range(begin, contact.offset, SLAB):
            actual = self._read(rank, offset, min(SLAB, contact.offset - offset))
            if rank not in self.findings and actual.any():
                at = offset + int(np.flatnonzero(actual)[0])
                self._note(rank, f"padding at {self._element(rank, at)} is not zero")
        expected = contact.take(slab, self.rooms.get(1, contact.size))
        actual = self._read(rank, contact.offset, contact.size)
        if rank not in self.findings and not np.array_equal(actual, expected):
            at = int(np.flatnonzero(actual != expected)[0])
            width = max(1, self.bits // 8)
            first = at // width * width
            have, want = (part[first : first + width].tobytes()[::-1].hex() for part in (actual, expected))
            element = self._element(rank, contact.offset + at)
            self._note(rank, f"first bad element {element}: 0x{have}, want 0x{want}")

    def _read(self, rank: int, offset: int, count: int) -> Bytes:
        actual = self.rooms.get(2, count)
        self.own.read(self.tensor, rank, offset, actual)
        self.hashers[rank].update(actual.data)
        return actual

    def _finish(self, rank: int) -> None:
        record = self.tensor.record
        assert record is not None
        want, have = record.shard_digest(rank), self.hashers[rank].hexdigest()
        if record.digest and rank not in self.findings and want != have:
            self._note(rank, f"its own digest is {have}, the manifest says {want}")

    def _element(self, rank: int, byte: int) -> list[int]:
        """The index, in the rank's own tensor, of the element that holds one of its bytes."""
        shard = self.tensor.layout.shards[rank]
        assert shard is not None
        return [int(i) for i in np.unravel_index(byte * 8 // self.bits, shard.shape)]

    def _note(self, rank: int, what: str) -> None:
        self.findings[rank] = Finding(what, tensor=self.tensor.name, rank=rank)


def _unheld(tensor: Stored) -> list[Finding]:
    """Cells of the whole that no rank holds: comparing what the ranks do hold cannot miss them."""
    message = _hole(tensor.layout)
    return [Finding(message, tensor=tensor.name)] if message else []


@lru_cache(maxsize=1024)
def _hole(layout: Layout) -> str | None:
    try:
        layout.tiles()
    except InputError as error:
        return error.message
    return None


def _row_overlap(tensor: Stored) -> list[Finding]:
    """Cells of a row-cut tensor that two ranks hold: the sum after the layer would count them twice."""
    message = _overlap(tensor.layout) if tensor.role.rule == "row" else None
    return [Finding(message, tensor=printable(tensor.name))] if message else []


@lru_cache(maxsize=1024)
def _overlap(layout: Layout) -> str | None:
    cut = layout.cut_axes
    for axis in cut if len(cut) == 1 else ():
        for run, ranks in layout.owners(axis):
            if len(ranks) > 1:
                shown = " and ".join(map(str, ranks[:3]))
                return f"{run.start} along axis {axis} is held by ranks {shown}; a row layer adds them up"
    pieces = [(rank, piece.box) for rank, shard in enumerate(layout.shards) if shard for piece in shard.pieces()]
    for (one, box), (two, other) in itertools.combinations(pieces if len(cut) > 1 else (), 2):
        if one != two and (common := box.intersect(other)) is not None:
            return f"{list(common.start)} is held by ranks {one} and {two}; a row layer adds them up"
    return None
