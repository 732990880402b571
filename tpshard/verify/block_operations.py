"""Views of a BlockTensor, which are BlockTensors, and what leaves its numbers as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tpshard.verify.block_tensor import BlockTensor, Reached, register


def _selected(self: BlockTensor, dim: int, index: int) -> BlockTensor:
    dim = dim % self.ndim
    if not -self.shape[dim] <= index < self.shape[dim]:
        raise IndexError(f"{self.key}: index {index} is out of range of {self.shape[dim]}")
    index %= self.shape[dim]
    parts = (block.narrow(dim, index, index + 1) for block in self.blocks)
    shape = [n for axis, n in enumerate(self.shape) if axis != dim]
    made = self.derived(shape, (part.dropped(dim) for part in parts if part), ("select", dim, index))
    if self.ndim == 3 and dim == 0:
        self.context.reached.setdefault(self.key, Reached(len(self), set()))
        made.number = index
    return made


def _narrowed(self: BlockTensor, dim: int, start: int, stop: int) -> BlockTensor:
    dim = dim % self.ndim
    parts = (block.narrow(dim, start, stop) for block in self.blocks)
    shape = [*self.shape[:dim], stop - start, *self.shape[dim + 1 :]]
    return self.derived(shape, (part.moved(dim, -start) for part in parts if part), ("narrow", dim, start, stop))


def _transposed(self: BlockTensor, dim0: int, dim1: int) -> BlockTensor:
    order = list(range(self.ndim))
    a, b = dim0 % self.ndim, dim1 % self.ndim
    order[a], order[b] = order[b], order[a]
    return _permuted(self, order)


def _permuted(self: BlockTensor, order: Sequence[int]) -> BlockTensor:
    order = [axis % self.ndim for axis in order]
    shape = [self.shape[axis] for axis in order]
    return self.derived(shape, (block.permuted(order) for block in self.blocks), ("permute", *order))


def _viewed(self: BlockTensor, *shape: Any) -> Any:
    """As a stack, where the first axis is matrices one after another; torch's own view of anything else."""
    wanted = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    if not all(isinstance(n, int) for n in wanted) or self.ndim != 2 or len(wanted) != 3:
        return NotImplemented
    _, rows, columns = wanted
    count = self.shape[0] // rows if rows > 0 else 0
    if wanted[0] not in (-1, count) or (count * rows, columns) != tuple(self.shape):
        return NotImplemented
    blocks = []
    for block in self.blocks:
        for number in range(block.box.start[0] // rows, -(-block.box.stop[0] // rows)):
            part = block.narrow(0, number * rows, (number + 1) * rows)
            if part is not None:
                blocks.append(part.moved(0, -number * rows).inserted(0, number))
    return self.derived((count, rows, columns), blocks, ("view", count, rows, columns))


def _item(self: Any, index: Any) -> Any:
    if not isinstance(self, BlockTensor):
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype in (torch.int64, torch.int32):
        index = int(index)
    if isinstance(index, int) and not isinstance(index, bool) and self.ndim:
        return _selected(self, 0, index)
    if isinstance(index, slice) and index.step in (None, 1) and self.ndim:
        start, stop, _ = index.indices(self.shape[0])
        return _narrowed(self, 0, start, max(start, stop))
    return NotImplemented


def _split(tensor: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    if not isinstance(tensor, BlockTensor):
        return NotImplemented
    size = tensor.shape[dim]
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, size - first) for first in range(0, size, sizes)]
    edges = list(itertools.accumulate(sizes, initial=0))
    if edges[-1] != size:
        return NotImplemented  # torch says what is wrong
    return tuple(_narrowed(tensor, dim, a, b) for a, b in itertools.pairwise(edges))


