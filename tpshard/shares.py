"""A plan dealt to several processes, and their results put together."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tpshard.journal import Portion
from tpshard.layout import Layout
from tpshard.manifest import FileRecord
from tpshard.plan import Item, Output, Plan, bytes_of_ranks
from tpshard.share import Share, Written

Lot = tuple[frozenset[str], frozenset[int]]  # the outputs and wholes of a Share


def deal(plan: Plan, done: Iterable[Portion], count: int) -> list[Lot]:
    """What is left to do, for ``count`` processes: the same bytes for each, as near as whole files allow.

    A process gets files that follow one another in the plan. So most of what it reads nobody else reads: the files of
    one part hold the same tensors, and only its first and last part are another's, too. The digest of a whole tensor is
    one process's to take, since it needs the whole tensor to be read.
    """
    finished = {file.name for portion in done for file in portion.files}
    taken = {p.first + n for p in done for n, digest in enumerate(p.digests) if digest}
    owners = _owners(plan, finished, count)
    wholes: list[set[int]] = [set() for _ in range(count)]
    for outputs in plan.parts():
        own = {output.rank: owners[output.name] for output in outputs if output.name in owners}
        turns: dict[int, Iterator[int]] = {}
        for index in range(outputs[0].first, outputs[0].last) if own else ():
            if index not in taken:
                layout = plan.items[index].want
                if id(layout) not in turns:
                    turns[id(layout)] = itertools.cycle(_readers(layout, own))
                wholes[next(turns[id(layout)])].add(index)
    files = [frozenset(name for name, owner in owners.items() if owner == number) for number in range(count)]
    return [(names, frozenset(items)) for names, items in zip(files, wholes, strict=True)]


def _owners(plan: Plan, finished: Iterable[str], count: int) -> dict[str, int]:
    """The process of each file that is not finished: all files in a row, cut into equal lengths."""
    left = [(name, size) for name, size in output_sizes(plan).items() if name not in finished]
    total, so_far, owners = sum(size for _, size in left), 0, {}
    for name, size in left:
        owners[name] = min(count - 1, (2 * so_far + size) * count // (2 * total)) if total else 0
        so_far += size
    return owners


def output_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of each output's tensors. Where ranks are not files, all of a part count the same."""
    sizes: dict[str, int] = {}
    for outputs in plan.parts():
        own = [sum(of_rank) for of_rank in zip(*bytes_of_ranks(_items(plan, outputs)), strict=True)]
        if len(own) == len(outputs):
            sizes |= {output.name: size for output, size in zip(outputs, own, strict=True)}
        else:
            sizes |= {output.name: sum(own) // len(outputs) for output in outputs}
    return sizes


def _items(plan: Plan, outputs: Sequence[Output]) -> Sequence[Item]:
    return plan.items[outputs[0].first : outputs[0].last]


def _readers(layout: Layout, owners: Mapping[int, int]) -> list[int]:
    """The processes that read some of a tensor anyway, else all that have a file of its part."""
    holding = (p for rank, p in owners.items() if rank < layout.ranks and layout.shards[rank] is not None)
    return list(dict.fromkeys(holding)) or list(dict.fromkeys(owners.values()))


def usable(plan: Plan, portions: Iterable[Portion], sound: Callable[[FileRecord], bool]) -> list[Portion]:
    """Those whose files are all as recorded, once each; of a part with nothing left to write, all digests or none."""
    kept: list[Portion] = []
    names: set[str] = set()
    for portion in portions:
        own = {file.name for file in portion.files}
        if not own & names and all(map(sound, portion.files)):
            kept.append(portion)
            names |= own
    for outputs in plan.parts():
        if all(output.name in names for output in outputs):
            found = {p.first + n for p in kept for n, digest in enumerate(p.digests) if digest}
            if not found.issuperset(range(outputs[0].first, outputs[0].last)):
                kept = [p for p in kept if p.files[0].part != outputs[0].part]
    return kept


def joined(plan: Plan, portions: Sequence[Portion]) -> Written:
    """All portions as one run would have written them."""
    digests = [""] * len(plan.items)
    shards: list[tuple[str | None, ...]] = [()] * len(plan.items)
    for portion in portions:
        for index, (digest, own) in enumerate(zip(portion.digests, portion.shards, strict=True), start=portion.first):
            digests[index] = digest or digests[index]
            shards[index] = tuple(a or b for a, b in itertools.zip_longest(shards[index], own))
    files = {file.name: file for portion in portions for file in portion.files}
    records = tuple(files[output.name] for output in plan.outputs if output.name in files)
    return Written(records, tuple(digests), tuple(shards))


class Collector:
    """Makes portions of files as they are finished: those of one part that are a share's."""

    def __init__(self, plan: Plan, share: Share) -> None:
        self._open: dict[int, tuple[Output, int, list[FileRecord]]] = {}
        for output in plan.outputs:
            if output.name in share.outputs:
                first, count, records = self._open.get(output.part, (output, 0, []))
                self._open[output.part] = first, count + 1, records
        self._lock = threading.Lock()

    def add(
        self, record: FileRecord, digests: Sequence[str], shards: Sequence[tuple[str | None, ...]]
    ) -> Portion | None:
        """A finished file; the portion that it completes. ``digests``, ``shards``: of all items, those of the file's
        part are known."""
        with self._lock:
            output, count, records = self._open[record.part]
            records.append(record)
            if len(records) < count:
                return None
        items = slice(output.first, output.last)
        files = tuple(sorted(records, key=lambda file: file.rank))
        return Portion(files, output.first, tuple(digests[items]), tuple(shards[items]))
