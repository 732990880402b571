"""DeepSpeed's own record of who holds what (universal_checkpoint_info, version 0.4), as layouts.

It lists, for every parameter and rank, pieces with an offset and strides in the whole and in the rank's own tensor,
counted in elements. The parameter's name stands as a regular expression that reads it alone; it is looked up as text,
since nobody should run a file's expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from tpshard.engines.readers.pieces import shard_of
from tpshard.errors import InputError, printable
from tpshard.layout import Box, Layout, Piece, Shape

VERSION = 1


class Record:
    """The record of one file. Raises InputError where it is of another version."""

    def __init__(self, info: object, where: str) -> None:
        self._where = where
        given = info.get("affine_map") if isinstance(info, dict) else None
        found = given.get("params") if isinstance(given, dict) else None
        if isinstance(given, dict) and given.get("version") != VERSION:
            shown = printable(str(given.get("version")), 20)
            raise InputError(f"{where}: affine_map has version {shown}, {VERSION} is read")
        self._entries: Mapping[Any, Any] = found if isinstance(found, dict) else {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def layout(self, name: str, ranks: int) -> Layout | None:
        """None where nothing is recorded of the tensor. Raises InputError where it is no cut."""
        entry = self._entries.get(f"^{re.escape(name)}$")
        if entry is None:
            return None
        try:
            whole = _counts(entry["logical_shape"])
            of_ranks = {int(rank): value for rank, value in entry["ranks"].items()}
            if set(of_ranks) != set(range(ranks)):
                raise ValueError(f"it is of the ranks {sorted(of_ranks)}, there are {ranks}")
            shards = []
            for rank in range(ranks):
                own = _counts(of_ranks[rank]["shard_shape"])
                shards.append(shard_of(own, [_piece(piece, whole, own) for piece in of_ranks[rank]["pieces"]]))
            return Layout(whole, tuple(shards))
        except (KeyError, TypeError, AttributeError):
            self._fail(name, "a field is missing or of another kind")
        except ValueError as error:
            self._fail(name, str(error))

    def _fail(self, name: str, why: str) -> NoReturn:
        raise InputError(f"{self._where}: affine_map of {printable(name)} is not understood: {printable(why)}")


def _piece(given: Mapping[str, Any], whole: Shape, own: Shape) -> Piece:
    if given.get("scale", 1) != 1:
        raise ValueError(f"ranks hold it multiplied by {given['scale']}; tpshard copies numbers, it does not compute")
    shape = _counts(given["shape"])
    start, at = (_corner(given[side], shape, of) for side, of in (("source", whole), ("dest", own)))
    stop = tuple(a + n for a, n in zip(start, shape, strict=True))
    return Piece(Box(start, stop), at)


def _corner(given: Any, shape: Shape, of: Shape) -> Shape:
    """Where a piece begins in a tensor of shape ``of``, from [offset, strides]."""
    offset, strides = given
    wanted = tuple(_strides(of))
    if _counts(strides) != wanted or type(offset) is not int or offset < 0 or len(shape) != len(of):
        raise ValueError(f"a piece has strides {strides}, a tensor of {list(of)} has {list(wanted)}")
    corner = []
    for stride in wanted:
        corner.append(offset // stride)
        offset %= stride
    if any(a + n > size for a, n, size in zip(corner, shape, of, strict=True)):
        raise ValueError(f"a piece of {list(shape)} at {corner} ends after {list(of)}")
    return tuple(corner)


def _strides(shape: Shape) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(1, shape[axis])
    return strides


def _counts(values: Any) -> Shape:
    if not isinstance(values, list | tuple) or not all(type(n) is int and 0 <= n < 2**48 for n in values):
        raise ValueError(f"{values} are no counts")
    return tuple(values)