def _chunk(input: Any, chunks: int, dim: int = 0) -> Any:
    return _split(input, -(-input.shape[dim] // chunks), dim)


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    if not all(isinstance(tensor, BlockTensor) for tensor in tensors):
        return NotImplemented
    first, at, blocks = tensors[0], 0, []
    dim = dim % first.ndim
    if len({tuple(n for axis, n in enumerate(tensor.shape) if axis != dim) for tensor in tensors}) != 1:
        return NotImplemented
    for tensor in tensors:
        blocks += [block.moved(dim, at) for block in tensor.blocks]
        at += tensor.shape[dim]
    shape = [*first.shape[:dim], at, *first.shape[dim + 1 :]]
    return first.derived(shape, blocks, ("cat", dim, *_origins(tensors)))


def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    if not all(isinstance(tensor, BlockTensor) and tensor.shape == tensors[0].shape for tensor in tensors):
        return NotImplemented
    first = tensors[0]
    dim = dim % (first.ndim + 1)
    blocks = [block.inserted(dim, n) for n, tensor in enumerate(tensors) for block in tensor.blocks]
    shape = [*first.shape[:dim], len(tensors), *first.shape[dim:]]
    return first.derived(shape, blocks, ("stack", dim, *_origins(tensors)))


def _origins(tensors: Sequence[BlockTensor]) -> list[object]:
    """What was joined: two joins that begin with one parameter are not the same."""
    return [(tensor.key, tensor.view_) for tensor in tensors]


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    """All numbers have one device, and are never written to."""
    return self if isinstance(self, BlockTensor) else NotImplemented


def _detached(self: Any) -> Any:
    return self.detached() if isinstance(self, BlockTensor) else NotImplemented


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype | torch.Tensor)]
    return _as_dtype(self, next((value if isinstance(value, torch.dtype) else value.dtype for value in given), None))


def _type(self: Any, dtype: Any = None, *_: Any) -> Any:
    return _as_dtype(self, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _as_dtype(self: Any, dtype: torch.dtype | None) -> Any:
    """What is float64 stays so, whatever floats are asked for; other conversions are torch's."""
    if not isinstance(self, BlockTensor):
        return NotImplemented
    stays = self.dtype is torch.float64 and dtype is not None and dtype.is_floating_point
    return self if stays or dtype in (None, self.dtype) else NotImplemented


def _unless(function: Callable[..., Any]) -> Callable[..., Any]:
    """A view of a BlockTensor; of anything else, the ordinary function's."""

    def handler(self: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) if isinstance(self, BlockTensor) and self.ndim >= 2 else NotImplemented

    return handler


def _swapped(self: BlockTensor, axis0: int, axis1: int) -> BlockTensor:
    return _transposed(self, axis0, axis1)


def _permuted_by(self: BlockTensor, *order: Any, dims: Any = None) -> BlockTensor:
    order = order if dims is None else dims
    return _permuted(self, order[0] if isinstance(order[0], tuple | list) else order)


_T = torch.Tensor
register(_unless(_transposed), torch.transpose, _T.transpose)
register(_unless(_swapped), torch.swapaxes, _T.swapaxes)
register(_unless(lambda self: _transposed(self, 0, 1)), torch.t, _T.t)
register(_unless(_permuted_by), torch.permute, _T.permute)
register(_unless(_selected), torch.select, _T.select)
register(_unless(_viewed), _T.view, _T.reshape, torch.reshape)
register(_item, _T.__getitem__)
register(_split, torch.split, _T.split)
register(_chunk, torch.chunk, _T.chunk)
register(_cat, torch.cat, torch.concat)
register(_stack, torch.stack)
register(_itself, _T.contiguous, _T.requires_grad_, _T.cpu, _T.cuda)
register(_detached, _T.detach, torch.detach)
register(_to, _T.to, _T.type_as)
register(_type, _T.type)
register(lambda self, *_, **__: _as_dtype(self, torch.float32), _T.float)
register(lambda self, *_, **__: _as_dtype(self, torch.float64), _T.double)
register(lambda self, *_, **__: _as_dtype(self, torch.float16), _T.half)
register(lambda self, *_, **__: _as_dtype(self, torch.bfloat16), _T.bfloat16)
