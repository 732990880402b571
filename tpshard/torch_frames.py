"""A PyTorch file around its tensors, byte for byte as torch.save would lay it out: a zip of stored members.

Each tensor is a member of its own, its bytes begin at a multiple of 64 (so that they may be mapped), and checksums
follow it. They are known when the tensors are written: ``seal`` reads the file once more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tpshard.errors import InputError, printable
from tpshard.frames import Fixed, Frame, Tensor
from tpshard.layout import Shape
from tpshard.pickle_machine import Call, Global
from tpshard.pickle_writing import Persistent, pickled
from tpshard.pickles import ORDERED_DICT
from tpshard.torch_tensors import DTYPES, STORAGES, TENSOR_V2, TENSOR_V3

ARCHIVE = "archive"  # torch's own name where it has no file's
ALIGNMENT = 64
PIECE = 8 * 2**20  # bytes read at once for a checksum
MOST_IN_32 = 0xFFFFFFFF
_OF_SAFETENSORS = {name: dtype for dtype, (name, _) in DTYPES.items()}
_STORAGE_OF = {dtype: Global("torch", storage) for storage, dtype in STORAGES.items()}
_UNTYPED = Global("torch.storage", "UntypedStorage")
_LATER = 0x0808  # checksum and sizes follow the data; the name is UTF-8

Read = Callable[[int, int], bytes]


def torch_frame(tensors: Sequence[Tensor], metadata: Mapping[str, str], tree: object = None) -> Frame:
    """A file that torch.load reads, ``weights_only`` and ``mmap`` too. ``tree``: what it holds, with frames' Tensors
    among plain values and records; without it a dict of all tensors by name. The format has no place for ``metadata``.
    Raises InputError for a dtype that PyTorch has not, ValueError where the tree does not hold every tensor."""
    met: list[int] = []
    numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
    content = {tensor.name: tensor for tensor in tensors} if tree is None else tree
    data = pickled(content, partial(_rebuilt, numbers, met))
    order = list(dict.fromkeys(met))
    if len(numbers) != len(tensors) or sorted(order) != list(range(len(tensors))):
        raise ValueError(f"the tree holds {len(order)} of {len(tensors)} tensors, or two have one name")
    members = [_Plain("data.pkl", data)]
    if order == sorted(order):  # the promise that offsets can be computed from the sizes, met one after another
        members.append(_Plain(".format_version", b"1"))
    members += [_Plain(".storage_alignment", str(ALIGNMENT).encode()), _Plain("byteorder", b"little")]
    last = _Plain("version", b"3\n")
    return _laid_out([*members, *(_Data(f"data/{n}", t.size) for n, t in enumerate(tensors)), last])


def _rebuilt(numbers: Mapping[str, int], met: list[int], value: object) -> Call | None:
    """A tensor as the call that makes it from its storage."""
    if not isinstance(value, Tensor):
        return None
    dtype = _OF_SAFETENSORS.get(value.dtype)
    if dtype is None:
        raise InputError(f"{printable(value.name)}: PyTorch has no dtype {value.dtype}", hint="write safetensors")
    number = numbers[value.name]
    met.append(number)
    shape = value.shape
    if value.dtype == "F4":  # torch counts bytes, of two elements
        shape = (*shape[:-1], shape[-1] // 2)
    kind = _STORAGE_OF.get(dtype, _UNTYPED)
    elements = value.size if kind == _UNTYPED else value.size // DTYPES[dtype][1]
    storage = Persistent(("storage", kind, str(number), "cpu", elements))
    given = (storage, 0, shape, _strides(shape), False, Call(ORDERED_DICT, ()))
    if kind == _UNTYPED:
        return Call(TENSOR_V3, (*given, Global("torch", dtype)))
    return Call(TENSOR_V2, given)


def _strides(shape: Shape) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# ---------------------------------------------------------------------------------------------- the zip file


@dataclass(frozen=True, slots=True)
class _Plain:
    """A member whose bytes are known."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class _Data:
    """A tensor's member."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class _Placed:
    """A member with its place: of its local header, of its bytes; and where its checksum stands, in the descriptor
    after the data and in the directory."""

    member: _Plain | _Data
    begin: int
    start: int
    crc: int = 0

    @property
    def wide(self) -> bool:
        """Whether size or place needs 64 bits."""
        return self.member.size >= MOST_IN_32 or self.begin >= MOST_IN_32

    @property
    def name(self) -> bytes:
        return f"{ARCHIVE}/{self.member.name}".encode()

    @property
    def numbers(self) -> bytes:
        """Those that do not fit 32 bits, as an extra field."""
        size, begin = self.member.size, self.begin
        wide = struct.pack("<QQ", size, size) if size >= MOST_IN_32 else b""
        wide += struct.pack("<Q", begin) if begin >= MOST_IN_32 else b""
        return struct.pack("<HH", 1, len(wide)) + wide if wide else b""

    def local(self) -> bytes:
        """The header, up to the data: a field of Z fills the room."""
        room = self.start - self.begin - 30 - len(self.name) - len(self.numbers)
        extra = self.numbers + b"FB" + struct.pack("<H", room - 4) + b"Z" * (room - 4)
        flags = _LATER if self.member.size else 0x0800
        fields = (b"PK\x03\x04", 45 if self.wide else 20, flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return struct.pack("<4sHHHHHIIIHH", *fields) + self.name + extra

    def descriptor(self) -> bytes:
        if not self.member.size:
            return b""
        return struct.pack("<4sIQQ" if self.wide else "<4sIII", b"PK\x07\x08", self.crc, *[self.member.size] * 2)

    def central(self) -> bytes:
        size, begin = min(self.member.size, MOST_IN_32), min(self.begin, MOST_IN_32)
        flags = _LATER if self.member.size else 0x0800
        version = 45 if self.wide else 20
        fields = (b"PK\x01\x02", version, version, flags, 0, 0, 0, self.crc, size, size, len(self.name))
        more = (len(self.numbers), 0, 0, 0, 0, begin)
        return struct.pack("<4sHHHHHHIIIHHHHHII", *fields, *more) + self.name + self.numbers


def _place(member: _Plain | _Data, begin: int) -> _Placed:
    """With the least room before its data that makes them begin at a multiple of ALIGNMENT, and a field's header."""
    draft = _Placed(member, begin, 0, zlib.crc32(member.data) if isinstance(member, _Plain) else 0)
    least = begin + 30 + len(draft.name) + len(draft.numbers) + 4
    return _Placed(member, begin, least + -least % ALIGNMENT, draft.crc)


