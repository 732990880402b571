"""Backward, cut at every block: gradients against plain autograd of the dense model, and wrong ones that are found."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.block_models import MADE, TOKENS, WIDE, Block, Net, albert, cuts_of, llama, of_albert, of_llama, of_t5, t5
from tests.in_memory import Cut, InMemory, random_state, subject_of
from tpshard.verify import gradients, sections
from tpshard.verify.block_tensor import Tape
from tpshard.verify.execution import Outcome, Subject, Way, _Execution, execute
from tpshard.verify.forward import backward_result
from tpshard.verify.gradients import Comparison, Difference
from tpshard.verify.lockstep import AllDouble
from tpshard.verify.loss import run_loss
from tpshard.verify.preparation import default_dtype
from tpshard.verify.report import Verdict
from tpshard.verify.sections import Gradient, outermost_blocks


@dataclass
class Spied:
    """Every gradient that was compared, added up by parameter: the ranks' and the reference's; and the cotangents."""

    got: dict[str, torch.Tensor] = field(default_factory=dict)
    want: dict[str, torch.Tensor] = field(default_factory=dict)
    cotangents: list[list[torch.Tensor]] = field(default_factory=list)

    def add(self, name: str, place: Any, got: torch.Tensor, want: torch.Tensor, shape: Sequence[int]) -> None:
        for sums, value in ((self.got, got), (self.want, want)):
            total = sums.setdefault(name, torch.zeros(tuple(shape), dtype=torch.float64))
            total[place] += value


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    spy, between, backward = Spied(), Difference.between, torch.autograd.backward
    now: list[tuple[str, Any, bool, Sequence[int]]] = []

    def about(kind: str) -> None:
        compare = getattr(Comparison, f"_{kind}")

        def method(self: Comparison, key: Any, shape: Any) -> Difference:
            assert len(key[1]) == 0, "a view: this spy knows whole parameters only"
            place = sorted(shape[1:]) if kind == "lookup" else slice(None)
            whole = (SHAPES[key[0]]) if kind == "lookup" else shape
            now.append((key[0], place, kind == "product" and key[2] == 1, whole))
            result: Difference = compare(self, key, shape)
            now.pop()
            return result

        monkeypatch.setattr(Comparison, f"_{kind}", method)

    def spying(key: str, got: torch.Tensor, want: torch.Tensor) -> Difference:
        if now:
            name, place, turned, shape = now[-1]
            spy.add(name, place, *((got.T, want.T) if turned else (got, want)), shape)
        return between(key, got, want)

    def recording(tensors: Any, *args: Any, **more: Any) -> None:
        if args and args[0] is not None:  # not where torch calls itself, nor of a loss
            spy.cotangents.append(list(args[0]))
        backward(tensors, *args, **more)

    for kind in ("product", "lookup", "leaf"):
        about(kind)
    monkeypatch.setattr(Difference, "between", spying)
    monkeypatch.setattr(torch.autograd, "backward", recording)
    return spy


SHAPES: dict[str, Sequence[int]] = {}


def subject(
    make: Callable[[], nn.Module],
    ranks: int,
    patch: pytest.MonkeyPatch,
    inputs: dict[str, Any] | None = None,
    cuts: Callable[[nn.Module, int], dict[str, Cut]] = cuts_of,
) -> tuple[Subject, InMemory]:
    module = make()
    weights = InMemory(random_state(module), ranks, cuts(module, ranks))
    SHAPES.update({name: tuple(value.shape) for name, value in weights.tensors.items()})
    return subject_of(make, weights, inputs or {"tokens": TOKENS}, patch), weights


def backward(subject: Subject, weights: InMemory) -> Outcome:
    with default_dtype(torch.float64):
        return execute(subject, weights, Way(backward=True))


def dense_gradients(
    make: Callable[[], nn.Module], weights: InMemory, inputs: dict[str, Any], cotangents: list[list[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Plain autograd of the dense model: what goes into the first block, every block's result and the model's
    are each met by its cotangent and handed on without history."""
    with default_dtype(torch.float64):
        model = make().double().eval()
    model.load_state_dict(weights.tensors, strict=False)
    model.requires_grad_(True)
    ends: list[torch.Tensor] = []
    begun: list[torch.Tensor] = []

    def ended(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(ended, value))
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            ends.append(value.clone())
            begun.append(value.detach().requires_grad_().clone())  # no leaf: it may be written to
            return begun[-1]
        return value

    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def entered(value: Any) -> Any:
        """What has been met before is not met again."""
        if isinstance(value, dict):
            return {key: entered(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(entered, value))
        if isinstance(value, torch.Tensor) and value.grad_fn is not None and not any(value is b for b in begun):
            if id(value) not in known:
                known[id(value)] = value, ended(value)
            return known[id(value)][1]
        return value

    for path in outermost_blocks(model):
        block = model.get_submodule(path)
        block.register_forward_pre_hook(lambda _, args, kwargs: (entered(args), entered(kwargs)), with_kwargs=True)
        block.register_forward_hook(lambda _, args, out: ended(out))
    with AllDouble():
        out = model(**inputs)
    entered(tuple([out] if isinstance(out, torch.Tensor) else out.values()))
    flat = [c for some in cotangents for c in some]
    assert [t.shape for t in ends] == [c.shape for c in flat]
    torch.autograd.backward(ends, flat)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_against_autograd(
    make: Callable[[], nn.Module], subject: Subject, weights: InMemory, spied: Spied, free: Sequence[str] = ()
) -> Outcome:
    outcome = backward(subject, weights)
    assert outcome.failure is None
    assert max(g.error for g in outcome.gradients) < 1e-12
    reference = spied.cotangents[::2]  # the reference goes back first, then all ranks at once
    for want, ranks in zip(reference, spied.cotangents[1::2], strict=True):
        assert len(ranks) == weights.ranks * len(want)
        for cotangent, share in zip(want * weights.ranks, ranks, strict=True):
            torch.testing.assert_close(share * weights.ranks, cotangent)
    wanted = dense_gradients(make, weights, dict(subject.inputs), reference)
    assert set(spied.got) == set(wanted) - set(free)
    for name, gradient in wanted.items():
        if name not in free:
            torch.testing.assert_close(spied.want[name], gradient, rtol=1e-11, atol=1e-12, msg=name)
            torch.testing.assert_close(spied.got[name], gradient, rtol=1e-11, atol=1e-12, msg=name)
    return outcome


# ------------------------------------------------------------------------------------------ against plain autograd


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_gradient_is_plain_autograds(ranks: int, spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(Net, ranks, monkeypatch)
    outcome = check_against_autograd(Net, some, weights, spied)
    assert {g.section for g in outcome.gradients} == {*(f"blocks.{n}" for n in range(4)), "the model's output"}


class WithoutBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(101, WIDE), Block(), Block()
        self.norm, self.head = nn.LayerNorm(WIDE), nn.Linear(WIDE, 9, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(self.words(tokens)))))  # type: ignore[no-any-return]


