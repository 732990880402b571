"""PyTorch files for tests: written by torch, or made from opcodes; and a reader of entries by NumPy."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tpshard.frames import Frame
from tpshard.header import Entry

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def a_tensor(dtype: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Random bytes as a tensor, of BOOL 0 and 1."""
    if 0 in shape:
        return torch.zeros(tuple(shape), dtype=DTYPES[dtype])
    width = DTYPES[dtype].itemsize
    top = 2 if dtype == "BOOL" else 256
    raw = np.random.default_rng([seed, *shape]).integers(0, top, math.prod(shape) * width, np.uint8)
    return torch.from_numpy(raw).view(DTYPES[dtype]).reshape(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's own bytes in C order."""
    flat = tensor.new_empty(tensor.numel(), requires_grad=False).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def read_entry(content: bytes, entry: Entry) -> bytes:
    """A tensor's bytes from the file's, by NumPy's strides."""
    raw = np.frombuffer(content, np.uint8)
    if entry.view is None:
        return raw[entry.offset : entry.offset + entry.size].tobytes()
    return np.ndarray(entry.view.shape, np.uint8, raw, entry.offset, entry.view.strides).tobytes()


def same(path: Path, entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> None:
    """Entries must be those tensors, in names, dtypes, shapes and bytes."""
    assert set(entries) == set(tensors)
    content = path.read_bytes()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert DTYPES[entry.dtype] == tensor.dtype, name
        assert entry.shape == tuple(tensor.shape), name
        assert read_entry(content, entry) == bytes_of(tensor), name


def zip_of(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file by Python's writer."""
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w", method) as file:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            file.writestr(name, data)
    return room.getvalue()


def torch_zip(pickle: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """A file as torch.save lays it out, around a pickle of any kind."""
    data = {f"x/data/{key}": raw for key, raw in (storages or {"0": bytes(48)}).items()}
    return zip_of({"x/data.pkl": pickle, "x/byteorder": b"little", "x/version": b"3\n", **data, **more})


def write_frame(path: Path, frame: Frame, data: Sequence[bytes]) -> None:
    """What the executor does with a frame."""
    raw = bytearray(frame.size)
    for place, fixed in frame.fixed:
        raw[place : place + len(fixed)] = fixed
    for place, own in zip(frame.starts, data, strict=True):
        raw[place : place + len(own)] = own
    written = bytes(raw)
    for place, patch in frame.seal(lambda offset, count: written[offset : offset + count]):
        raw[place : place + len(patch)] = patch
    path.write_bytes(raw)


def loaded(path: Path, **options: Any) -> Any:
    """By torch, which must agree with the tensors mapped and read."""
    return torch.load(path, weights_only=True, mmap=True, **options)
