"""What a BlockTensor can do block by block: multiply, look rows up, and give views of itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from tpshard.verify.block_tensor import HANDLERS, BlockTensor, Reached, densified

# ---------------------------------------------------------------------------------------------- products and look-ups


def _multiply(x: torch.Tensor, weight: BlockTensor, out: int) -> torch.Tensor:
    """``x`` [n, in] times a 2-D weight whose axis ``out`` becomes the result's: [n, out]."""
    y = x.new_zeros(x.shape[0], weight.shape[out])
    for block in weight.blocks:
        for part in block.chunks():
            rows, columns = part.box.slices()[out], part.box.slices()[1 - out]
            values = weight.context.values(part)
            factors = x[:, columns], values.T if out == 0 else values
            y[:, rows] += _in_other_order(*factors) if weight.context.backwards else factors[0] @ factors[1]
    return y


def _in_other_order(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The product, its sums in three parts that are added from the last."""
    parts = [a @ b for a, b in zip(x.chunk(3, 1), values.chunk(3, 0), strict=True)]
    return sum(parts[-2::-1], parts[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: Any, weight: BlockTensor, out: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.out = weight, out
        return _multiply(x, weight, out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,), (grad,) = ctx.saved_tensors, grads
        weight, out = ctx.weight, ctx.out
        if weight.learns:
            key = weight.key, weight.view_, out
            weight.context.tape.products.setdefault(key, (weight, []))[1].append((x.detach(), grad.detach()))
        needed = ctx.needs_input_grad[0]
        return (_multiply(grad, weight, 1 - out) if needed else None), None, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, tokens: torch.Tensor, weight: BlockTensor, padding: int | None
    ) -> torch.Tensor:
        ctx.tokens, ctx.weight, ctx.padding = tokens, weight, padding
        return _look_up(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        weight = ctx.weight
        entry = weight.context.tape.lookups.setdefault((weight.key, weight.view_), (weight, []))
        tokens, grad = ctx.tokens.reshape(-1), grads[0].detach().reshape(-1, weight.shape[1])
        learning = tokens != ctx.padding if ctx.padding is not None else slice(None)
        entry[1].append((tokens[learning], grad[learning]))
        return None, None, None, None


def _look_up(tokens: torch.Tensor, weight: BlockTensor) -> torch.Tensor:
    y = torch.zeros(*tokens.shape, weight.shape[1], dtype=weight.dtype, device=tokens.device)
    flat, lines = tokens.reshape(-1), y.view(-1, weight.shape[1])  # not to be returned: nobody may change a view in place
    for row in sorted(set(flat.tolist())):
        for block in weight.blocks:
            part = block.narrow(0, row, row + 1)
            if part is not None:
                lines[flat == row, part.box.slices()[1]] = weight.context.values(part)[0]
    return y


def product(x: torch.Tensor, weight: BlockTensor, out: int) -> torch.Tensor:
    """``x`` [..., in] times a 2-D weight whose axis ``out`` becomes the last of the result."""
    flat = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    if flat.shape[1] != weight.shape[1 - out]:
        raise RuntimeError(f"{weight.key}: {list(x.shape)} cannot be multiplied by {list(weight.shape)}")
    if flat.dtype != weight.dtype:
        raise RuntimeError(f"{weight.key}: expected {weight.dtype}, got {flat.dtype}")
    if weight.number is not None and bool(flat.any()):  # tokens that an expert is not for may come to it as zeros
        weight.note_use()
    tape = weight.context.tape
    if tape is not None and torch.is_grad_enabled():
        anchor = tape.anchor if weight.learns else None
        y = _Product.apply(flat, anchor, weight, out)  # type: ignore[no-untyped-call]
    else:
        y = _multiply(flat, weight, out)
    return y.reshape(*x.shape[:-1], weight.shape[out])  # type: ignore[no-any-return]


def _plain(*values: Any) -> bool:
    return not any(isinstance(value, BlockTensor) for value in values)


def _linear(input: torch.Tensor, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, BlockTensor) or weight.ndim != 2 or not _plain(input):
        return NotImplemented
    y = product(input, weight, 0)
    return y if bias is None else y + densified(bias)


def _matmul(input: Any, other: Any) -> Any:
    if isinstance(other, BlockTensor) and _plain(input):
        if other.ndim == 2:
            return product(input, other, 1)
        if other.ndim == 3 and input.ndim == 3 and len(input) == len(other):
            return torch.stack([product(x, _selected(other, 0, e), 1) for e, x in enumerate(input)])
    return NotImplemented


def _addmm(input: Any, mat1: torch.Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(mat2, BlockTensor) or not _plain(mat1) or (beta, alpha) != (1, 1):
        return NotImplemented
    return densified(input) + product(mat1, mat2, 1)


def _embedding(
    input: torch.Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Any:
    if not isinstance(weight, BlockTensor) or not _plain(input) or max_norm is not None:
        return NotImplemented
    if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < weight.shape[0]:
        raise IndexError(f"{weight.key}: an index is out of range of {weight.shape[0]} rows")
    tape = weight.context.tape
    if tape is not None and weight.learns and torch.is_grad_enabled():
        padding = None if padding_idx is None else padding_idx % weight.shape[0]  # a row that never learns
        return _Lookup.apply(tape.anchor, input, weight, padding)  # type: ignore[no-untyped-call]
    return _look_up(input, weight)


# ---------------------------------------------------------------------------------------------- views


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


def _embedding_of(weight: Any, indices: torch.Tensor, padding_idx: int = -1, *_: Any, **__: Any) -> Any:
    return _embedding(indices, weight, padding_idx if padding_idx >= 0 else None)


def _register(handler: Callable[..., Any], *functions: Any) -> None:
    HANDLERS.update(dict.fromkeys(functions, handler))


_T = torch.Tensor
_register(_linear, F.linear)
_register(_embedding, F.embedding)
_register(_embedding_of, torch.embedding)
_register(_matmul, torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm, _T.__matmul__)
_register(_addmm, torch.addmm, _T.addmm)
_register(_unless(_transposed), torch.transpose, _T.transpose)
_register(_unless(_swapped), torch.swapaxes, _T.swapaxes)
_register(_unless(lambda self: _transposed(self, 0, 1)), torch.t, _T.t)
_register(_unless(_permuted_by), torch.permute, _T.permute)
_register(_unless(_selected), torch.select, _T.select)
_register(_unless(_viewed), _T.view, _T.reshape, torch.reshape)
_register(_item, _T.__getitem__)
_register(_split, torch.split, _T.split)
_register(_chunk, torch.chunk, _T.chunk)
_register(_cat, torch.cat, torch.concat)
_register(_stack, torch.stack)
_register(_itself, _T.contiguous, _T.requires_grad_, _T.cpu, _T.cuda)
_register(_detached, _T.detach, torch.detach)
_register(_to, _T.to, _T.type_as)
_register(_type, _T.type)
_register(lambda self, *_, **__: _as_dtype(self, torch.float32), _T.float)
_register(lambda self, *_, **__: _as_dtype(self, torch.float64), _T.double)
_register(lambda self, *_, **__: _as_dtype(self, torch.float16), _T.half)
_register(lambda self, *_, **__: _as_dtype(self, torch.bfloat16), _T.bfloat16)
