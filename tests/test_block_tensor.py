"""Parameters of which only blocks exist, against torch's own dense tensors: numbers, views and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from tpshard.errors import InconclusiveError
from tpshard.layout import Box
from tpshard.verify import block_operations, block_products, blocks
from tpshard.verify.block_tensor import RECENT, BlockTensor, Context, Tape
from tpshard.verify.blocks import Block

Function = Callable[..., Any]
assert block_operations  # BlockTensor learns its views
assert block_products  # and to multiply


@dataclass
class Numbers:
    """Stored tensors by holder; counts what was read at a time."""

    tensors: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    largest: int = 0

    def read(self, name: str, holder: int, box: Box) -> torch.Tensor:
        self.largest = max(self.largest, box.volume)
        return self.tensors[name, holder][box.slices()].clone()


def context_of(numbers: Numbers, **more: Any) -> Context:
    return Context(numbers, torch.float64, torch.device("cpu"), **more)  # type: ignore[arg-type]


def parameter(
    shape: tuple[int, ...], boxes: list[Box], context: Context, key: str = "p", turned: bool = False
) -> tuple[BlockTensor, torch.Tensor]:
    """A parameter with random numbers in these boxes, and the dense tensor that it stands for. Each box comes from
    within a stored tensor of its own; ``turned``: whose axes are in the other order."""
    whole = torch.zeros(shape, dtype=torch.float64)
    made = []
    axes = tuple(range(len(shape)))[:: -1 if turned else 1]
    for holder, box in enumerate(boxes):
        stored = torch.randn([box.shape[axis] + 3 for axis in axes], dtype=torch.float64)
        context.weights.tensors[key, holder] = stored  # type: ignore[attr-defined]
        source = Box((2,) * len(axes), tuple(2 + box.shape[axis] for axis in axes))
        whole[box.slices()] = stored[source.slices()].permute(axes)
        made.append(Block(key, holder, source, axes, box))
    return BlockTensor.make(shape, torch.float64, context, key).with_blocks(made), whole


def boxed(shape: tuple[int, ...], *edges: tuple[int, ...], skip: int = 0) -> list[Box]:
    """The boxes of a grid with these inner edges on each axis, every ``skip``-th left out."""
    lines = [list(itertools.pairwise((0, *inner, size))) for inner, size in zip(edges, shape, strict=True)]
    boxes = [Box(tuple(a for a, _ in cell), tuple(b for _, b in cell)) for cell in itertools.product(*lines)]
    return [box for number, box in enumerate(boxes) if not skip or number % skip]


MATRIX, STACK = (7, 5), (3, 5, 4)
PLACES = {
    "whole": (boxed(MATRIX, (), ()), boxed(STACK, (), (), ())),
    "nothing": ([], []),
    "rows": (boxed(MATRIX, (2,), ()), boxed(STACK, (1,), (), ())),
    "some cells": (boxed(MATRIX, (2, 3), (1, 4), skip=2), boxed(STACK, (1, 2), (3,), (1,), skip=2)),
    "one cell": ([Box((6, 2), (7, 3))], [Box((2, 4, 0), (3, 5, 1))]),
}


@pytest.fixture(params=[2**21, 6, 1], ids=["one chunk", "chunks of 6", "chunks of 1"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "CHUNK", request.param)
    return int(request.param)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


PRODUCTS: Mapping[str, Function] = {
    "linear": lambda w: F.linear(x(2, 3, 5), w),
    "linear of a vector": lambda w: F.linear(x(5), w),
    "linear with bias": lambda w: F.linear(x(4, 5), w, x(7)),
    "matmul": lambda w: torch.matmul(x(2, 3, 7), w),
    "matmul of a vector": lambda w: x(7) @ w,
    "mm": lambda w: torch.mm(x(2, 7), w),
    "mm with T": lambda w: x(2, 5).mm(w.T),
    "matmul with mT": lambda w: x(2, 3, 5) @ w.mT,
    "matmul with t()": lambda w: x(2, 5).matmul(w.t()),
    "matmul with transpose": lambda w: x(2, 5) @ w.transpose(0, 1),
    "matmul with named transpose": lambda w: x(2, 5) @ w.transpose(dim0=-1, dim1=-2),
    "addmm": lambda w: torch.addmm(x(5), x(2, 7), w),
    "addmm with factors": lambda w: torch.addmm(x(5), x(2, 7), w, beta=0.5, alpha=3),
    "embedding": lambda w: F.embedding(torch.tensor([[0, 6, 6], [2, 3, 0]]), w),
    "embedding of nothing": lambda w: F.embedding(torch.tensor([[]], dtype=torch.int64), w),
    "torch.embedding": lambda w: torch.embedding(w, torch.tensor([5, 2]), 2),
    "from the left": lambda w: w @ x(5, 2),
    "parts of linear": lambda w: [F.linear(x(4, 5), part) for part in w.split([4, 1, 2])],
    "columns": lambda w: [F.linear(x(4, 2), w[:, 1:3]), F.linear(x(4, 2), w.narrow(1, 1, 2))],
    "a row": lambda w: w[3] * x(5),
    "sum": lambda w: (1 + w).sum(0),
    "einsum": lambda w: torch.einsum("bi,oi->bo", x(4, 5), w),
}
STACKED: Mapping[str, Function] = {
    "bmm": lambda w: torch.bmm(x(3, 2, 5), w),
    "matmul": lambda w: torch.matmul(x(3, 2, 5), w),
    "matmul spread": lambda w: torch.matmul(x(1, 2, 5), w),
    "one expert": lambda w: x(2, 5) @ w[1],
    "last expert": lambda w: x(2, 5) @ w[-1],
    "expert by tensor": lambda w: x(2, 5) @ w[torch.tensor(2)],
    "linear of an expert": lambda w: F.linear(x(2, 4), w[0]),
    "expert's halves": lambda w: [x(2, 5) @ part for part in w[2].chunk(2, dim=-1)],
    "permuted": lambda w: x(2, 4) @ w.permute(0, 2, 1)[1],
    "permuted by a tuple": lambda w: torch.permute(w, (2, 0, 1))[3].T,
    "for each": lambda w: [x(2, 5) @ expert for expert in w],
    "unbound": lambda w: w.unbind(0)[1],
}
VIEWS: Mapping[str, Function] = {
    "transpose": lambda w: w.transpose(0, -1),
    "swapaxes": lambda w: w.swapaxes(1, 2),
    "permute": lambda w: w.permute(-1, 0, 1),
    "named permute": lambda w: w.permute(dims=(2, 1, 0)),
    "select": lambda w: w.select(1, 3),
    "select the last": lambda w: torch.select(w, -1, -1),
    "named select": lambda w: w.select(dim=2, index=1),
    "index": lambda w: w[2],
    "slice": lambda w: w[1:],
    "slice to the end": lambda w: w[-2:9],
    "empty slice": lambda w: w[2:1],
    "split": lambda w: w.split(2, dim=1),
    "split into": lambda w: w.split([1, 3, 1], dim=-2),
    "named split": lambda w: w.split(split_size=3, dim=1),
    "torch.split": lambda w: torch.split(w, 2),
    "chunk": lambda w: w.chunk(2, dim=1),
    "more chunks than lines": lambda w: w.chunk(9, dim=-1),
    "cat": lambda w: torch.cat([w, w[:1], w], dim=0),
    "cat by columns": lambda w: torch.cat([w, w], dim=-1),
    "stack": lambda w: torch.stack([w, w]),
    "stack last": lambda w: torch.stack([w, w, w], dim=-1),
    "views of views": lambda w: torch.stack([w.transpose(0, 1)[1:3], w.permute(1, 0, 2)[3:]], 1)[0],
    "contiguous": lambda w: w.transpose(0, 2).contiguous(),
    "detach": lambda w: w.detach(),
    "double": lambda w: w.double(),
    "to": lambda w: w.to("cpu", torch.float64),
    "narrow, then T": lambda w: w[1].T[1:],
}
DENSE: Mapping[str, Function] = {  # of these a dense tensor comes back
    "mask": lambda w: w[w > 0],
    "rows by index": lambda w: w[torch.tensor([2, 0])],
    "row by mask": lambda w: w[torch.tensor([True, False, True])],
    "a mask of no axes": lambda w: w[torch.tensor(True)],
    "True": lambda w: w[True],
    "None": lambda w: w[None],
    "tuple": lambda w: w[:, 2, 1:3],
    "ellipsis": lambda w: w[..., 0],
    "stepped": lambda w: w[::2],
    "flattened": lambda w: w.reshape(-1, 4),
    "view": lambda w: w.view(15, 4),
    "unsqueezed": lambda w: w.unsqueeze(0),
    "flattened again": lambda w: w.flatten(1),
    "to int": lambda w: w.to(torch.int64),
    "to float and more": lambda w: [w * 2, -w, w.mean(), w.norm()],
    "cat with a dense one": lambda w: torch.cat([w, x(1, 5, 4)]),
    "stack with a dense one": lambda w: torch.stack([w, x(3, 5, 4)]),
}


def agree(got: Any, want: Any) -> None:
    if isinstance(want, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            agree(one, other)
        return
    got = got.dense() if isinstance(got, BlockTensor) else got
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def everywhere(function: Function, shape: tuple[int, ...]) -> None:
    for (_, boxes), turned in itertools.product(PLACES.items(), (False, True)):
        w, dense = parameter(shape, boxes[len(shape) - 2], context_of(Numbers()), turned=turned)
        agree(function(w), function(dense))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_matrix(name: str, chunk: int) -> None:
    everywhere(PRODUCTS[name], MATRIX)


@pytest.mark.parametrize("name", [*STACKED, *VIEWS, *DENSE])
def test_products_and_views_of_a_stack(name: str, chunk: int) -> None:
    everywhere({**STACKED, **VIEWS, **DENSE}[name], STACK)


@pytest.mark.parametrize("name", VIEWS)
def test_views_read_nothing(name: str) -> None:
    numbers = Numbers()
    w, _ = parameter(STACK, PLACES["some cells"][1], context_of(numbers))
    made = VIEWS[name](w)
    assert all(isinstance(one, BlockTensor) for one in (made if isinstance(made, tuple | list) else [made]))
    assert numbers.largest == 0


def test_a_product_reads_no_more_than_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 10)
    numbers = Numbers()
    w, dense = parameter((31, 7), boxed((31, 7), (), ()), context_of(numbers))
    agree(F.linear(x(2, 7), w), F.linear(x(2, 7), dense))
    assert numbers.largest == 7  # a line
    agree(x(2, 31) @ w, x(2, 31) @ dense)
    agree(F.embedding(torch.tensor([3, 3, 30]), w), dense[[3, 3, 30]])
    assert numbers.largest == 7


def test_a_parameter_looks_like_a_parameter() -> None:
    w, dense = parameter(MATRIX, PLACES["rows"][0], context_of(Numbers()))
    for look in (torch.Tensor.size, torch.Tensor.dim, torch.numel, len, torch.is_floating_point):
        assert look(w) == look(dense)  # type: ignore[operator]
    assert (w.shape, w.dtype, w.device, w.ndim, w.size(-1)) == (dense.shape, dense.dtype, dense.device, 2, 5)
    assert torch.equal(w.data.dense(), dense)
    assert w.T.shape == (5, 7)
    assert "BlockTensor(p, [7, 5], 2 blocks)" in repr(w)
    assert w.type() == dense.type()
    assert w.is_contiguous()


def test_out_of_range_is_an_error_as_with_torch() -> None:
    w, dense = parameter(STACK, PLACES["whole"][1], context_of(Numbers()))
    for some in (w, dense):
        for index in (3, -4):
            with pytest.raises(IndexError):
                some[index]
        with pytest.raises(IndexError):
            some.select(1, 5)
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([3]), some[:, :, 0])
        with pytest.raises(RuntimeError):
            x(2, 6) @ some[0]
        with pytest.raises(RuntimeError):
            some.split([1, 1])
        with pytest.raises(RuntimeError):
            torch.cat([some, some.transpose(0, 1)], dim=2)
        with pytest.raises(RuntimeError):
            torch.stack([some, some.transpose(0, 1)])
    with pytest.raises(IndexError, match="an index is out of range of 3 rows"):
        F.embedding(torch.tensor([-1]), w.select(1, 0))
    with pytest.raises(RuntimeError, match=r"p: expected torch\.float64, got torch\.float32"):
        x(2, 5).float() @ w[0]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_numbers_are_converted_from_what_is_stored(stored: torch.dtype) -> None:
    numbers = Numbers()
    context = context_of(numbers)
    w, _ = parameter(MATRIX, PLACES["rows"][0], context)
    numbers.tensors = {key: value.to(stored) for key, value in numbers.tensors.items()}
    dense = w.dense()
    assert dense.dtype is torch.float64
    assert torch.equal(dense[0], numbers.tensors["p", 0][2, 2:7].double())


def test_another_dtype_than_the_runs_is_a_dense_copy() -> None:
    context = Context(Numbers(), torch.bfloat16, torch.device("cpu"))  # type: ignore[arg-type]
    w, dense = parameter(MATRIX, PLACES["whole"][0], context)
    w = BlockTensor.make(MATRIX, torch.bfloat16, context, "p").with_blocks(w.blocks)
    low = dense.to(torch.bfloat16)
    for convert in (torch.Tensor.float, lambda t: t.to(torch.float32), lambda t: t.type(torch.float64)):
        assert convert(w).dtype is convert(low).dtype
        assert torch.equal(convert(w), convert(low))
    assert w.bfloat16() is w
    assert w.type_as(low) is w
    assert torch.equal(w.to(x(1)), low.double())


def test_whole_numbers_stay_whole() -> None:
    numbers = Numbers({("i", 0): torch.arange(12).reshape(3, 4)})
    block = Block("i", 0, Box((0, 0), (3, 4)), (0, 1), Box((0, 0), (3, 4)))
    w = BlockTensor.make((3, 4), torch.int64, context_of(numbers), "i").with_blocks([block])
    assert torch.equal(w.dense(), torch.arange(12).reshape(3, 4))
    assert w.to(torch.float64).dtype is torch.float64
    assert torch.equal(torch.ones(13)[w], torch.ones(3, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sound_run_ends_at_a_number_that_is_not_finite(value: float) -> None:
    numbers = Numbers()
    w, _ = parameter(MATRIX, PLACES["rows"][0], context_of(numbers, sound=True))
    F.linear(x(1, 5), w)
    numbers.tensors["p", 1][3, 4] = value
    with pytest.raises(InconclusiveError, match="p: the source holds NaN or infinite values"):
        F.linear(x(1, 5), w)


def test_blocks_are_found_when_they_are_needed_and_a_few_are_kept() -> None:
    context, made = context_of(Numbers()), []
    for number in range(RECENT + 2):
        tensor = BlockTensor.make((1,), torch.float64, context, f"p{number}")
        tensor.with_factory(lambda number=number: (made.append(number), ())[1])  # type: ignore[misc]
        assert tensor.dense().tolist() == [0]
        assert tensor.dense().tolist() == [0]
    assert made == list(range(RECENT + 2))
    assert len(context._recent) == RECENT


# ------------------------------------------------------------------------------------------ any shape, any places


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box], bool]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=3)))
    edges = [sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else [] for size in shape]
    cells = boxed(shape, *map(tuple, edges))
    return shape, draw(st.lists(st.sampled_from(cells), unique=True)), draw(st.booleans())


@settings(max_examples=60)
@given(grids(), st.integers(1, 9), st.data())
def test_any_blocks_under_any_views(
    grid: tuple[tuple[int, ...], list[Box], bool], lines: int, data: st.DataObject
) -> None:
    shape, boxes, turned = grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CHUNK", lines)
        got, want = parameter(shape, boxes, context_of(Numbers()), turned=turned)
        for _ in range(3):
            if got.ndim < 2 or not got.numel():
                break
            function = data.draw(st.sampled_from(sorted(RANDOM)))
            numbers = [data.draw(st.integers(0, 5)) for _ in range(3)]
            got, want = (RANDOM[function](some, *numbers) for some in (got, want))
            assert isinstance(got, BlockTensor)
        agree(got, want)
        if got.ndim == 2:
            agree(F.linear(x(2, got.shape[1]), got), F.linear(x(2, got.shape[1]), want))
            agree(x(3, got.shape[0]) @ got, x(3, got.shape[0]) @ want)


RANDOM: Mapping[str, Function] = {
    "select": lambda w, a, b, _: w.select(a % w.ndim, b % w.shape[a % w.ndim]),
    "slice": lambda w, a, b, _: w[a % len(w) : a % len(w) + b],
    "transpose": lambda w, a, b, _: w.transpose(a % w.ndim, b % w.ndim),
    "split": lambda w, a, b, c: w.split(1 + b, dim=a % w.ndim)[0 if c % 2 else -1],
    "chunk": lambda w, a, b, _: w.chunk(1 + b, dim=a % w.ndim)[-1],
    "cat": lambda w, a, b, c: torch.cat([w] * (1 + b % 3), dim=a % w.ndim),
    "stack": lambda w, a, b, _: torch.stack([w] * (1 + b % 2), dim=a % (w.ndim + 1)),
}

# ------------------------------------------------------------------------------------------ gradients


def noted(tape: Tape, shape: tuple[int, ...]) -> torch.Tensor:
    """The gradient of the whole parameter, from everything on the tape: each use's, at the place of its view."""
    total = torch.zeros(shape, dtype=torch.float64)
    for view, grad in _uses(tape):
        cells = torch.arange(total.numel()).reshape(shape)
        for step, *values in view:
            match step:
                case "select":
                    cells = cells.select(*values)
                case "narrow":
                    cells = cells.narrow(values[0], values[1], values[2] - values[1])
                case "permute":
                    cells = cells.permute(values)
                case "view":
                    cells = cells.reshape(values)
                case _:
                    raise AssertionError(step)
        total.view(-1).index_add_(0, cells.reshape(-1), grad.reshape(-1))
    return total