def _laid_out(members: Sequence[_Plain | _Data]) -> Frame:
    fixed: list[Fixed] = []
    pending, begin = bytearray(), 0  # bytes not yet in ``fixed``, and where they begin
    placed: list[_Placed] = []
    for member in members:
        own = _place(member, begin + len(pending))
        placed.append(own)
        pending += own.local()
        if isinstance(member, _Plain):
            pending += member.data
        else:
            fixed.append((begin, bytes(pending)))
            begin, pending = own.start + member.size, bytearray()
        pending += own.descriptor()
    directory = begin + len(pending)
    checksums: list[int] = []
    for own in placed:
        checksums.append(begin + len(pending) + 16)
        pending += own.central()
    pending += _end(directory, begin + len(pending) - directory, len(placed))
    fixed.append((begin, bytes(pending)))
    tensors = [(own, at) for own, at in zip(placed, checksums, strict=True) if isinstance(own.member, _Data)]
    starts = tuple(own.start for own, _ in tensors)
    return Frame(tuple(fixed), starts, begin + len(pending), partial(_checksums, tensors))


def _end(begin: int, size: int, count: int) -> bytes:
    """The directory's end; always in 64 bits too, as torch writes it."""
    end = begin + size
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, begin)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    few = min(count, 0xFFFF)
    least = (few, few, min(size, MOST_IN_32), min(begin, MOST_IN_32), 0)
    return wide + locator + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *least)


def _checksums(tensors: Sequence[tuple[_Placed, int]], read: Read) -> Iterator[Fixed]:
    """Each tensor's CRC-32, behind its data and in the directory."""
    for own, directory in tensors:
        crc, end = 0, own.start + own.member.size
        for offset in range(own.start, end, PIECE):
            crc = zlib.crc32(read(offset, min(PIECE, end - offset)), crc)
        packed = struct.pack("<I", crc)
        if own.member.size:
            yield end + 4, packed
        yield directory, packed
