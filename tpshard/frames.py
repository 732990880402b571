"""An output file around its tensors: whatever bytes its format puts before, between and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tpshard.header import byte_count, header_bytes
from tpshard.layout import Shape

Fixed = tuple[int, bytes]  # place in the file, bytes


def nothing(read: Callable[[int, int], bytes]) -> Iterable[Fixed]:
    return ()


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file, as its format has it: an engine's, with the rank's own shape. ``constant``: its bytes,
    where they come from no checkpoint."""

    name: str
    dtype: str
    shape: Shape
    constant: bytes | None = None

    @property
    def size(self) -> int:
        return byte_count(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Frame:
    """``fixed``: bytes known beforehand, in ascending order; ``starts``: where each tensor begins; ``size``: of the
    whole file, in bytes. ``seal``: given a function that reads ``(offset, count)`` of the written file, the bytes that
    depend on the tensors, such as checksums; their places lie within ``fixed``."""

    fixed: tuple[Fixed, ...]
    starts: tuple[int, ...]
    size: int
    seal: Callable[[Callable[[int, int], bytes]], Iterable[Fixed]] = field(default=nothing)

    @property
    def head(self) -> bytes:
        """What comes before the first tensor."""
        return self.fixed[0][1] if self.fixed and self.fixed[0][0] == 0 else b""


Framer = Callable[[Sequence[Tensor], Mapping[str, str]], Frame]


def safetensors_frame(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Frame:
    """A safetensors file with the tensors in the given order."""
    head = header_bytes(((t.name, t.dtype, t.shape) for t in tensors), metadata)
    starts, end = [], len(head)
    for tensor in tensors:
        starts.append(end)
        end += tensor.size
    return Frame(((0, head),), tuple(starts), end)