def _uses(tape: Tape) -> Iterator[tuple[Any, torch.Tensor]]:
    for (_, view, out), (_, pairs) in tape.products.items():
        for inputs, grads in pairs:
            yield view, grads.T @ inputs if out == 0 else inputs.T @ grads
    for (_, view), (weight, pairs) in tape.lookups.items():
        for tokens, grads in pairs:
            yield view, torch.zeros(weight.shape, dtype=torch.float64).index_add(0, tokens, grads)
    for (_, view), (_, leaf) in tape.leaves.items():
        if leaf.grad is not None:
            yield view, leaf.grad


WITH_GRADIENTS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], Function]] = {
    "linear": ((2, 3, 5), MATRIX, lambda h, w: F.linear(h, w)),
    "linear of a vector": ((5,), MATRIX, lambda h, w: F.linear(h, w)),
    "linear twice": ((4, 5), MATRIX, lambda h, w: F.linear(F.linear(h, w) @ w, w)),
    "matmul": ((2, 3, 7), MATRIX, lambda h, w: h @ w),
    "addmm": ((2, 7), MATRIX, lambda h, w: torch.addmm(h[0, :5], h, w)),
    "a bias of itself": ((2, 5), MATRIX, lambda h, w: F.linear(h, w, w[:, 1])),
    "transposed": ((2, 5), MATRIX, lambda h, w: h @ w.T),
    "split": ((2, 5), MATRIX, lambda h, w: torch.cat([F.linear(h, part) ** 2 for part in w.split([3, 4])], 1)),
    "embedding": ((3, 5), MATRIX, lambda h, w: h * F.embedding(torch.tensor([0, 6, 6]), w)),
    "embedding with padding": ((3, 5), MATRIX, lambda h, w: h * F.embedding(torch.tensor([0, 6, 2]), w, 6)),
    "embedding with padding from the end": ((2, 5), MATRIX, lambda h, w: h * F.embedding(torch.tensor([0, 6]), w, -1)),
    "words in and out": ((2, 5), MATRIX, lambda h, w: F.linear(h + F.embedding(torch.tensor([1, 6]), w), w)),
    "dense": ((7, 5), MATRIX, lambda h, w: h * w + w.sum()),
    "detached": ((2, 5), MATRIX, lambda h, w: F.linear(h, w.detach()) + w[:, 0]),
    "data": ((2, 5), MATRIX, lambda h, w: F.linear(h, w.data) + w[:, 0]),
    "bmm": ((3, 2, 5), STACK, lambda h, w: torch.bmm(h, w)),
    "experts": ((2, 5), STACK, lambda h, w: (h @ w[2]) + (h @ w[0]) + (h @ w[-1])),
    "expert's halves": ((2, 5), STACK, lambda h, w: torch.mul(*[h @ half for half in w[1].chunk(2, -1)])),
    "permuted expert": ((2, 4), STACK, lambda h, w: h @ w.permute(0, 2, 1)[1]),
}


