"""Reading an engine's own settings: typed values, held against the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, printable
from tpshard.header import Entry
from tpshard.layout import Shape

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def whole(data: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """A count from a file. Raises InputError where it is none."""
    value = data.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: '{key}' is {printable(repr(value), 40)}, not a count")
    return value


def real(data: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """A number from a file. Raises InputError where it is none."""
    value = data.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: '{key}' is {printable(repr(value), 40)}, not a number")
    return value


def agree(path: Path, key: str, said: int, found: int, where: str) -> None:
    """Raises InputError where a file and the tensors say different things."""
    if said != found:
        hint = "is it another model's, or is a rank's file missing?"
        raise InputError(f"{path}: '{key}' is {said}, by {where} it is {found}", hint=hint)


def shape_of(entries: Mapping[str, Entry], name: str, dimensions: int, path: Path) -> Shape:
    """A tensor's shape on one rank. Raises InputError where it is not there, or of another kind."""
    entry = entries.get(name)
    if entry is None:
        raise InputError(f"{path}: tensor {name} is missing")
    if len(entry.shape) != dimensions:
        raise InputError(f"{path}: {name} is {list(entry.shape)}, {dimensions} dimensions expected")
    return entry.shape


def layers_in(ranks: Sequence[Mapping[str, Entry]], before: str) -> int:
    """How many layers there are, by the numbers in names."""
    names = (name.removeprefix(before) for rank in ranks for name in rank if name.startswith(before))
    return len({name.partition(".")[0] for name in names})
