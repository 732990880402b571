"""Megatron-Core's torch_dist stores: a PyTorch distributed checkpoint of whole tensors, dealt out to ranks again.

Beside the store's own files there are ``metadata.json``, which names the backend, and mostly ``common.pt``, with what
is the same on all ranks. Layers are stacked along a first axis, experts along the next, unless the number stands in the
name; each chunk is what one rank had of one layer. The first matrix of a gated MLP has two chunks of each rank, of the
gate's rows and of the others': they become ``…weight_w`` and ``…weight_v``, as Megatron calls them where it stores them
apart. Layout as in megatron/core/dist_checkpointing and megatron/core/transformer/mlp.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tpshard.dcp import Chunked, Dcp
from tpshard.dcp_metadata import METADATA_NAME
from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import read_bytes, read_json
from tpshard.header import Entry, byte_count
from tpshard.layout import Box

BACKEND_FILE, BACKEND = "metadata.json", "torch_dist"
COMMON = "common.pt"
TRACKER = "latest_checkpointed_iteration.txt"
EXTRA = "._extra_state"  # of Transformer Engine: made again from the configuration
PREFIXES = ("", "module.", "model.")  # around the whole model, in stores of other trainers
EMBEDDING = "embedding.word_embeddings.weight"
_STACKED = re.compile(r"\b(?:layers|experts\.experts)\.(?![0-9])")
_MAYBE_GATED = re.compile(r"\blinear_fc1\.(?:weight|bias)$")

Own = dict[str, tuple[int, Entry]]  # a rank's tensors: index of the file, and where in it


class Piece(NamedTuple):
    """A box of one layer's tensor, and where its bytes begin."""

    box: Box
    file: int
    offset: int


class Single(NamedTuple):
    """A tensor of one layer (and one expert), in pieces."""

    name: str
    dtype: str
    pieces: list[Piece]

    @property
    def cut(self) -> list[int]:
        """The axes along which the pieces follow one another."""
        starts = list(zip(*(piece.box.start for piece in self.pieces), strict=True))
        return [axis for axis, found in enumerate(starts) if len(set(found)) > 1]


def is_torch_dist(folder: Path) -> bool:
    """By the file that names the backend."""
    if not (folder / METADATA_NAME).is_file() or not (folder / BACKEND_FILE).is_file():
        return False
    try:
        return read_json(folder / BACKEND_FILE).get("sharded_backend") == BACKEND
    except (InputError, StorageError):
        return False  # then it is any distributed checkpoint


def store_in(folder: Path) -> Path | None:
    """The store in a folder: itself, the only one right under it, or that of the iteration which the run's tracker
    names. Raises InputError where several are there and none is named."""
    if is_torch_dist(folder):
        return folder
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and is_torch_dist(path)]
    if len(found) < 2:
        return found[0] if found else None
    said = read_bytes(folder / TRACKER).decode("utf-8", "replace").strip() if (folder / TRACKER).is_file() else ""
    wanted = f"iter_{int(said):07}" if re.fullmatch("[0-9]{1,9}", said) else said
    for path in found:
        if path.name == wanted:
            return path
    names = f"{found[0].name} and {found[1].name}"
    raise InputError(f"{folder}: holds several stores: {names}", hint="give the folder of one of them")


def deal(dcp: Dcp) -> tuple[list[Own], list[str]]:
    """What each rank had when the store was written, and the names of what is left out. As many ranks as the embedding
    has parts, which is always cut; what is whole is on all of them. Raises InputError where the parts are no ranks'."""
    prefix = next((p for p in PREFIXES if p + EMBEDDING in dcp.tensors), None)
    if prefix is None:
        raise InputError(f"{dcp.folder}: has no {EMBEDDING}", hint="is it a language model of Megatron's?")
    ranks = len(dcp.tensors[prefix + EMBEDDING].parts)
    left = [name for name in dcp.objects if EXTRA not in name]
    singles: list[Single] = []
    for full, tensor in dcp.tensors.items():
        if full.startswith("optimizer.") or not full.startswith(prefix):
            left.append(full)
        else:
            singles += _singles(full.removeprefix(prefix), tensor, dcp.folder)
    dealt: list[Own] = [{} for _ in range(ranks)]
    for single in singles:
        for name, pieces in _of_ranks(single, ranks, dcp.folder).items():
            for own, piece in zip(dealt, pieces, strict=True):
                shape = piece.box.shape
                own[name] = piece.file, Entry(single.dtype, shape, piece.offset, byte_count(single.dtype, shape))
    return dealt, left


def _singles(name: str, tensor: Chunked, folder: Path) -> Iterator[Single]:
    """A stacked tensor's layers and experts."""
    places = list(_STACKED.finditer(name))
    count = len(places)
    if not tensor.parts or len(tensor.shape) < count:
        raise InputError(f"{folder}: {printable(name)}: is {list(tensor.shape)}, with no cells for each layer")
    found: dict[tuple[int, ...], list[Piece]] = {}
    for part in tensor.parts:
        if part.place.view is not None:
            raise InputError(f"{folder}: {printable(name)}: a part of it is not one run of bytes")
        start, stop = part.box.start, part.box.stop
        box = Box(start[count:], stop[count:])
        size = byte_count(tensor.dtype, box.shape)
        numbers = itertools.product(*(range(*ends) for ends in zip(start[:count], stop[:count], strict=True)))
        for index, number in enumerate(numbers):
            found.setdefault(number, []).append(Piece(box, part.place.file, part.place.offset + index * size))
    for number, pieces in sorted(found.items()):
        yield Single(_numbered(name, number), tensor.dtype, pieces)


def _numbered(name: str, numbers: Sequence[int]) -> str:
    """
    >>> _numbered("decoder.layers.mlp.experts.experts.linear_fc2.weight", (3, 1))
    'decoder.layers.3.mlp.experts.experts.1.linear_fc2.weight'
    """
    values = iter(numbers)
    return _STACKED.sub(lambda match: f"{match[0]}{next(values)}.", name)


def _of_ranks(single: Single, ranks: int, folder: Path) -> Mapping[str, Sequence[Piece]]:
    """A piece for each rank, under each of the names that it has there."""
    name, pieces = single.name, single.pieces
    if len(pieces) == 1:
        return {name: pieces * ranks}
    if len(single.cut) != 1:
        raise InputError(f"{folder}: {printable(name)}: is cut along {len(single.cut)} axes, not one")
    axis = single.cut[0]
    ordered = sorted(pieces, key=lambda piece: piece.box.start[axis])
    if len(pieces) == ranks:
        return {name: ordered}
    if _MAYBE_GATED.search(name) and axis == 0 and len(pieces) == 2 * ranks:
        gate, other = ordered[:ranks], ordered[ranks:]
        if [p.box.shape for p in gate] == [p.box.shape for p in other]:
            return {f"{name}_w": gate, f"{name}_v": other}
    what = f"is in {len(pieces)} parts, the embedding in {ranks}"
    raise InputError(
        f"{folder}: {printable(name)}: {what}", hint="experts cut for other ranks than the rest are not read"
    )
