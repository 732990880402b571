"""Generic weights, the faults that are planted in every run, and self-tests that must not be convinced."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.block_models import Net, cuts_of, of_t5, t5
from tests.in_memory import Cut, InMemory, evenly, random_state, subject_of
from tests.tiny_models import save_model
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.layout import Box
from tpshard.verify import block_products, record, sensitivity
from tpshard.verify.canaries import canaries
from tpshard.verify.execution import Subject, Way, execute
from tpshard.verify.forward import generic_result
from tpshard.verify.generic import GenericWeights
from tpshard.verify.preparation import default_dtype
from tpshard.verify.record import TOLERANCE, Record
from tpshard.verify.report import CheckResult, Report, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify
from tpshard.verify.sensitivity import SEEN, run_generic, self_test, shortened
from tpshard.verify.values import WHOLE

TOKENS = {"tokens": torch.arange(0, 100, 2).reshape(2, 25)}
ALL = {
    "head swap",
    "channel swap",
    "row bias added by every rank",
    "ranks in reverse order",
    "wrong key-value replica",
    "shifted vocabulary range",
}
MASK = 2**64 - 1


def mixed(x: int) -> int:
    """splitmix64, in Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def number(name: str, shape: tuple[int, ...], place: int) -> float:
    """A cell's: where its row begins in the long line, and its column."""
    row, column = divmod(place, shape[-1] if shape else 1)
    begin = mixed((row + int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")) & MASK) % 2**20
    return ((mixed(begin + column) >> 11) / 2**53 * 2 - 1) * math.sqrt(3)


def weights_of(ranks: int, **shapes: tuple[int, ...]) -> InMemory:
    tensors = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    cuts = {n: evenly("column", n.count("o"), t.shape[n.count("o")], ranks) for n, t in tensors.items() if "cut" in n}
    return InMemory(tensors, ranks, cuts)


def whole(weights: Any, name: str) -> torch.Tensor:
    shape = weights.layout(name).shape
    read: torch.Tensor = weights.read(name, WHOLE, Box((0,) * len(shape), shape))
    return read


# ------------------------------------------------------------------------------------------ generic weights


@pytest.mark.parametrize(
    ("name", "shape", "middle", "spread"),
    [
        ("a.weight", (4, 9), 0.0, 1 / 3),
        ("experts.weight", (2, 25, 16), 0.0, 1 / 5),
        ("conv.weight", (4, 3, 16), 0.0, 1 / 4),
        ("a.bias", (7,), 0.0, 0.2),
        ("e_score_correction_bias", (7,), 0.0, 0.05),  # experts stay in reach
        ("norm.weight", (7,), 1.0, 0.2),
        ("scale", (), 1.0, 0.2),
        ("nothing.weight", (0, 5), 0.0, 5**-0.5),
    ],
)
def test_a_number_is_its_name_and_place(name: str, shape: tuple[int, ...], middle: float, spread: float) -> None:
    weights = InMemory({name: torch.zeros(shape)}, 1, {})
    want = [middle + spread * number(name, shape, place) for place in range(math.prod(shape))]
    got = whole(GenericWeights(weights), name)
    assert got.dtype is torch.float64
    np.testing.assert_allclose(got.numpy(), np.array(want).reshape(shape), rtol=1e-13, atol=1e-15)


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(0, 1), st.data())
def test_the_same_for_every_layout(ranks: int, axis: int, data: st.DataObject) -> None:
    """A rank's numbers are the whole's, at its cells; and a region's are those of the whole's region."""
    shape = (13, 11)
    cut = evenly("column", axis, shape[axis], ranks)
    if data.draw(st.booleans()):  # ranks that share
        cut = Cut("column", axis, [cut.runs[rank // 2] for rank in range(ranks)])
    weights = GenericWeights(InMemory({"w": torch.zeros(shape)}, ranks, {"w": cut}))
    everything = whole(GenericWeights(InMemory({"w": torch.zeros(shape)}, 1, {})), "w")
    assert torch.equal(whole(weights, "w"), everything)
    for rank, (first, last) in enumerate(cut.runs):
        own = everything.narrow(axis, first, last - first)
        a, b = (sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in own.shape)
        part = Box((a[0], b[0]), (a[1], b[1]))
        assert torch.equal(weights.read("w", rank, part), own[part.slices()])
        assert weights.held("w", rank) == weights._weights.held("w", rank)


def test_large_places_do_not_repeat() -> None:
    """The last cells of a tensor with more than 2**32."""
    name, shape = "w", (70_000, 70_000)
    layout_only = GenericWeights(InMemory({name: torch.empty(shape, device="meta")}, 1, {}))
    box = Box((69_999, 69_998), (70_000, 70_000))
    want = [number(name, shape, 69_999 * 70_000 + column) * 70_000**-0.5 for column in (69_998, 69_999)]
    np.testing.assert_allclose(layout_only.read(name, WHOLE, box).numpy(), [want], rtol=1e-12)


def test_numbers_look_random() -> None:
    weights = GenericWeights(InMemory({n: torch.zeros(300, 400) for n in ("a.0.w", "a.1.w")}, 1, {}))
    one, other = (whole(weights, name) * 20 for name in weights.names)
    count = one.numel()
    for some in (one, other):
        assert abs(float(some.mean())) < 5 / count**0.5
        assert abs(float(some.var()) - 1) < 5 * (0.8 / count) ** 0.5
        assert float(some.abs().max()) <= 3**0.5
        assert all(len(line.unique()) == len(line) for line in (*some, *some.T))
        assert len(some.unique(dim=0)) == len(some)
        for shift in (1, 400):  # neighbours in a row and in a column
            assert abs(float((some.flatten()[:-shift] * some.flatten()[shift:]).mean())) < 5 / count**0.5
    assert abs(float((one * other).mean())) < 5 / count**0.5


def test_whole_numbers_are_the_checkpoints() -> None:
    weights = InMemory({"position_ids": torch.arange(7)}, 2, {})
    assert whole(GenericWeights(weights), "position_ids").tolist() == list(range(7))


# ------------------------------------------------------------------------------------------ planted faults


@pytest.fixture(scope="module")
def cut_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, kv, tp, changes in (
        ("llama", 3, 6, {"tie_word_embeddings": False}),
        ("gpt2", 2, 3, {}),
        ("bert", 2, 2, {}),
    ):
        save_model(name, folder / name, kv_heads=kv, **changes)
        run(plan_split(folder / name, folder / f"{name}-cut", tp))
        made[name] = folder / f"{name}-cut", folder / name
    return made


def check(report: Report, name: str) -> CheckResult:
    return next(check for check in report.checks if check.name == name)


ABSENT = {
    "llama": {"row bias added by every rank"},
    "gpt2": {"wrong key-value replica"},
    "bert": {"wrong key-value replica"},
}


@pytest.mark.parametrize("long", [sensitivity.LONG, 0], ids=["whole", "shortened"])
@pytest.mark.parametrize("name", ABSENT)
def test_every_planted_fault_is_seen(
    name: str, long: int, cut_models: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "LONG", long)
    cut, source = cut_models[name]
    report = verify(Request(cut, against=source, level="forward", workers=1))
    result = check(report, "self-test")
    assert result.verdict is check(report, "generic").verdict is Verdict.PASS
    assert set(result.figures["not_applicable"]) == ABSENT[name]
    assert set(result.figures["canaries"]) == ALL - ABSENT[name]
    assert min(canary["error"] for canary in result.figures["canaries"].values()) >= 1e-4
    assert result.figures["noise"] <= TOLERANCE / 100
    assert result.covered["planted faults"] == result.covered["seen"] == 5
    skipped = "2 blocks of a make that was run are skipped" in check(report, "generic").notes
    assert skipped is (long == 0)


class Attending(nn.Module):
    """Four heads of five, two key-value heads that two ranks each share; a bias after the sum."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(14)
        sizes = {"q_proj": (14, 20), "k_proj": (14, 10), "v_proj": (14, 10), "o_proj": (20, 14)}
        self.attn = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
        self.up, self.down = nn.Linear(14, 33), nn.Linear(33, 14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        h = self.norm(x)
        q, k, v = (self.attn[f"{name}_proj"](h).view(n, length, -1, 5).transpose(1, 2) for name in "qkv")
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, 20)
        x = x + self.attn["o_proj"](out)
        return x + self.down(torch.tanh(self.up(x)))


class AttendingNet(Net):
    block, count = Attending, 2


def attending_cuts(module: nn.Module, ranks: int) -> dict[str, Cut]:
    cuts = cuts_of(module, ranks)
    for name, value in module.state_dict().items():
        if "q_proj" in name:
            cuts[name] = evenly("column", 0, 20, ranks)
        elif "k_proj" in name or "v_proj" in name:
            cuts[name] = Cut("column", 0, [(5 * (2 * r // ranks), 5 * (2 * r // ranks) + 5) for r in range(ranks)])
        elif name.endswith("o_proj.weight"):
            cuts[name] = evenly("row", 1, value.shape[1], ranks)
    return cuts


def attending(patch: pytest.MonkeyPatch, ranks: int = 4) -> tuple[Subject, InMemory]:
    module = AttendingNet()
    weights = InMemory(random_state(module), ranks, attending_cuts(module, ranks))
    return subject_of(AttendingNet, weights, TOKENS, patch), weights


def visited(subject: Subject) -> set[str]:
    return {layer.path for layer in subject.layers}


def proof(subject: Subject, weights: InMemory) -> CheckResult:
    with default_dtype(torch.float64):
        return self_test(subject, weights, visited(subject))


def test_a_fault_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = attending(monkeypatch)
    sound = GenericWeights(weights)
    planted = {canary.name: canary for canary in canaries(some, weights, visited(some))}
    assert set(planted) == ALL

    def ranks_have(name: str) -> tuple[str, list[torch.Tensor]]:
        plant = planted[name].plants[0]
        bad = GenericWeights(weights, plant.rearrangement)
        shards = weights.layout(plant.tensor).shards
        return plant.tensor, [
            bad.read(plant.tensor, rank, Box((0,) * len(s.shape), s.shape)) for rank, s in enumerate(shards) if s
        ]

    name, have = ranks_have("head swap")
    full = whole(sound, name)
    assert name == "blocks.0.attn.q_proj.weight"
    assert torch.equal(have[0], full[15:20])
    assert torch.equal(have[3], full[0:5])
    assert torch.equal(torch.cat(have[1:3]), full[5:15])
    name, have = ranks_have("channel swap")
    full = whole(sound, name)
    assert name == "blocks.0.up.weight"
    assert torch.equal(have[0][0], full[32])
    assert torch.equal(have[3][-1], full[0])
    assert torch.equal(torch.cat(have)[1:32], full[1:32])
    name, have = ranks_have("ranks in reverse order")
    full = whole(sound, name)
    assert name == "blocks.0.attn.o_proj.weight"
    assert torch.equal(torch.cat(have[::-1], 1), full)
    name, have = ranks_have("wrong key-value replica")
    full = whole(sound, name)
    assert name == "blocks.0.attn.k_proj.weight"
    assert torch.equal(have[0], full[5:])
    assert [torch.equal(h, full[:5]) for h in have] == [False, True, False, False]
    name, have = ranks_have("shifted vocabulary range")
    assert name == "words.weight"
    assert torch.equal(torch.cat(have), whole(sound, name).roll(-1, 0))
    assert planted["row bias added by every rank"].plants[0].doubled == {"blocks.0.attn.o_proj.bias"}
    assert all(len(canary.plants) <= 3 for canary in planted.values())


def test_all_six_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    result = proof(*attending(monkeypatch))
    assert result.verdict is Verdict.PASS
    assert result.covered == {"planted faults": 6, "seen": 6}
    assert set(result.figures["canaries"]) == ALL


def test_faults_are_planted_where_the_input_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = attending(monkeypatch)
    reached = {path for path in visited(some) if "blocks.0" not in path}
    for canary in canaries(some, weights, reached):
        assert all("blocks.0" not in plant.tensor for plant in canary.plants)


# ------------------------------------------------------------------------------------------ self-tests that fail


def no_record(self: Record, *args: Any) -> None:
    """Compares nothing."""


MASKED: dict[str, tuple[Any, str, Any, str]] = {
    "nothing is compared": (Record, "compare", no_record, "a planted head swap in"),
    "all is alike": (record, "difference", lambda got, want: (0.0, False), "a planted head swap in"),
    "the tolerance is a million times larger": (sensitivity, "SEEN", SEEN * 1e8, "less than 1e+01"),
    "all noise is too much": (sensitivity, "NOISE", 1e-20, "another summation order alone makes an error of"),
}


@pytest.mark.parametrize("how", MASKED)
def test_a_comparison_that_sees_nothing_is_inconclusive(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, instead, reason = MASKED[how]
    some, weights = attending(monkeypatch)
    monkeypatch.setattr(where, name, instead)
    result = proof(some, weights)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert reason in str(result.reason)


def test_one_fault_that_is_not_seen_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words at the wrong place, and a comparison that looks at everything but what words do."""
    some, weights = attending(monkeypatch)
    moved = next(c for c in canaries(some, weights, visited(some)) if "vocabulary" in c.name).plants[0].rearrangement
    run_it = sensitivity.execute

    def deaf(subject: Subject, planted: GenericWeights, way: Way) -> Any:
        same = moved is not None and planted._rearranged.moved.keys() == moved.moved.keys()
        return run_it(subject, GenericWeights(weights) if same else planted, way)

    monkeypatch.setattr(sensitivity, "execute", deaf)
    result = proof(some, weights)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.covered == {"planted faults": 6, "seen": 5}
    assert "a planted shifted vocabulary range in words.weight made an error of" in str(result.reason)


def test_rounding_that_is_too_large_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = block_products._in_other_order
    some, weights = attending(monkeypatch)
    monkeypatch.setattr(block_products, "_in_other_order", lambda x, v: exact(x.float(), v.float()).double())
    result = proof(some, weights)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "another summation order alone makes an error of" in str(result.reason)


def test_a_rank_that_breaks_down_has_seen_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careful(AttendingNet):
        def onwards(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
            y = super().onwards(x, block)
            if bool(y.abs().max() > 1e3):
                raise ValueError("too large")
            return y

    module = Careful()
    weights = InMemory(random_state(module), 4, attending_cuts(module, 4))
    result = proof(subject_of(Careful, weights, TOKENS, monkeypatch), weights)
    assert result.verdict is Verdict.PASS


# ------------------------------------------------------------------------------------------ shortened models


def test_a_small_model_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    some, weights = attending(monkeypatch)
    assert shortened(some, weights) is some


def test_t5_is_shortened_to_one_block_of_each_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of each side has the position bias, the second is the first of its make."""
    tokens = TOKENS["tokens"]
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :19] + 1, "use_cache": False, "return_dict": True}
    module = t5()
    weights = InMemory(random_state(module), 3, of_t5(module, 3))
    some = subject_of(t5, weights, inputs, monkeypatch)
    monkeypatch.setattr(sensitivity, "LONG", 0)
    short = shortened(some, weights)
    assert short.skipped == {"encoder.block.2"}
    with default_dtype(torch.float64):
        outcome = run_generic(short, weights, Way(backward=True))
        result = generic_result(short, weights, outcome)
        assert result.verdict is Verdict.PASS
        assert "1 blocks of a make that was run are skipped" in result.notes
        assert not any("encoder.block.2" in layer for layer in outcome.record.visited)
        assert self_test(short, weights, outcome.record.visited).verdict is Verdict.PASS


def test_blocks_that_are_cut_otherwise_are_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net()
    cuts = cuts_of(module, 2)
    cuts["blocks.2.up.weight"] = cuts["blocks.2.up.bias"] = Cut("column", 0, [(0, 10), (10, 33)])
    cuts["blocks.2.down.weight"] = Cut("row", 1, [(0, 10), (10, 33)])
    weights = InMemory(random_state(module), 2, cuts)
    some = subject_of(Net, weights, TOKENS, monkeypatch)
    monkeypatch.setattr(sensitivity, "LONG", 0)
    assert shortened(some, weights).skipped == {"blocks.1", "blocks.3"}


class Reading(nn.Module):
    """A block that reads its last layer's weight instead of calling it: the ranks meet after the block."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(14, 33), nn.Linear(33, 14, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)


class ReadingNet(Net):
    block = Reading


def test_blocks_after_which_the_ranks_meet_are_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ReadingNet()
    weights = InMemory(random_state(module), 2, cuts_of(module, 2))
    some = subject_of(ReadingNet, weights, TOKENS, monkeypatch)
    monkeypatch.setattr(sensitivity, "LONG", 0)
    short = shortened(some, weights)
    with default_dtype(torch.float64):
        assert not any(seam.wrong for seam in execute(some, weights, Way()).record.seams)
        assert not any(seam.wrong for seam in run_generic(short, weights, Way()).record.seams)
    assert short.skipped == frozenset()


def test_a_shortened_model_sees_faults_in_the_blocks_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "LONG", 0)
    module = Net()
    cuts = cuts_of(module, 2)
    cuts["blocks.0.up.bias"] = Cut("column", 0, [(0, 15), (15, 33)])  # not where its weight is cut
    weights = InMemory(random_state(module), 2, cuts)
    some = subject_of(Net, weights, TOKENS, monkeypatch)
    short = shortened(some, weights)
    assert short.skipped == {"blocks.2", "blocks.3"}
    with default_dtype(torch.float64):
        result = generic_result(short, weights, run_generic(short, weights, Way()))
    assert result.verdict is Verdict.FAIL
    assert result.findings[0].layer == "blocks.0.up"