def test_a_model_without_blocks_is_one_section(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(WithoutBlocks, 2, monkeypatch)
    outcome = check_against_autograd(WithoutBlocks, some, weights, spied)
    assert {g.section for g in outcome.gradients} == {"the model's output"}


class SharedBlock(Net):
    """ALBERT's way: one block, several times."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def test_a_block_that_is_used_again_is_compared_each_time(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(SharedBlock, 2, monkeypatch)
    outcome = check_against_autograd(SharedBlock, some, weights, spied)
    assert sum(g.parameter == "blocks.0.up.weight" for g in outcome.gradients) == 3


class InPlace(Net):
    """The blocks write into their input, and the model into what they return."""

    class Writing(Block):
        def forward(self, x: torch.Tensor) -> Any:
            x += self.scale
            y = self.down(torch.tanh(self.up(self.norm(x))))
            y += x
            return y

    block = Writing

    def onwards(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        y: torch.Tensor = block(x)
        y += 1
        return y.mul_(0.8)


def test_a_model_that_writes_into_what_it_was_given(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(InPlace, 2, monkeypatch)
    check_against_autograd(InPlace, some, weights, spied)


class TwoTowers(nn.Module):
    """Every block of the second tower uses the first tower's result, and a bias that its first block makes."""

    class Attending(Block):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.across = nn.Linear(WIDE, WIDE)
            self.bias = nn.Linear(WIDE, 3, bias=False) if not number else None

        def forward(self, x: torch.Tensor, states: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
            bias = self.bias(states).sum(-1, keepdim=True) if self.bias is not None else bias
            assert bias is not None
            return super().forward(x + torch.sin(self.across(states)) * bias), bias

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(101, WIDE)
        self.one = nn.ModuleList(Block(n) for n in range(2))
        self.other = nn.ModuleList(self.Attending(n) for n in range(3))
        self.norm, self.head = nn.LayerNorm(WIDE), nn.Linear(WIDE, 9, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, bias = self.words(tokens), None
        for block in self.one:
            states = block(states)
        states, x = self.norm(states), self.words(tokens.flip(1))
        for block in self.other:
            x, bias = block(x, states=states, bias=bias)
        return self.head(x)  # type: ignore[no-any-return]


def test_what_several_blocks_share_is_compared_in_each(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(TwoTowers, 2, monkeypatch)
    judge, met = sections.judged, dict.fromkeys((f"other.{number}" for number in range(3)), 0)

    def judging(section: str, found: list[Difference]) -> list[Gradient]:
        if section in met:
            met[section] += sum(d.size > 0 for d in found if not d.key)
        return judge(section, found)

    monkeypatch.setattr(sections, "judged", judging)
    outcome = backward(some, weights)
    assert outcome.failure is None
    assert max(g.error for g in outcome.gradients) < 1e-12
    # Its own input and the first tower's result; of the first, what comes before it, too; of the others, the bias.
    assert met == {"other.0": 3, "other.1": 3, "other.2": 3}
    for name in weights.names:
        assert name in spied.got, name
        assert spied.want[name].abs().max() > 0, name
    assert spied.want["other.0.bias.weight"].abs().max() > 0


class OwnHeads(Net):
    """Blocks return their attention, too: each rank's own part of it."""

    class Telling(Block):
        def forward(self, x: torch.Tensor) -> Any:
            middle = torch.tanh(self.up(self.norm(x)))
            return x * self.scale + self.down(middle), middle

    block = Telling

    def onwards(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        return block(x)[0]  # type: ignore[no-any-return]


def test_what_is_not_whole_is_left_out(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(OwnHeads, 3, monkeypatch)
    outcome = backward(some, weights)
    assert outcome.failure is None
    assert max(g.error for g in outcome.gradients) < 1e-12
    assert all(len(some) == 1 for some in spied.cotangents[::2])
    assert set(spied.got) == set(weights.names)


# ------------------------------------------------------------------------------------------ memory


def test_earlier_sections_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(Net, 2, monkeypatch)
    MADE.clear()
    alive: list[int] = []
    forward = Block.forward

    def watching(self: Block, x: torch.Tensor) -> Any:
        alive.append(sum(number < self.number - 1 and ref() is not None for number, ref in MADE))
        return forward(self, x)

    monkeypatch.setattr(Block, "forward", watching)
    gc.disable()  # freed at once, not when somebody sweeps
    try:
        backward(some, weights)
    finally:
        gc.enable()
    assert len(alive) == 4 * 3
    assert set(alive) == {0}


# ------------------------------------------------------------------------------------------ real models


def test_llama_with_shared_key_value_heads(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"input_ids": TOKENS, "use_cache": False}
    some, weights = subject(llama, 6, monkeypatch, inputs, of_llama)
    check_against_autograd(llama, some, weights, spied)


def test_alberts_one_block(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"input_ids": TOKENS, "return_dict": True}
    some, weights = subject(albert, 2, monkeypatch, inputs, of_albert)
    check_against_autograd(albert, some, weights, spied)


def test_t5_shares_encoder_states_and_position_biases(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :19] + 1, "use_cache": False, "return_dict": True}
    some, weights = subject(t5, 3, monkeypatch, inputs, of_t5)
    outcome = backward(some, weights)
    assert outcome.failure is None
    assert max(g.error for g in outcome.gradients) < 1e-12
    for side in ("encoder", "decoder"):
        bias = spied.want[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        assert (bias.abs().sum(0) > 0).all(), side  # of every head
    assert set(spied.got) == set(weights.names)


# ------------------------------------------------------------------------------------------ of a real loss


def by_loss(some: Subject, weights: InMemory, spied: Spied) -> tuple[str, Outcome]:
    with default_dtype(torch.float64):
        name, outcome = run_loss(some, weights)
    assert isinstance(outcome, Outcome)
    assert max(g.error for g in outcome.gradients) < 1e-12
    assert [seam.layer for seam in outcome.record.seams].count("the loss") == weights.ranks
    return name, outcome


def test_cross_entropy_is_transformers_own(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(llama, 6, monkeypatch, {"input_ids": TOKENS, "use_cache": False}, of_llama)
    values: list[torch.Tensor] = []
    go_back = _Execution._go_back_from_loss
    monkeypatch.setattr(
        _Execution, "_go_back_from_loss", lambda self, run, loss: (values.append(loss), go_back(self, run, loss))
    )
    assert by_loss(some, weights, spied)[0] == "cross-entropy"
    with default_dtype(torch.float64):
        model = llama().double().eval()
    model.load_state_dict(weights.tensors, strict=False)
    with AllDouble():
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert len(values) == 7  # the reference's and six ranks'
    for value in values:
        torch.testing.assert_close(value.detach(), loss.detach(), rtol=1e-13, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(spied.want[name], parameter.grad, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(spied.got[name], parameter.grad, rtol=1e-9, atol=1e-14)


def test_other_models_have_the_distance_from_fixed_numbers(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(Net, 3, monkeypatch)
    assert by_loss(some, weights, spied)[0] == "mean square distance"
    model = Net().double()
    model.load_state_dict(weights.tensors)
    target = torch.randn(2, 25, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nn.functional.mse_loss(model(TOKENS), target).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(spied.got[name], parameter.grad, rtol=1e-10, atol=1e-14)


def test_a_wrong_gradient_of_the_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(Net, 2, monkeypatch)
    outcome = backward(some, weights)
    spoil(monkeypatch, twice("blocks.1.norm.weight"))
    with default_dtype(torch.float64):
        result = backward_result(some, weights, outcome, run_loss(some, weights))
    assert [finding.tensor for finding in result.findings] == ["blocks.1.norm.weight"]


# ------------------------------------------------------------------------------------------ wrong gradients


def spoil(patch: pytest.MonkeyPatch, change: Callable[[list[Tape]], None]) -> None:
    """Change the ranks' tapes just before they are compared."""
    init = Comparison.__init__

    def spoiling(self: Comparison, reference: Tape | None, ranks: Sequence[Tape], processes: Any) -> None:
        change(list(ranks))
        init(self, reference, ranks, processes)

    patch.setattr(Comparison, "__init__", spoiling)


def twice(name: str) -> Callable[[list[Tape]], None]:
    def change(tapes: list[Tape]) -> None:
        for key, (_, leaf) in tapes[1].leaves.items():
            if key[0] == name and leaf.grad is not None:
                leaf.grad = leaf.grad * 2
        for key, (_, pairs) in tapes[1].products.items():
            if key[0] == name:
                pairs.extend(list(pairs))
        for lookup, (_, pairs) in tapes[1].lookups.items():
            if lookup[0] == name:
                pairs.extend(list(pairs))

    return change


def absent(name: str) -> Callable[[list[Tape]], None]:
    """The rank's parameter was not used, or has no gradient."""

    def change(tapes: list[Tape]) -> None:
        for table in (tapes[0].products, tapes[0].lookups):
            for key in [key for key in table if key[0] == name]:
                del table[key]  # type: ignore[attr-defined]
        for key, (_, leaf) in tapes[0].leaves.items():
            if key[0] == name:
                leaf.grad = None

    return change


def scaled_head(name: str) -> Callable[[list[Tape]], None]:
    """A few output channels of one rank, by a little."""

    def change(tapes: list[Tape]) -> None:
        for key, (_, pairs) in tapes[0].products.items():
            if key[0] == name:
                pairs[:] = [(x, grad * (1 + 1e-7 * (torch.arange(grad.shape[1]) < 3))) for x, grad in pairs]

    return change


SPOILED = [
    *itertools.product([twice], ["blocks.1.norm.weight", "blocks.2.scale", "norm.bias", "head.weight", "words.weight"]),
    *itertools.product([twice], ["blocks.3.up.weight", "blocks.3.down.weight", "blocks.0.up.bias"]),
    *itertools.product([absent], ["blocks.0.up.weight", "blocks.1.norm.bias", "blocks.2.down.bias", "words.weight"]),
    *itertools.product([scaled_head], ["blocks.2.up.weight", "blocks.0.down.weight"]),
]


@pytest.mark.parametrize(("how", "name"), SPOILED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_wrong_gradient_is_found_and_named(how: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(Net, 2, monkeypatch)
    spoil(monkeypatch, how(name))
    outcome = backward(some, weights)
    result = backward_result(some, weights, outcome, None)
    assert result.verdict is Verdict.FAIL
    assert {finding.tensor for finding in result.findings} == {name}
    assert {g.parameter for g in outcome.gradients if g.wrong} == {name}


def test_a_gradient_that_only_ranks_have_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(self: Comparison, reference: Tape | None, ranks: Sequence[Tape], processes: Any) -> None:
        assert reference is not None
        reference.leaves.pop(("blocks.1.scale", ()), None)
        init(self, reference, ranks, processes)

    init = Comparison.__init__
    some, weights = subject(Net, 2, monkeypatch)
    monkeypatch.setattr(Comparison, "__init__", change)
    result = backward_result(some, weights, backward(some, weights), None)
    assert {finding.tensor for finding in result.findings} == {"blocks.1.scale"}


class OtherWayBack(Net):
    """The same numbers forward; on ranks that lack row 0, another gradient."""

    class Turning(Block):
        def forward(self, x: torch.Tensor) -> Any:
            if self.number == 2 and bool((self.up.weight[0] == 0).all()):
                x = x + 0.25 * (x - x.detach())
            return super().forward(x)

    block = Turning


class NoWayBack(Net):
    """Some rank's block breaks down on the way back."""

    class Breaking(Block):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            if self.number == 2 and bool((self.up.weight[0] == 0).all()):
                y.register_hook(_refuse)
            return y

    block = Breaking


def _refuse(grad: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not on this rank")


def test_a_model_that_goes_back_another_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(OtherWayBack, 2, monkeypatch)
    outcome = backward(some, weights)
    assert not any(seam.wrong for seam in outcome.record.seams)
    wrong = [g for g in outcome.gradients if g.wrong]
    assert {g.section for g in wrong} == {"blocks.2"}
    assert "" in {g.parameter for g in wrong}
    texts = [str(f) for f in backward_result(some, weights, outcome, None).findings]
    assert "blocks.2: the gradient of its input, added up over the ranks, is not the unsharded model's" in texts[-1]


def test_ranks_that_break_down_on_the_way_back_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = subject(NoWayBack, 2, monkeypatch)
    result = backward_result(some, weights, backward(some, weights), None)
    assert result.verdict is Verdict.FAIL
    assert "on the way back from blocks.2: not on this rank" in str(result.findings[0])


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_gradients_in_pieces_are_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight's gradient is made a few rows at a time."""
    monkeypatch.setattr(gradients, "CHUNK", rows * WIDE)
    some, weights = subject(Net, 2, monkeypatch)
    outcome = backward(some, weights)
    assert max(g.error for g in outcome.gradients) < 1e-12
    spoil(monkeypatch, scaled_head("blocks.1.up.weight"))
    some, weights = subject(Net, 2, monkeypatch)
    assert {g.parameter for g in backward(some, weights).gradients if g.wrong} == {"blocks.1.up.weight"}


def test_difference_is_a_norm() -> None:
    got, want = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    found = Difference.between("a", got[:1], want[:1]) + Difference.between("a", got[1:], want[1:])
    assert found.count == 12
    assert found.apart == pytest.approx(float((got - want).norm()) ** 2)
    assert found.size == pytest.approx(float(want.norm()) ** 2)
