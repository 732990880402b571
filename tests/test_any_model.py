"""Any model through ``--model``: layers of every usual kind are cut, run, and wrong cuts of them found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests import some_models
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.errors import UsageError
from tpshard.verify.report import Report, Verdict
from tpshard.verify.request import Level, Request
from tpshard.verify.run import verify

CHECKS = ("files", "weights", "forward", "backward", "generic", "self-test")


def verified(name: str, folder: Path, tp: int, changed: str = "", level: Level | None = None) -> Report:
    torch.set_num_threads(1)  # for numbers this small a second thread only gets in the way
    some_models.save(name, folder / "model")
    policy = some_models.save_policy(name, folder / "policy.yaml", changed)
    run(plan_split(folder / "model", folder / "shards", tp, str(policy)))
    return verify(
        Request(folder / "shards", against=folder / "model", level=level, factory="tests.some_models:build", workers=1)
    )


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", some_models.MODELS)
def test_split_verify_merge(name: str, tp: int, tmp_path: Path) -> None:
    report = verified(name, tmp_path, tp)
    checks = {check.name: check for check in report.checks}
    assert {name: checks[name].verdict for name in CHECKS if name in checks} == dict.fromkeys(CHECKS, Verdict.PASS), (
        report
    )
    for each in ("forward", "backward", "generic"):
        assert checks[each].figures["worst_relative_error"] <= 1e-12
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    merged = tmp_path / "merged/model.safetensors"
    assert merged.read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


FAULTS = {
    "gates of an LSTM as one block": ("lstm", "rec: {rule: column, gather: true}", "rec"),
    "gates of a GRU as one block": ("gru", "rec: {rule: column, gather: true}", "rec"),
    "gates of cells as one block": ("cells", "one: {rule: column, gather: true}", "one"),
    "recurrent layer by its inputs": ("rnn", "rec: {rule: row, uneven: true}", "rec"),
    "hidden state not gathered": ("lstm", "rec: {rule: column, parts: 4}", "head"),
    "hidden state of cells not gathered": ("cells", "one: {rule: column, parts: 4}", "two"),
    "states handed on, not gathered": ("stateful", "encoder: {rule: column, parts: 4}", "decoder"),
    "whole layer after one not gathered": ("stateful", "down: replicate", "down"),
    "two directions as one block": ("both ways, row", "head: {rule: row, uneven: true}", "head"),
    "norm whole, its convolution cut": ("images", "norm: replicate", "norm"),
    "depthwise convolution whole, its input cut": ("images", "depth: replicate", "depth"),
    "convolution whole, its input cut": ("images", "point: replicate", "point"),
    "convolution by outputs after one by outputs": ("images", "point: column", "point"),
    "convolution by inputs, said to be by outputs": ("images", "wide: {rule: column, dims: io..}", "groups"),
    "groups not those of the layer before": ("images", "wide: {rule: column, unit: 8, uneven: true}", "groups"),
    "norm of groups whole": ("images", "line.2: replicate", "line.2"),
    "pixels of a channel apart": ("images", "flat: row", "flat"),
    "bias of a row layer on every rank": ("images", "point.bias: replicate\n  point.weight: row", "point"),
    "q, k and v as one block": ("attention", "mha.{in_proj_weight,in_proj_bias}: column", "mha.out_proj"),
    "projection of attention whole": ("attention", "mha.out_proj: replicate", "layers.0.self_attn.out_proj"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_policy_fails_at_the_layer(fault: str, tmp_path: Path) -> None:
    name, changed, layer = FAULTS[fault]
    checks = {check.name: check for check in verified(name, tmp_path, 2, changed, "forward").checks}
    assert checks["weights"].verdict is Verdict.PASS
    assert checks["forward"].verdict is Verdict.FAIL
    assert checks["forward"].findings[0].layer == layer


def test_a_recurrent_layer_whose_input_is_not_whole_is_told_so(tmp_path: Path) -> None:
    checks = verified("lstm", tmp_path, 2, "words: {rule: column, dims: io, uneven: true}", "forward").checks
    (forward,) = (check for check in checks if check.name == "forward")
    assert "rec, rank 0: its input is not whole (cut by words), but the layer wants all of it" in str(
        forward.findings[0]
    )


# ------------------------------------------------------------------------------------------ what cannot be done


class Made(nn.Module):
    """Some layers, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Scaled(nn.LSTM):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(2 * x)


X = some_models.numbers(4, 2, 5)


def packed(net: Any, x: torch.Tensor) -> torch.Tensor:
    y, _ = net.rec(pack_padded_sequence(x, [4, 2]))
    return y.data  # type: ignore[no-any-return]


def leaves(net: Any, x: torch.Tensor) -> torch.Tensor:
    raise SystemExit(0)


