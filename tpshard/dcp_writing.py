"""Distributed checkpoints of PyTorch written: each rank's file holds the boxes of the whole that it has, no cell twice.

A rank's own tensor may be several boxes (fused parts) with padding at the end, and ranks may hold copies: none of this
is known to the format. So a plan for it has a rank for each box (chunks.stored_once), and each says which file it goes
to. Any number of ranks in any arrangement can then load it, since PyTorch takes from the boxes what it needs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tpshard.checkpoint import Checkpoint
from tpshard.chunks import box_of, stored_once
from tpshard.dcp_metadata import (
    CHUNK,
    INDEX,
    MEMORY_FORMAT,
    METADATA,
    METADATA_NAME,
    PROPERTIES,
    SAVED_OFFSETS,
    SHARDING_INFO,
    SIZE,
    STORAGE_INFO,
    STORAGE_META,
    TENSOR,
    Chunk,
    Described,
    Extent,
)
from tpshard.errors import InputError, printable
from tpshard.frames import Fixed, Frame, Tensor, safetensors_frame
from tpshard.header import DTYPE_ORDER
from tpshard.layout import Layout, Shape
from tpshard.pickle_machine import Call, Global
from tpshard.pickle_writing import pickled
from tpshard.plan import Item, Output, Plan, Targets
from tpshard.torch_frames import torch_frame
from tpshard.torch_tensors import DTYPES

_TORCH = {name: dtype for dtype, (name, _) in DTYPES.items()}


# ---------------------------------------------------------------------------------------------- bytes


def distcp_frame(items: Sequence[Tensor]) -> Frame:
    """A ``.distcp`` file: for each tensor a whole file of torch.save that holds it alone, one after another."""
    frames = [torch_frame([item], {}, item) for item in items]
    begins = [0, *itertools.accumulate(frame.size for frame in frames)]
    fixed = tuple((at + begin, data) for frame, begin in zip(frames, begins, strict=False) for at, data in frame.fixed)
    starts = tuple(begin + frame.starts[0] for frame, begin in zip(frames, begins, strict=False))
    return Frame(fixed, starts, begins[-1], partial(_sealed, frames, begins))


def distcp_extents(file: str, items: Sequence[Tensor]) -> list[Extent]:
    """Where each tensor's file of torch.save lies in ``distcp_frame(items)``."""
    sizes = [torch_frame([item], {}, item).size for item in items]
    begins = itertools.accumulate(sizes, initial=0)
    return [Extent(file, begin, size) for begin, size in zip(begins, sizes, strict=False)]


def _sealed(frames: Sequence[Frame], begins: Sequence[int], read: Callable[[int, int], bytes]) -> Iterator[Fixed]:
    for frame, begin in zip(frames, begins, strict=False):

        def own(offset: int, count: int, begin: int = begin) -> bytes:
            return read(begin + offset, count)

        yield from ((begin + at, data) for at, data in frame.seal(own))


