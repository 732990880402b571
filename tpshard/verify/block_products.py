"""A BlockTensor multiplied, and its rows looked up, block by block."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812

from tpshard.verify.block_tensor import BlockTensor, densified, register


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
    flat = tokens.reshape(-1)
    y = torch.zeros(*tokens.shape, weight.shape[1], dtype=weight.dtype, device=flat.device)
    lines = y.view(-1, weight.shape[1])  # y itself goes out: autograd lets nobody change a view of it in place
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
            return torch.stack([product(x, cast(BlockTensor, other.select(0, e)), 1) for e, x in enumerate(input)])
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


def _embedding_of(weight: Any, indices: torch.Tensor, padding_idx: int = -1, *_: Any, **__: Any) -> Any:
    return _embedding(indices, weight, padding_idx if padding_idx >= 0 else None)


_T = torch.Tensor
register(_linear, F.linear)
register(_embedding, F.embedding)
register(_embedding_of, torch.embedding)
register(_matmul, torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm, _T.__matmul__)
register(_addmm, torch.addmm, _T.addmm)