def breaks(net: Any, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not today,\nnor tomorrow")


LAYERS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "lstm": lambda: {"rec": nn.LSTM(5, 12)},
    "projected": lambda: {"rec": nn.LSTM(5, 12, proj_size=8)},
    "scaled": lambda: {"rec": Scaled(5, 12)},
    "pair": lambda: {"up": nn.Linear(5, 12), "down": nn.Linear(12, 7)},
    "idle": lambda: {"up": nn.Linear(5, 12), "block": Made(lambda net, x: net.down(x), down=nn.Linear(12, 7)),
                     "spare": Made(lambda net, x: x + 1, dead=nn.Linear(12, 8))},
}  # fmt: skip
GATES = "rec: {rule: column, parts: 4, gather: true}"
PAIR = "up: column\n  down: row"
IDLE = "up: column\n  block.down: row\n  spare.dead: row"
REFUSED: dict[str, tuple[str, Callable[..., Any], str, str]] = {
    "packed sequences": ("lstm", packed, GATES, "rec: LSTM on a PackedSequence cannot be run step by step (give it padded"),
    "proj_size": ("projected", lambda net, x: net.rec(x), GATES, "rec: LSTM with proj_size cannot be run step by step"),
    "own forward": ("scaled", lambda net, x: net.rec(x), GATES, "rec: LSTM with a forward of its own cannot be"),
    "never called": ("pair", lambda net, x: net.up(x), "up: {rule: column, gather: true}\n  down: row", "did not reach 1 cut layers: down (give inputs that do"),
    "weight read, sum elsewhere": ("pair", lambda net, x: F.linear(net.up(x), net.down.weight), PAIR, "down: its weight is read, but the layer is not called (call"),
    "never called, in a block that is": ("idle", lambda net, x: net.spare(net.block(net.up(x))), IDLE, "1 cut layers: spare.dead"),
    "raises": ("pair", breaks, PAIR, "the unsharded model itself does not run: RuntimeError: not today, nor tomorrow"),
    "exits": ("pair", leaves, PAIR, "the unsharded model itself does not run: SystemExit: 0"),
    "random": ("pair", lambda net, x: net.down(torch.dropout(net.up(x), 0.5, True)), PAIR, "differs from itself when run again"),
    "no numbers": ("pair", lambda net, x: net.down(net.up(x)).argmax(-1), PAIR, "returns no floating-point tensor to compare"),
}  # fmt: skip


def of_layers(kind: str, function: Callable[..., Any], rules: str, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(some_models.MODELS, "made", lambda: (Made(function, **LAYERS[kind]()), inputs))
    monkeypatch.setitem(some_models.POLICIES, "made", f"  {rules}")
    return "made"


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, function, rules, said = REFUSED[case]
    report = verified(of_layers(kind, function, rules, (X,), monkeypatch), tmp_path, 2, level="forward")
    (forward,) = (check for check in report.checks if check.name == "forward")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert said in str(forward.reason)
    assert "\n" not in str(forward.reason)


RIGHT: dict[str, tuple[str, Callable[..., Any], str]] = {
    "whole LSTM, packed": ("lstm", packed, "rec: replicate"),
    "whole LSTM with proj_size": ("projected", lambda net, x: net.rec(x), "rec: replicate"),
    "whole LSTM, own forward": ("scaled", lambda net, x: net.rec(x), "rec: replicate"),
    "column layer's weight read": ("pair", lambda net, x: net.down(F.linear(x, net.up.weight, net.up.bias)), PAIR),
    "input changed in place": ("pair", lambda net, x: net.down(net.up(x.mul_(2).add_(1))), PAIR),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_however_it_is_written_passes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, function, rules = RIGHT[case]
    report = verified(of_layers(kind, function, rules, (X,), monkeypatch), tmp_path, 2)
    assert report.verdict is Verdict.PASS, report


def test_whole_layers_that_the_input_does_not_reach_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = "up: column\n  block.down: row\n  spare.dead: replicate"
    name = of_layers("idle", lambda net, x: net.block(net.up(x)), rules, (X,), monkeypatch)
    report = verified(name, tmp_path, 2)
    assert report.verdict is Verdict.PASS
    assert "not reached, whole on every rank: spare.dead" in report.checks[3].notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise AttributeError('no such thing')", "does not import: AttributeError: no such thing"),
        ("import sys; sys.exit(0)", "does not import: SystemExit: 0"),
        ("build =", "does not import: SyntaxError: invalid syntax"),
        ("x = 1", "has no build"),
        ("build = 1", "is not a function"),
        ("def build(): pass", r"failed: TypeError: build\(\) takes 0 positional arguments"),
        ("def build(config): raise SystemExit(0)", "failed: SystemExit: 0"),
        ("def build(config): return 1, 2", r"must return \(module, inputs\), returned tuple"),
        ("from tests.some_models import *\ndef build(config): return Recurrent(nn.GRU(3, 4)), 1, 2", "must return"),
        (
            "from tests.some_models import *\ndef build(config): return nn.LSTM(11, 12), 1",
            "does not fit the checkpoint",
        ),
    ],
)
def test_a_model_file_that_is_no_good_is_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_models.save("tanh", tmp_path / "model")
    run(
        plan_split(
            tmp_path / "model", tmp_path / "shards", 2, str(some_models.save_policy("tanh", tmp_path / "p.yaml"))
        )
    )
    (tmp_path / "of_the_user.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "of_the_user", raising=False)
    with pytest.raises(UsageError, match=said) as caught:
        verify(Request(tmp_path / "shards", factory="of_the_user:build", workers=1))
    assert "\n" not in str(caught.value)