@pytest.mark.parametrize(("placed", "turned"), [("whole", False), ("some cells", True)])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_are_autograds(name: str, placed: str, turned: bool, chunk: int) -> None:
    """Also of cells that the rank has not: whoever compares takes its own."""
    entered, shape, function = WITH_GRADIENTS[name]
    context = context_of(Numbers())
    context.tape = Tape.new(torch.device("cpu"))
    w, dense = parameter(shape, PLACES[placed][len(shape) - 2], context, turned=turned)
    h, leaf = x(*entered).requires_grad_(), dense.clone().requires_grad_()
    want = function(h, leaf)
    cotangent = x(*want.shape, 1)[..., 0]
    of_input, of_weight = torch.autograd.grad(want, [h, leaf], cotangent)
    got = function(h, w)
    agree(got, want)
    got.backward(cotangent)
    agree(h.grad, of_input)
    agree(noted(context.tape, shape), of_weight)


ROWS = (12, 5)  # three matrices of four rows, or four of three, one after another


@pytest.mark.parametrize("edges", [((), ()), ((3, 9), ()), ((1, 5, 6), (2,))])
def test_matrices_one_after_another_in_an_axis(edges: tuple[tuple[int, ...], ...], chunk: int) -> None:
    for skip, turned in itertools.product((0, 2), (False, True)):
        numbers = Numbers()
        context = context_of(numbers)
        context.tape = Tape.new(torch.device("cpu"))
        w, dense = parameter(ROWS, boxed(ROWS, *edges, skip=skip), context, turned=turned)
        for stack in (w.view(-1, 4, 5), w.view((4, 3, 5)), w.reshape(3, 4, 5), torch.reshape(w, (3, 4, 5))):
            assert isinstance(stack, BlockTensor)
        assert numbers.largest == 0
        agree(w.view(-1, 3, 5).detach(), dense.view(-1, 3, 5))
        agree(w.view(3, 4, 5)[2].T.detach(), dense.view(3, 4, 5)[2].T)
        leaf = dense.clone().requires_grad_()
        got, want = (x(2, 5) @ m.view(-1, 4, 5)[1].T @ m.view(-1, 4, 5)[2] for m in (w, leaf))
        agree(got, want)
        got.sum().backward()
        want.sum().backward()
        agree(noted(context.tape, ROWS), leaf.grad)
    for shape in ((-1, 20), (6, 10), (2, 5, 6), (3, 2, 2, 5)):
        agree(w.view(*shape), dense.view(*shape))
    for shape in ((-1, 5, 5), (4, 4, 5), (0, 4, 5)):
        with pytest.raises(RuntimeError):
            w.view(*shape)


