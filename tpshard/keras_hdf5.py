"""What an HDF5 file as Keras writes it says it holds: where each variable lies, and what its groups are called.

Keras writes every variable as one contiguous run; other kinds of HDF5 storage are refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, UsageError, printable
from tpshard.header import MAX_DIMENSIONS, MAX_TENSORS, Entry, byte_count
from tpshard.layout import Shape
from tpshard.windows import Window

_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8",
    "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8", "|b1": "BOOL", "|V2": "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tables:
    """An HDF5 file's variables by their paths, and the attributes that say how they are called."""

    entries: Mapping[str, Entry]
    names: Mapping[str, str]  # of layers, by the path of their group
    weights: Mapping[str, Sequence[str]]  # of a legacy group's variables, in order
    order: Sequence[str]  # of a legacy file's layers
    config: bytes | None


@contextmanager
def _opened(path: Path, offset: int, size: int) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        hint = "pip install 'tpshard[keras]'"
        raise UsageError(f"{path}: is HDF5, and h5py is not installed", hint=hint) from None
    try:
        with path.open("rb") as file, h5py.File(_section(file, offset, size), "r") as opened:
            yield opened
    except FileNotFoundError:
        raise InputError(f"{path}: is not there") from None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        what = printable(" ".join(str(error).split()))
        raise InputError(f"{path}: cannot be read as HDF5: {what}", hint="is it damaged?") from None


def read_tables(path: Path, offset: int, size: int) -> Tables:
    """An HDF5 file that is ``size`` bytes of another, from ``offset``. Raises InputError, UsageError."""
    entries: dict[str, Entry] = {}
    names: dict[str, str] = {}
    weights: dict[str, Sequence[str]] = {}
    with _opened(path, offset, size) as file:

        def visit(key: str, item: Any) -> None:
            if len(entries) > MAX_TENSORS:
                raise InputError(f"{path}: more than {MAX_TENSORS} tensors in one file")
            if hasattr(item, "shape"):
                entry = _entry(path, key, item, offset)
                if entry is not None:
                    entries[key] = entry
            elif key.rpartition("/")[2] == "vars" and "name" in item.attrs:
                names[key.rpartition("/")[0]] = _text(item.attrs["name"])
            elif "weight_names" in item.attrs:
                weights[key] = [_text(name) for name in item.attrs["weight_names"]]

        file.visititems(visit)
        root = file.get("model_weights", file)
        order = [_text(name) for name in root.attrs.get("layer_names", ())]
        config = file.attrs.get("model_config")
    if not entries:
        raise InputError(f"{path}: holds no tensors")
    return Tables(entries, names, weights, order, _text(config).encode("utf-8") if config is not None else None)


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _entry(path: Path, key: str, dataset: Any, offset: int) -> Entry | None:
    """Where a variable lies. None for what is no tensor, such as texts: it is kept with the file."""
    where = f"{path}: {printable(key)}"
    if dataset.dtype.kind in "OSU" or dataset.shape is None:
        return None
    dtype = _DTYPES.get(dataset.dtype.str)
    if dtype is None:
        raise InputError(f"{where}: dtype {printable(dataset.dtype.str)} has no name in safetensors")
    shape: Shape = tuple(int(n) for n in dataset.shape)
    if len(shape) > MAX_DIMENSIONS or any(n >= 2**48 for n in shape):
        raise InputError(f"{where}: shape {list(shape)} is beyond any model")
    size = byte_count(dtype, shape)
    if dataset.chunks is not None or dataset.compression is not None:
        hint = "Keras writes them whole; save it with Keras again"
        raise InputError(f"{where}: is stored in chunks or compressed", hint=hint)
    if dataset.external or dataset.is_virtual:
        raise InputError(f"{where}: its numbers are in another file", hint="save it with Keras again")
    begin = dataset.id.get_offset()
    if begin is None and size:
        raise InputError(f"{where}: {size} bytes have no place in the file", hint="save it with Keras again")
    return Entry(dtype, shape, offset + (begin or 0) if size else 0, size)


def _section(file: io.BufferedReader, offset: int, size: int) -> Window:
    """Some bytes of a file, as a file."""

    def fill(at: int, room: memoryview) -> int:
        file.seek(offset + at)
        data = file.read(len(room))
        room[: len(data)] = data
        return len(data)

    return Window(size, fill)
