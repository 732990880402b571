"""The figures in the checkpoint's own dtype: against transformers' own forward, and formulas against NumPy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.tampering import Folder
from tests.tiny_models import build, make_config
from tpshard.checkpoint import open_full, open_shards
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.verify import native
from tpshard.verify.execution import Outcome
from tpshard.verify.native import NativeFigures, _figures, native_dtype, native_figures
from tpshard.verify.preparation import Choice, default_dtype, prepare
from tpshard.verify.record import Record
from tpshard.verify.values import StoredWeights

VOCABULARY = 11


def outcome_of(want: torch.Tensor, got: torch.Tensor) -> Outcome:
    return Outcome(Record(), outputs=[[want], [got], [got * 7]])


def subject_with(vocabulary: int) -> Any:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
    return SimpleNamespace(model=SimpleNamespace(skeleton=SimpleNamespace(config=config)))


def by_numpy(want: np.ndarray, got: np.ndarray) -> NativeFigures:
    def probabilities(logits: np.ndarray) -> np.ndarray:
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))

    p, q = probabilities(want), probabilities(got)
    rows = list(zip(want.reshape(-1, want.shape[-1]), got.reshape(-1, got.shape[-1]), strict=True))
    fives = [len({*np.argsort(-a)[:5]} & {*np.argsort(-b)[:5]}) / 5 for a, b in rows]
    return NativeFigures(
        "float16",
        float(np.abs(got - want).max()),
        float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        float((p * np.log(p / q)).sum(-1).mean()),
        float(np.mean([np.argmax(a) == np.argmax(b) for a, b in rows])),
        float(np.mean(fives)),
    )


def same(one: NativeFigures, other: NativeFigures) -> None:
    a, b = one.as_json(), other.as_json()
    assert a.pop("dtype") == b.pop("dtype")
    assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.5, 3.0])
def test_figures_are_what_numpy_says(noise: float) -> None:
    rng = np.random.default_rng(0)
    want = rng.standard_normal((2, 9, VOCABULARY)) * 2
    got = want + noise * rng.standard_normal(want.shape)
    figures = _figures("float16", outcome_of(torch.tensor(want), torch.tensor(got)), subject_with(VOCABULARY))
    assert isinstance(figures, NativeFigures)
    same(figures, by_numpy(want, got))
    if not noise:
        assert (figures.divergence, figures.top_1, figures.top_5) == (0.0, 1.0, 1.0)
    assert len(figures.table().rows) == 5


@pytest.mark.parametrize(("shape", "vocabulary"), [((2, 9, 11), 12), ((2, 11), 11), ((2, 3, 5), 5)])
def test_what_is_no_logits_has_no_divergence(shape: tuple[int, ...], vocabulary: int) -> None:
    want = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    figures = _figures("float32", outcome_of(want, want + 0.5), subject_with(vocabulary))
    assert isinstance(figures, NativeFigures)
    assert figures.max_abs == pytest.approx(0.5)
    assert (figures.divergence, figures.top_1, figures.top_5) == (None, None, None)
    assert len(figures.table().rows) == 2


def test_outputs_that_cannot_be_compared_are_a_remark() -> None:
    want = torch.randn(2, 9, VOCABULARY)
    bad = want.clone()
    bad[0, 0, 0] = float("nan")
    assert _figures("float16", outcome_of(want, want[:, 1:]), subject_with(VOCABULARY)) == (
        "no figures in float16: rank 0's output is [2, 8, 11], not [2, 9, 11]"
    )
    for pair in ((want, bad), (bad, want), (want * float("inf"), want)):
        text = _figures("float16", outcome_of(*pair), subject_with(VOCABULARY))
        assert text == "no figures in float16: there are numbers that are not finite in its range"


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (["BF16", "BF16", "F32"], torch.bfloat16),
        (["F16", "I64", "I64"], torch.float16),
        (["F8_E4M3", "F8_E4M3", "F32"], torch.float32),
        (["F8_E4M3", "U8"], torch.bfloat16),
        (["F64"], torch.float64),
        (["F4", "F32"], torch.float32),
    ],
)
def test_the_dtype_is_the_commonest_that_one_computes_in(stored: list[str], wanted: torch.dtype) -> None:
    names = tuple(map(str, range(len(stored))))
    weights: Any = SimpleNamespace(names=names, dtype=lambda name: stored[int(name)])
    assert native_dtype(weights) is wanted


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_unsharded_model_is_transformers_own(
    model_type: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared with is the model as transformers would load and run it in that dtype; with one rank, the
    shards compute the same."""
    config = make_config(model_type, num_hidden_layers=2) if model_type != "gpt2" else make_config("gpt2", n_layer=2)
    head = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}.get(model_type, f"{model_type.title()}ForCausalLM")
    build(config, head).to(dtype).save_pretrained(tmp_path / "model")
    run(plan_split(tmp_path / "model", tmp_path / "cut", 1))
    outcomes: list[Outcome] = []
    execute = native.execute
    monkeypatch.setattr(native, "execute", lambda *args: outcomes.append(execute(*args)) or outcomes[-1])
    shards, source = open_shards(tmp_path / "cut"), open_full(tmp_path / "model")
    with StoredWeights(shards, source) as weights, default_dtype(torch.float64):
        subject = prepare(weights, Choice())
        figures = native_figures(subject, weights, Choice())
    assert isinstance(figures, NativeFigures), figures
    assert figures.dtype == str(dtype).removeprefix("torch.")
    assert (figures.max_abs, figures.divergence, figures.top_1, figures.top_5) == (0.0, 0.0, 1.0, 1.0)
    loaded = getattr(transformers, head).from_pretrained(tmp_path / "model", dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        own = loaded.eval()(**subject.inputs).logits
    want = outcomes[0].outputs[0][0]
    assert want.dtype is own.dtype is dtype
    relative = float((want.double() - own.double()).norm() / own.double().norm())
    assert relative <= 2 * torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 else 4)  # a bias is added apart


def test_a_fault_shows_beside_the_verdict_and_decides_nothing(tmp_path: Path) -> None:
    """Figures are of rank 0 against the unsharded model."""
    build(make_config("llama", 2, num_hidden_layers=1), "LlamaForCausalLM").save_pretrained(tmp_path / "model")
    run(plan_split(tmp_path / "model", tmp_path / "cut", 2))
    folder = Folder(tmp_path / "cut")
    folder.randomise("model.layers.0.mlp.down_proj.weight", 1)
    folder.reseal()
    shards, source = open_shards(tmp_path / "cut"), open_full(tmp_path / "model")
    with StoredWeights(shards, source) as weights, default_dtype(torch.float64):
        figures = native_figures(prepare(weights, Choice()), weights, Choice())
    assert isinstance(figures, NativeFigures)
    assert figures.relative > 0.01
    assert figures.divergence is not None
    assert figures.divergence > 0