def test_what_is_multiplied_by_a_matrix_of_a_stack_is_noted() -> None:
    """By one that is chosen, and not by one to which only zeros or nothing come."""
    context = context_of(Numbers())
    w, _ = parameter(STACK, PLACES["whole"][1], context, "stack")
    rows, _ = parameter(ROWS, boxed(ROWS, (), ()), context, "rows")
    matrix, _ = parameter(MATRIX, PLACES["whole"][0], context)
    for expert in w:
        expert.T.detach()
    _ = torch.zeros(2, 5, dtype=torch.float64) @ w[0], x(0, 5) @ w[0], x(2, 4) @ w[1].T, F.linear(x(2, 5), matrix)
    _ = rows.view(-1, 4, 5)[0], F.linear(x(2, 5), rows.view(-1, 4, 5)[2]), w[2] * 2
    assert {key: (found.count, found.numbers) for key, found in context.reached.items()} == {
        "stack": (3, {1, 2}),
        "rows": (3, {2}),
    }


def test_without_gradients_nothing_is_noted() -> None:
    context = context_of(Numbers())
    context.tape = tape = Tape.new(torch.device("cpu"))
    w, _ = parameter(MATRIX, PLACES["rows"][0], context)
    with torch.no_grad():
        assert F.linear(x(2, 5), w).grad_fn is None
        assert F.embedding(torch.tensor([1]), w).grad_fn is None
        assert not w.dense().requires_grad
    assert (tape.products, tape.lookups, tape.leaves) == ({}, {}, {})


