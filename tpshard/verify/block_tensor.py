"""A model's parameter of which only some blocks exist, read from disk when it is used; elsewhere it is zero.

It stands in a module in the parameter's place, at the parameter's full shape, so that the model's code need not know.
Products and look-ups work block by block and hold a few megabytes of a weight at a time; the ranks' shards multiply
at their own shapes, and a reference larger than memory is no different. Stacking, joining, transposing and indexing
only move the blocks' places. Whatever else is asked of it gets a dense tensor, zeros included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Shape
from tpshard.verify.blocks import Block
from tpshard.verify.values import Weights

RECENT = 64  # parameters whose blocks are kept

View = tuple[tuple[Any, ...], ...]
HANDLERS: dict[Any, Callable[..., Any]] = {}  # what BlockTensors can do by themselves


def register(handler: Callable[..., Any], *functions: Any) -> None:
    """Say how BlockTensors do these functions; a handler may return NotImplemented."""
    HANDLERS.update(dict.fromkeys(functions, handler))


_T = torch.Tensor
_METADATA = {
    _T.size, _T.dim, _T.numel, _T.stride, _T.is_floating_point, torch.is_floating_point, _T.__len__, _T.nelement,
    _T.element_size, _T.is_complex, torch.is_complex, _T.get_device, _T.is_contiguous, torch.numel, _T.storage_offset,
    _T.__hash__, _T.ndimension,
}  # fmt: skip


class Context:
    """What all parameters of one run share: where numbers come from, in what dtype and on which device one computes,
    and where uses are noted for their gradients.

    ``sound``: numbers that are not finite end the run; ``backwards``: products are summed in another order; ``used``:
    the parameters that were asked for numbers; ``attended``: those given to torch's attention, which ends in a product.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        *,
        sound: bool = False,
        backwards: bool = False,
    ) -> None:
        self.weights, self.dtype, self.device = weights, dtype, device
        self.sound, self.backwards = sound, backwards
        self.tape: Tape | None = None
        self.reached: dict[str, Reached] = {}  # of stacked matrices (experts)
        self.used: set[str] = set()
        self.attended: set[str] = set()
        self._recent: OrderedDict[str, tuple[Block, ...]] = OrderedDict()

    def blocks_of(self, key: str, factory: Callable[[], tuple[Block, ...]]) -> tuple[Block, ...]:
        """A parameter's blocks. They are found when they are needed and kept for a while only: a large mixture of
        experts has millions."""
        self.used.add(key)
        if key not in self._recent:
            self._recent[key] = factory()
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    def values(self, block: Block) -> torch.Tensor:
        """A block's numbers, in the parameter's axes."""
        raw = self.weights.read(block.name, block.holder, block.source).to(self.device)
        if raw.is_floating_point():
            raw = raw.to(self.dtype)
            # The sum is not finite where a number is not, and ten times as fast to look at.
            if self.sound and not bool(torch.isfinite(raw.sum())) and not bool(torch.isfinite(raw).all()):
                raise InconclusiveError(f"{printable(block.name)}: the source holds NaN or infinite values")
        kept = [stored for stored, axis in enumerate(block.axes) if axis is not None]
        raw = raw.reshape([raw.shape[stored] for stored in kept])
        places = [block.axes[stored] for stored in kept]
        order = sorted(range(len(kept)), key=lambda k: places[k] or 0)
        return raw.permute(order).reshape(block.box.shape)


@dataclass(slots=True)
class Reached:
    """A parameter that is a stack of ``count`` matrices, and which of them something was multiplied by."""

    count: int
    numbers: set[int]


@dataclass(slots=True)
class Tape:
    """The uses of a run's parameters since the ranks last compared gradients.

    ``products``: for each parameter (and view of it) the pairs of inputs [n, in] and output gradients [n, out];
    ``lookups``: the tokens and output gradients; ``leaves``: dense tensors, whose ``grad`` autograd fills.
    """

    anchor: torch.Tensor
    products: dict[tuple[str, View, int], tuple[BlockTensor, list[tuple[torch.Tensor, torch.Tensor]]]]
    lookups: dict[tuple[str, View], tuple[BlockTensor, list[tuple[torch.Tensor, torch.Tensor]]]]
    leaves: dict[tuple[str, View], tuple[BlockTensor, torch.Tensor]]

    @classmethod
    def new(cls, device: torch.device) -> Tape:
        return cls(torch.zeros((), dtype=torch.float64, device=device, requires_grad=True), {}, {}, {})

    def clear(self) -> None:
        self.products.clear()
        self.lookups.clear()
        self.leaves.clear()