def metadata_bytes(tensors: Mapping[str, Described]) -> bytes:
    """``.metadata``: what PyTorch's FileSystemReader unpickles. Same tensors, same bytes."""
    described, stored = {}, {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _TORCH:
            raise InputError(f"{printable(name)}: PyTorch has no dtype {tensor.dtype}", hint="write dcp-hf")
        chunks = []
        for number, chunk in enumerate(tensor.chunks):
            offsets = _size(tensor.dtype, chunk.box.start)
            fields = {"offsets": offsets, "sizes": _size(tensor.dtype, chunk.box.shape)}
            chunks.append(Call(CHUNK, (), fields))
            index = Call(INDEX, (), {"fqn": name, "offset": offsets, "index": number})
            extent = chunk.extent
            where = {"relative_path": extent.file, "offset": extent.offset, "length": extent.length}
            stored[index] = Call(STORAGE_INFO, (), where)
        dtype, strided = Global("torch", _TORCH[tensor.dtype]), Global("torch.serialization", "_get_layout")
        flags = (dtype, Call(strided, ("torch.strided",)), False, Call(MEMORY_FORMAT, (0,)), False)
        own = {
            "properties": Call(PROPERTIES, (), flags), "size": _size(tensor.dtype, tensor.shape), "chunks": chunks,
        }  # fmt: skip
        described[name] = Call(TENSOR, (), own)
    meta = Call(STORAGE_META, (), {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []})
    top = {
        "state_dict_metadata": described,
        "planner_data": {name: (name,) for name in tensors},
        "storage_data": stored,
        "storage_meta": meta,
        "version": "1.0.0",
    }
    return pickled(Call(METADATA, (), top))


def _size(dtype: str, shape: Shape) -> Call:
    if dtype == "F4" and shape:  # torch counts bytes, of two elements
        if shape[-1] % 2:
            raise InputError(f"a cut at element {shape[-1]} of the last axis falls inside a byte (4 bits an element)")
        shape = (*shape[:-1], shape[-1] // 2)
    return Call(SIZE, (shape,))


def sharding_info(offsets: Mapping[str, Shape]) -> dict[str, str]:
    """The metadata of a safetensors file whose tensors begin there in the whole."""
    said = {name: {SAVED_OFFSETS: list(offset)} for name, offset in offsets.items()}
    return {"DCP_VERSION": "1.0", SHARDING_INFO: json.dumps(said, ensure_ascii=False), "format": "pt"}


# ---------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True, slots=True)
class _Boxes:
    """How items lie in the files. ``files``: for each item, by its name, the number of each box's file. A file's
    number is its place among the outputs, and their ``rank``."""

    files: Mapping[str, tuple[int, ...]]

    @property
    def in_order(self) -> bool:
        return False

    def held(self, items: Iterable[Item], file: int) -> list[tuple[Item, Chunk]]:
        """The boxes of one file, in its order; where they lie is not said."""
        return [
            (item, Chunk(box_of(shard), Extent("", 0, 0)))
            for item in items
            for shard, own in zip(item.want.shards, self.files[item.stored.name], strict=False)
            if own == file and shard is not None
        ]

    def tensors(self, plan: Plan, output: Output) -> list[Tensor]:
        held = self.held(plan.items[output.first : output.last], output.rank)
        return [Tensor(item.stored.name, item.stored.dtype, chunk.box.shape) for item, chunk in held]

    def targets(self, plan: Plan, outputs: Sequence[Output], frames: Sequence[Frame | None]) -> Iterator[Targets]:
        starts = [iter(frame.starts) if frame else itertools.repeat(0) for frame in frames]
        for item in plan.items[outputs[0].first : outputs[0].last]:
            files = self.files[item.stored.name]
            yield Targets(tuple(next(starts[file]) for file in files), None, files)


@dataclass(frozen=True, slots=True)
class InDistcp(_Boxes):
    """Files of torch.save in ``.distcp`` files; ``.metadata`` is written beside them."""

    def frame(self, plan: Plan, output: Output) -> Frame:
        return distcp_frame(self.tensors(plan, output))

    def beside(self, plan: Plan) -> dict[str, bytes]:
        """Files with nothing of the tensors in them."""
        chunks: dict[str, list[Chunk]] = {item.stored.name: [] for item in plan.items}
        for output in plan.outputs:
            held = self.held(plan.items[output.first : output.last], output.rank)
            extents = distcp_extents(output.name, self.tensors(plan, output))
            for (item, chunk), extent in zip(held, extents, strict=True):
                chunks[item.stored.name].append(replace(chunk, extent=extent))
        said = {
            i.stored.name: Described(i.stored.dtype, i.want.shape, tuple(chunks[i.stored.name])) for i in plan.items
        }
        return {METADATA_NAME: metadata_bytes(said)}


@dataclass(frozen=True, slots=True)
class InSafetensors(_Boxes):
    """Safetensors files that say where their tensors begin in the whole."""

    def frame(self, plan: Plan, output: Output) -> Frame:
        held = self.held(plan.items[output.first : output.last], output.rank)
        offsets = {item.stored.name: chunk.box.start for item, chunk in held}
        return safetensors_frame(self.tensors(plan, output), sharding_info(offsets))

    def beside(self, plan: Plan) -> dict[str, bytes]:
        return {}


def plan_distcp(source: Checkpoint, layouts: Mapping[str, Layout], ranks: int) -> Plan:
    """``__{rank}_0.distcp`` for each rank. ``layouts``: each tensor's, over ``ranks`` ranks."""
    files = {name: stored_once(layout)[1] for name, layout in layouts.items()}
    return _plan(source, layouts, [f"__{rank}_0.distcp" for rank in range(ranks)], InDistcp(files))


def plan_dcp_safetensors(source: Checkpoint, layouts: Mapping[str, Layout], ranks: int) -> Plan:
    """``shard-{rank + 1}-model-{n}-of-{most}.safetensors``: a rank has as many files as the tensor that it holds in
    most boxes, since a file has one tensor of a name."""
    places = {name: _with_turns(stored_once(layout)[1]) for name, layout in layouts.items()}
    keys = sorted({place for own in places.values() for place in own})
    number = {key: index for index, key in enumerate(keys)}
    most = max((turn for _, turn in keys), default=0) + 1
    names = [f"shard-{rank + 1:05d}-model-{turn + 1:05d}-of-{most:05d}.safetensors" for rank, turn in keys]
    files = {name: tuple(number[place] for place in own) for name, own in places.items()}
    return _plan(source, layouts, names, InSafetensors(files))


def _with_turns(owners: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each box's owner, and how many boxes of the tensor it has before.

    >>> _with_turns((0, 0, 1))
    [(0, 0), (0, 1), (1, 0)]
    """
    return [(owner, owners[:index].count(owner)) for index, owner in enumerate(owners)]


def _plan(
    source: Checkpoint, layouts: Mapping[str, Layout], names: Sequence[str], arrangement: InDistcp | InSafetensors
) -> Plan:
    most = max((len(files) for files in arrangement.files.values()), default=1)
    items = []
    for name in sorted(layouts, key=lambda name: (DTYPE_ORDER[source.tensors[name].dtype], name)):
        boxes = stored_once(layouts[name])[0]
        padded = Layout(boxes.shape, (*boxes.shards, *(None,) * (most - boxes.ranks)))
        items.append(Item(source.tensors[name], padded))
    outputs = tuple(Output(name, number, 0, 0, len(items)) for number, name in enumerate(names))
    return Plan(source, tuple(items), outputs, most, arrangement)