def test_buffers_have_no_gradient_nor_have_their_views() -> None:
    context = context_of(Numbers())
    context.tape = tape = Tape.new(torch.device("cpu"))
    w, _ = parameter(MATRIX, PLACES["whole"][0], context)
    w.learns = False
    assert not w.dense().requires_grad
    assert not w[2].dense().requires_grad
    h = x(2, 5).requires_grad_()
    (F.linear(h, w) @ w.T.T + F.embedding(torch.tensor([1, 2]), w)).sum().backward()
    assert h.grad is not None
    assert (tape.products, tape.lookups, tape.leaves) == ({}, {}, {})


def test_joined_parameters_are_told_apart() -> None:
    """Two joins that begin with the same parameter are not one."""
    context = context_of(Numbers())
    context.tape = tape = Tape.new(torch.device("cpu"))
    a, b, c = (parameter((2, 5), boxed((2, 5), (), ()), context, key)[0] for key in "abc")
    h = x(2, 5).requires_grad_()
    for join in (torch.cat, torch.stack):
        tape.clear()
        for other in (b, c):
            made = join([a, other])
            (F.linear(h, made) if made.ndim == 2 else h @ made[1].T).sum().backward()
        assert len(tape.products) == 2


def test_what_cannot_be_told_as_blocks_is_made_dense() -> None:
    context = context_of(Numbers())
    context.tape = tape = Tape.new(torch.device("cpu"))
    dense, own = x(7, 5), (x(7, 5) > 0).double()
    w = BlockTensor.make(MATRIX, torch.float64, context, "p").with_dense(lambda: dense * own, lambda: own)
    assert not w.is_blocks
    agree(F.linear(x(2, 5), w), F.linear(x(2, 5), dense * own))
    agree(w[3], (dense * own)[3])
    agree(torch.stack([w, w])[1].T, (dense * own).T)
    assert torch.equal(w.own_cells(), own)
    F.linear(x(2, 5), w).sum().backward()
    agree(noted(tape, MATRIX), torch.ones(7, 2, dtype=torch.float64) @ x(2, 5))


def test_own_cells_are_where_the_blocks_are() -> None:
    w, dense = parameter(MATRIX, PLACES["some cells"][0], context_of(Numbers()))
    assert torch.equal(w.own_cells(), (dense != 0).double())
    assert torch.equal(w.T.own_cells(), (dense.T != 0).double())


def test_another_order_of_summation_is_the_same_but_for_rounding() -> None:
    w, dense = parameter((9, 50), boxed((9, 50), (), (20,)), context_of(Numbers(), backwards=True))
    got, want = F.linear(x(4, 50), w), F.linear(x(4, 50), dense)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1, 5, 12, 24, 97])
def test_chunks_cover_a_block_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", size)
    block = Block("p", 0, Box((1, 2, 3), (5, 5, 4)), (2, 0, None), Box((0, 3, 6), (3, 4, 10)))
    counted = torch.zeros(5, 5, 11)
    for part in block.chunks():
        assert part.box.volume <= max(size, 3)
        assert part.source.volume == part.box.volume
        counted[part.box.slices()] += 1
    assert counted.sum() == 12
    assert counted.max() == 1