class BlockTensor(torch.Tensor):
    """``key``: the parameter's name; ``view_``: what has been done to it since; ``learns``: False where there is no
    gradient: of buffers, and of what was detached; ``number``: which matrix of a stack it is."""

    context: Context
    key: str
    view_: View
    learns: bool
    number: int | None
    _factory: Callable[[], tuple[Block, ...]] | None
    _blocks: tuple[Block, ...]
    _dense: Callable[[], torch.Tensor] | None
    _own: Callable[[], torch.Tensor]

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, context: Context, key: str, view: View = ()) -> BlockTensor:
        """Without any block: all zeros."""
        tensor = torch.Tensor._make_wrapper_subclass(BlockTensor, shape, dtype=dtype, device=context.device)
        tensor.context, tensor.key, tensor.view_, tensor.learns = context, key, view, True
        tensor.number = None
        tensor._factory, tensor._blocks, tensor._dense = None, (), None
        return tensor

    def with_blocks(self, blocks: Iterable[Block]) -> BlockTensor:
        self._blocks = tuple(blocks)
        return self

    def with_factory(self, factory: Callable[[], tuple[Block, ...]]) -> BlockTensor:
        self._factory = factory
        return self

    def with_dense(self, dense: Callable[[], torch.Tensor], own: Callable[[], torch.Tensor]) -> BlockTensor:
        """What cannot be told as blocks is made dense each time; ``own``: ones where there is something."""
        self._dense, self._own = dense, own
        return self

    def own_cells(self) -> torch.Tensor:
        """Ones where there is something, zeros elsewhere."""
        if self._dense is not None:
            return self._own()
        ones = torch.zeros(self.shape, dtype=self.dtype, device=self.context.device)
        for block in self.blocks:
            ones[block.box.slices()] = 1
        return ones

    @property
    def is_blocks(self) -> bool:
        return self._dense is None

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.context.blocks_of(self.key, self._factory) if self._factory else self._blocks

    def derived(self, shape: Sequence[int], blocks: Iterable[Block], step: tuple[Any, ...]) -> BlockTensor:
        view = (*self.view_, step)
        made = BlockTensor.make(tuple(shape), self.dtype, self.context, self.key, view).with_blocks(blocks)
        made.learns, made.number = self.learns, self.number
        return made

    def detached(self) -> BlockTensor:
        """The same, without a gradient."""
        made = BlockTensor.make(tuple(self.shape), self.dtype, self.context, self.key, self.view_)
        made.number = self.number
        made._factory, made._blocks, made._dense, made.learns = self._factory, self._blocks, self._dense, False
        return made

    def note_use(self) -> None:
        """Something that is not zero meets this matrix of a stack."""
        if self.number is not None:
            self.context.reached[self.key].numbers.add(self.number)

    def dense(self) -> torch.Tensor:
        """All of it, zeros included; while gradients are recorded, a leaf that collects this tensor's."""
        self.note_use()
        tape = self.context.tape
        if tape is None or not (self.learns and torch.is_grad_enabled() and self.dtype.is_floating_point):
            return self._filled()
        if (self.key, self.view_) not in tape.leaves:
            tape.leaves[self.key, self.view_] = self, self._filled().requires_grad_()
        return tape.leaves[self.key, self.view_][1]

    def _filled(self) -> torch.Tensor:
        if self._dense is not None:
            self.context.used.add(self.key)
            return self._dense()
        whole = torch.zeros(self.shape, dtype=self.dtype, device=self.context.device)
        for block in self.blocks:
            for part in block.chunks():
                whole[part.box.slices()] = self.context.values(part)
        return whole

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.multi_head_attention_forward:
            for given in (*args, *kwargs.values()):
                if isinstance(given, BlockTensor):
                    given.context.attended.add(given.key)
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":
            return _metadata(func, args, kwargs)
        if (handler := HANDLERS.get(func)) is not None and _all_blocks((args, kwargs)):
            outcome = handler(*args, **kwargs)
            if outcome is not NotImplemented:
                return outcome
        return func(*densified(args), **densified(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was to work on a parameter that has no storage")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"BlockTensor({self.key}, {list(self.shape)}, {len(self.blocks)} blocks)"


def _metadata(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    (self, *_) = args
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute in ("T", "mT") and isinstance(self, BlockTensor):
        return HANDLERS[torch.transpose](self, -1, -2) if self.ndim >= 2 else self
    if attribute == "data" and isinstance(self, BlockTensor):
        return self.detached()
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _all_blocks(value: Any) -> bool:
    """Whether every parameter in there can be told as blocks."""
    if isinstance(value, BlockTensor):
        return value.is_blocks
    if isinstance(value, dict):
        return all(map(_all_blocks, value.values()))
    return all(map(_all_blocks, value)) if isinstance(value, tuple | list) else True


def densified(value: Any) -> Any:
    if isinstance(value, BlockTensor):
        return value.dense()
    if isinstance(value, tuple | list):
        return type(value)(map(densified, value)) if type(value) in (tuple, list) else value
    if type(value) is dict:
        return {key: densified(item) for key, item in value.items()}
    return value
