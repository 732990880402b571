"""Verify as a whole: what is not proven never passes, whatever the reason."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import a_model, tiny_models
from tests.tampering import Folder, read_file, write_file
from tests.tiny_models import save_model
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.errors import InputError, TpshardError, UsageError
from tpshard.layout import Layout, Span
from tpshard.verify.gradients import Difference
from tpshard.verify.inputs import token_ids
from tpshard.verify.layout import balanced
from tpshard.verify.lockstep import AllDouble, Lockstep, OutOfStepError, RunError
from tpshard.verify.record import difference
from tpshard.verify.report import CheckResult, Finding, Report, Verdict
from tpshard.verify.request import LEVELS, Request
from tpshard.verify.run import verify
from tpshard.verify.sections import judged

POLICY = """
name: net
rules:
  words: {rule: row, dims: io}
  up: column
  down: row
  norm: replicate
  head: {rule: column, gather: true}
  unused: {rule: column, gather: true}
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model("qwen2", folder, kv_heads=2)
    return folder


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The model of tests.a_model on disk, random everywhere; no config.json."""
    torch.manual_seed(3)
    model, _ = a_model.build({})
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    (tmp_path / "net").mkdir()
    tensors = {name: ("F32", list(value.shape), value.numpy().tobytes()) for name, value in state.items()}
    write_file(tmp_path / "net/model.safetensors", {"format": "pt"}, tensors)
    (tmp_path / "net.yaml").write_text(POLICY)
    return tmp_path / "net"


def split(source: Path, tp: int, policy: str = "auto") -> Path:
    target = source.parent / f"{source.name}-tp{tp}"
    if not target.exists():
        run(plan_split(source, target, tp, policy))
    return target


def split_net(net: Path, tp: int = 2) -> Path:
    return split(net, tp, str(net.parent / "net.yaml"))


def verdicts(report: Report) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in report.checks}


# ------------------------------------------------------------------------------------------ verdicts


def test_a_check_that_covered_nothing_never_passes() -> None:
    assert CheckResult("files").verdict is Verdict.INCONCLUSIVE
    assert CheckResult("files", covered={"files": 0, "ranks": 2}).verdict is Verdict.INCONCLUSIVE
    assert CheckResult("files", covered={"files": 1}).verdict is Verdict.PASS
    assert CheckResult("files", covered={"files": 1}, unproven="no").verdict is Verdict.INCONCLUSIVE
    assert Report(()).verdict is Verdict.INCONCLUSIVE


def test_the_worst_check_decides() -> None:
    good, open_ = CheckResult("forward", covered={"n": 1}), CheckResult("layout", unproven="unknown model")
    bad = CheckResult("weights", (Finding("wrong"),), {"n": 1})
    assert Report((good, bad, open_)).verdict is Verdict.FAIL
    assert Report((good, open_)).verdict is Verdict.PASS  # the model itself was run
    assert Report((CheckResult("files", covered={"n": 1}), open_)).verdict is Verdict.INCONCLUSIVE
    assert [verdict.exit_code for verdict in Verdict] == [0, 1, 4]


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_runs_the_checks_up_to_it(level: Any, llama: Path) -> None:
    report = verify(Request(split(llama, 2), against=llama, level=level, workers=1))
    model = ["generic", "self-test"] if level in ("forward", "backward") else []
    assert [check.name for check in report.checks] == [*LEVELS[: LEVELS.index(level) + 1], *model]
    assert report.verdict is Verdict.PASS


def test_without_the_source_its_digests_stand_in(llama: Path) -> None:
    report = verify(Request(split(llama, 2), workers=1))
    assert report.verdict is Verdict.PASS
    assert "digests recorded of the source" in report.checks[1].notes[0]


def test_every_cell_of_the_source_has_a_holder(net: Path, tmp_path: Path) -> None:
    """A word that no token names is in no shard: with the source at hand and without."""

    def all_but_the_last(layout: Layout) -> Layout:
        return Layout.along(layout.shape, 0, [(Span(0, 50),), (Span(50, 100),)], [50, 50])

    conversion = plan_split(net, tmp_path / "shards", 2, str(tmp_path / "net.yaml"))
    items = [
        replace(i, want=all_but_the_last(i.want)) if "words" in i.stored.name else i for i in conversion.plan.items
    ]
    run(replace(conversion, plan=replace(conversion.plan, items=tuple(items))))
    for against in (net, None):
        report = verify(Request(tmp_path / "shards", against=against, level="weights", workers=1))
        (finding,) = report.checks[1].findings
        assert str(finding) == "words.weight: cells [100, 0] to [100, 13] are held by no rank"


def test_the_source_is_not_the_one_that_was_cut(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model("qwen2", other, kv_heads=2)
    metadata, tensors = read_file(other / "model.safetensors")
    name = "model.norm.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[:4] + bytes([data[4] ^ 1]) + data[5:])
    write_file(other / "model.safetensors", metadata, tensors)
    report = verify(Request(split(llama, 2), against=other, level="weights", workers=1))
    texts = [str(finding) for finding in report.checks[1].findings]
    assert report.verdict is Verdict.FAIL
    assert any("model.norm.weight: the source's bytes are not those that were cut" in text for text in texts)
    assert any("model.norm.weight, rank 1: first bad element [1]" in text for text in texts)


def test_not_a_shard_folder(llama: Path) -> None:
    with pytest.raises(InputError, match=r"has no tpshard.json"):
        verify(Request(llama))


def test_a_verdict_is_not_kept(llama: Path, tmp_path: Path) -> None:
    """The same request of the same folder, changed in between."""
    run(plan_split(llama, tmp_path / "shards", 2))
    request = Request(tmp_path / "shards", against=llama, level="weights", workers=1)
    assert verify(request).verdict is Verdict.PASS
    Folder(tmp_path / "shards").flip_bit("model.norm.weight", 1, 0)
    assert verify(request).verdict is Verdict.FAIL


# ------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(
    ("stored", "found"),
    [(b"\x00\x00\x00\x00", b"\x00\x00\x00\x80"), (b"\x00\x00\xc0\x7f", b"\x01\x00\xc0\x7f")],
    ids=["zero and -0.0", "one NaN and another"],
)
def test_bytes_are_compared_and_not_numbers(stored: bytes, found: bytes, tmp_path: Path) -> None:
    source, name = tmp_path / "model", "model.layers.1.mlp.up_proj.weight"
    save_model("qwen2", source, kv_heads=2)
    metadata, tensors = read_file(source / "model.safetensors")
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[: 30 * 44 * 4] + stored + data[30 * 44 * 4 + 4 :])  # row 30: row 4 of rank 1
    write_file(source / "model.safetensors", metadata, tensors)
    folder = Folder(split(source, 2))
    folder.set_bytes(name, 1, 4 * 44 * 4, found)
    folder.reseal()
    (finding,) = verify(Request(folder.path, against=source, level="weights", workers=1)).checks[1].findings
    assert f"{name}, rank 1: first bad element [4, 0]" in str(finding)


def test_padding_must_be_zero(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "padded.yaml").write_text(
        "name: padded\nextends: llama\nrules:\n  lm_head: {rule: column, gather: true, pad: 64}\n"
    )
    target = tmp_path / "padded"
    run(plan_split(llama, target, 2, str(tmp_path / "padded.yaml")))
    assert verify(Request(target, against=llama, workers=1)).verdict is Verdict.PASS
    run(plan_merge(target, tmp_path / "merged"))
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    folder = Folder(target)
    folder.flip_bit("lm_head.weight", 1, -3)
    folder.reseal()
    report = verify(Request(target, against=llama, level="weights", workers=1))
    assert "lm_head.weight, rank 1: padding at [511, 43] is not zero" in str(report.checks[1].findings[0])


def test_first_bad_element_is_named_with_its_bytes(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "shards"
    run(plan_split(llama, target, 2))
    folder, name = Folder(target), "model.layers.1.mlp.down_proj.weight"
    old = np.frombuffer(read_file(folder.file(1))[1][name][2], np.uint32).reshape(44, 26)
    folder.set_bytes(name, 1, (5 * 26 + 7) * 4, b"\x01\x02\x03\x04")
    folder.reseal()
    (finding,) = verify(Request(target, against=llama, level="weights", workers=1)).checks[1].findings
    assert str(finding) == f"{name}, rank 1: first bad element [5, 7]: 0x04030201, want 0x{old[5, 7]:08x}"


# ------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_never_pass(value: float, llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_model("qwen2", source, kv_heads=2)
    metadata, tensors = read_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[:40] + np.float32(value).tobytes() + data[44:])
    write_file(source / "model.safetensors", metadata, tensors)
    report = verify(Request(split(source, 2), against=source, workers=1))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert f"{name}: the source holds NaN or infinite values" in str(report.checks[3].reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["NobodysForCausalLM"]}, "does not know NobodysForCausalLM"),
        (
            {"architectures": ["NobodysForCausalLM"], "auto_map": {"AutoModel": "x.Y"}},
            r"its own code (auto_map) is never run",
        ),
        ({"architectures": None}, "names no architecture"),
    ],
)
def test_a_model_that_cannot_be_made_is_inconclusive(
    fields: dict[str, Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    save_model("qwen2", source, kv_heads=2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    report = verify(Request(split(source, 2), against=source, workers=1))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert reason in str(report.checks[3].reason)
    assert report.checks[4].name == "layers"
    assert report.checks[4].verdict is Verdict.PASS


def test_without_torch_the_forward_is_inconclusive(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = verify(Request(split(llama, 2), against=llama, workers=1))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "torch is not installed" in str(report.checks[3].reason)


@pytest.mark.parametrize("tp", [2, 3, 5])
def test_any_model_by_a_function(tp: int, net: Path) -> None:
    report = verify(Request(split_net(net, tp), against=net, factory="tests.a_model:build", workers=1))
    assert verdicts(report) == {
        "files": Verdict.PASS,
        "weights": Verdict.PASS,
        "layout": Verdict.INCONCLUSIVE,  # nothing is known of this architecture but its policy
        "forward": Verdict.PASS,
        "backward": Verdict.PASS,
        "generic": Verdict.PASS,
        "self-test": Verdict.PASS,
    }
    assert report.verdict is Verdict.PASS
    assert report.checks[3].figures["gathers"] == 2
    assert report.checks[3].figures["worst_relative_error"] <= 1e-12


def test_a_cut_layer_that_the_input_does_not_reach(net: Path) -> None:
    report = verify(Request(split_net(net), against=net, factory="tests.a_model:build_partly_used", workers=1))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "did not reach 1 cut layers: unused" in str(report.checks[3].reason)


@pytest.mark.parametrize(
    ("factory", "said"),
    [("build_breaking", "broke down after .*not on this rank"), ("build_other_way", "different layers")],
)
def test_a_rank_that_breaks_down_fails_and_nothing_hangs(factory: str, said: str, net: Path) -> None:
    before = threading.active_count()
    report = verify(Request(split_net(net), against=net, factory=f"tests.a_model:{factory}", workers=1))
    assert report.verdict is Verdict.FAIL
    assert any(pytest.importorskip("re").search(said, str(finding)) for finding in report.checks[3].findings)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nonsense", "is not package.module:function"),
        ("tests.no_such:build", "does not import"),
        ("tests.a_model:no_such", "has no no_such"),
        ("tests.a_model:TOKENS", "failed|not a function"),
        ("tests.a_model:build_nothing", r"must return \(module, inputs\)"),
        ("tests.a_model:build_another", "does not fit the checkpoint"),
    ],
)
def test_a_bad_model_function_is_a_usage_error(factory: str, said: str, net: Path) -> None:
    with pytest.raises(UsageError, match=said):
        verify(Request(split_net(net), against=net, factory=factory, workers=1))


def test_one_element_off_is_found_by_the_forward_alone(llama: Path, tmp_path: Path) -> None:
    """With the source at hand the weights check finds it first; the forward does so too, and names the layer."""
    target = tmp_path / "shards"
    run(plan_split(llama, target, 2))
    folder, name = Folder(target), "model.layers.1.mlp.up_proj.weight"
    data = bytearray(read_file(folder.file(1))[1][name][2])
    value = np.frombuffer(data, np.float32)[30]
    folder.set_bytes(name, 1, 120, np.float32(value + 1e-3).tobytes())
    folder.reseal()
    forward = verify(Request(target, against=llama, workers=1)).checks[3]
    assert (forward.findings[0].layer, forward.findings[0].rank) == ("model.layers.1.mlp.up_proj", 1)
    assert 1e-6 < forward.figures["worst_relative_error"] < 1


def test_seeds_change_the_tokens_and_every_stratum_is_met() -> None:
    one, other = token_ids(1003, 99, 6, 0), token_ids(1003, 99, 6, 1)
    assert one.shape == (2, 24)
    assert not torch.equal(one, other)
    assert one.min() < 1003 / 48
    assert one.max() >= 1003 * 47 // 48
    assert len(one.unique()) == 48
    assert token_ids(1003, 99, 100, 0).shape == (2, 50)  # a token for each of a hundred ranks
    assert token_ids(5, 99, 2, 0).max() <= 4


def test_every_position_is_compared(llama: Path, tmp_path: Path) -> None:
    """Words that no sequence begins or ends with: their embedding is wrong on the rank that holds them."""
    run(plan_split(llama, tmp_path / "shards", 2))
    folder, name = Folder(tmp_path / "shards"), "model.embed_tokens.weight"
    tokens = token_ids(1003, 38, 2, 0)
    outer = {int(word) for word in tokens[:, [0, -1]].flatten()}
    inner = {int(word) for word in tokens[:, 1:-1].flatten()} - outer

    def spoilt(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[[word for word in inner if word < 502]] += 1
        return rows

    folder.rearrange(name, 0, spoilt)
    folder.reseal()
    forward = verify(Request(folder.path, against=llama, level="forward", workers=1)).checks[3]
    assert forward.findings[0].layer == "model.embed_tokens"


def test_a_tensor_that_the_checkpoint_lacks_is_not_made_up(tmp_path: Path) -> None:
    source, name = tmp_path / "model", "model.layers.1.mlp.up_proj.weight"
    save_model("qwen2", source, kv_heads=2)
    metadata, tensors = read_file(source / "model.safetensors")
    del tensors[name]
    write_file(source / "model.safetensors", metadata, tensors)
    report = verify(Request(split(source, 2), against=source, workers=1))
    assert report.verdict is Verdict.INCONCLUSIVE
    assert f"the checkpoint gives Qwen2ForCausalLM no {name} (1 such tensors)" in str(report.checks[3].reason)


def test_an_output_more_than_the_ranks_have_is_found(net: Path) -> None:
    factory = "tests.a_model:build_losing_an_output"
    report = verify(Request(split_net(net), against=net, level="forward", factory=factory, workers=1))
    assert verdicts(report)["forward"] is Verdict.FAIL


@pytest.mark.parametrize("factory", ["build_turning_gradients", "build_forgetting_gradients"])
def test_what_is_wrong_on_the_way_back_only(factory: str, net: Path) -> None:
    """A loss that is a sum would not see the one, a comparison of the gradients that there are not the other."""
    report = verify(Request(split_net(net), against=net, factory=f"tests.a_model:{factory}", workers=1))
    found = verdicts(report)
    assert found["forward"] is Verdict.PASS
    assert found["backward"] is Verdict.FAIL
    assert report.checks[4].figures["worst_relative_error"] > 1e-3  # of the random cotangents, not of the loss


def test_cells_that_moved_together_are_told_and_their_function_is_equal(llama: Path, tmp_path: Path) -> None:
    """Channels in another order in up, gate and down; then in up and gate only."""
    run(plan_split(llama, tmp_path / "shards", 2))
    folder, layer = Folder(tmp_path / "shards"), "model.layers.1.mlp"
    for leaf in ("up_proj", "gate_proj"):
        folder.rearrange(f"{layer}.{leaf}.weight", 1, lambda rows: rows[::-1])
    folder.rearrange(f"{layer}.down_proj.weight", 1, lambda rows: rows[:, ::-1])
    folder.reseal()
    report = verify(Request(folder.path, against=llama, workers=1))
    (found,) = [name for name, verdict in verdicts(report).items() if verdict is not Verdict.PASS]
    assert found == "weights"
    note = f"the same places in {layer}.gate_proj, {layer}.up_proj, but all that is whole is the same"
    assert any(note in text for text in report.checks[3].notes)
    assert report.checks[3].figures["worst_relative_error"] < 1e-12

    folder.rearrange(f"{layer}.down_proj.weight", 1, lambda rows: rows[:, ::-1])
    folder.reseal()
    report = verify(Request(folder.path, against=llama, workers=1))
    assert report.checks[3].findings[0].layer == f"{layer}.gate_proj"
    assert verdicts(report)["backward"] is not Verdict.PASS


def test_isolate_lists_every_faulty_layer(llama: Path, tmp_path: Path) -> None:
    run(plan_split(llama, tmp_path / "shards", 2))
    folder = Folder(tmp_path / "shards")
    for layer, leaf in ((0, "mlp.up_proj"), (1, "self_attn.q_proj"), (2, "mlp.down_proj")):
        folder.set_bytes(f"model.layers.{layer}.{leaf}.weight", 1, 0, b"\x00\x00\x80\x3f")
    folder.reseal()
    request = Request(folder.path, against=llama, level="forward", workers=1)
    assert [finding.layer for finding in verify(request).checks[3].findings] == ["model.layers.0.mlp.up_proj"]
    found = [finding.layer for finding in verify(replace(request, isolate=True)).checks[3].findings]
    assert found[0] == "model.layers.0.mlp.up_proj"
    assert {"model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"} <= set(found)
    assert not any("layers.1.mlp" in str(layer) or "layers.2.self_attn" in str(layer) for layer in found)


def test_experts_that_no_token_reaches_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.verify.inputs.MOST_SEQUENCES", 2)
    sizes = tiny_models.FREE | {"num_local_experts": 70, "num_experts_per_tok": 1}
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    tiny_models.build(config, tiny_models.word_head(config)).save_pretrained(tmp_path / "model")
    (tmp_path / "whole.yaml").write_text("name: whole\ndefault: replicate\nrules: {}\n")
    run(plan_split(tmp_path / "model", tmp_path / "shards", 2, str(tmp_path / "whole.yaml")))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "model", level="forward", workers=1))
    told = [note for note in report.checks[3].notes if "experts were not reached" in note]
    assert len(told) == 2 * 3  # gate_up_proj and down_proj of three layers
    assert all(
        re.search(r"experts\.\w+: \d+ of 70 experts were not reached \(\d+, \d+, \d+, \.\.\.\)$", note) for note in told
    )


def test_an_expert_that_no_token_reaches_is_proven_by_its_siblings_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpshard.verify.inputs.MOST_SEQUENCES", 2)
    sizes = tiny_models.FREE | {
        "num_local_experts": 24,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "vocab_size": 211,
    }
    config = transformers.AutoConfig.for_model("mixtral", **sizes)
    source = tmp_path / "model"
    tiny_models.build(config, tiny_models.word_head(config)).save_pretrained(source)
    run(plan_split(source, tmp_path / "shards", 2))
    right = verify(Request(tmp_path / "shards", against=source, level="forward", workers=1))
    assert right.verdict is Verdict.PASS, right
    idle = next(number for note in right.checks[3].notes for number in re.findall(r"not reached \(\d+, (\d+),", note))

    odd = "name: odd\nextends: moe\nrules:\n  experts.#.{w1,w3}: {rule: column, parts: 2}\n"
    odd += "  experts.#.w2: {rule: row, parts: 2}\n"
    (tmp_path / "odd.yaml").write_text(odd.replace("#", idle))
    run(plan_split(source, tmp_path / "odd", 2, str(tmp_path / "odd.yaml")))
    report = verify(Request(tmp_path / "odd", against=source, level="forward", workers=1))
    files, weights, layout, forward, *_ = report.checks
    assert (files.verdict, weights.verdict, layout.verdict) == (Verdict.PASS, Verdict.PASS, Verdict.FAIL)
    tensor = f"model.layers.0.block_sparse_moe.experts.{idle}.w1.weight"
    assert layout.findings[0].tensor == tensor
    assert forward.verdict is Verdict.INCONCLUSIVE
    assert forward.unproven is not None
    assert f"no token reached {tensor} (1 experts of model.layers.0.mlp.experts.gate_up_proj)" in forward.unproven


# ------------------------------------------------------------------------------------------ comparing


def test_difference_is_never_fooled() -> None:
    torch.manual_seed(0)
    want = torch.randn(3, 4, 7, dtype=torch.float64)
    assert difference(want.clone(), want) == (0.0, False)
    for bad in (float("nan"), float("inf")):
        got = want.clone()
        got[2, 3, 6] = bad
        assert difference(got, want) == (float("inf"), True)
    assert difference(want[:, :, :6], want) == (float("inf"), True)  # never broadcast
    assert difference(want[:1], want)[1]
    assert difference(torch.ones(3, 1), torch.ones(1, 3))[1]
    tiny = want.clone()
    tiny[1, 2, 3] += 1e-8
    assert difference(tiny, want)[1]
    one_position = want.clone()
    one_position[0, 1] *= 1 + 3e-10  # within tolerance over all, not in this position
    assert difference(one_position, want)[1]
    many = torch.randn(2, 24, 50, dtype=torch.float64)
    one_of_many = many.clone()
    one_of_many[1, 7] *= 1 + 2e-10  # a mean over all positions is 3e-11
    assert difference(one_of_many, many)[1]
    alone = torch.randn(
        40, 1, dtype=torch.float64
    )  # one number at each position: rounding is no fault where it is small
    alone[7] = 1e-8
    assert not difference(alone + 3e-16, alone)[1]
    assert difference(alone + 1e-11, alone)[1]
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert difference(zeros, zeros) == (0.0, False)
    assert difference(zeros + 1e-300, zeros)[1]


def test_a_gradient_that_is_no_number_is_wrong() -> None:
    right, no_number = Difference("a", 0.0, 4.0, 4), Difference("b", float("nan"), 4.0, 4)
    assert [(g.error, g.wrong) for g in judged("block", [right, no_number])] == [(0.0, False), (float("inf"), True)]


def test_lockstep_gives_everybody_everything_in_turn() -> None:
    lock = Lockstep(range(3))
    order: list[int] = []

    def body(me: int) -> list[Any]:
        seen = []
        for step in range(4):
            order.append(me)
            seen.append(lock.here(me, f"step {step}", (me, step)))
        return seen

    results = lock.run([lambda me=me: body(me) for me in range(3)])  # type: ignore[misc]
    assert results == [[[(r, step) for r in range(3)] for step in range(4)]] * 3
    assert order == [0, 1, 2] * 4


def test_lockstep_ends_when_one_run_takes_another_way() -> None:
    lock = Lockstep(range(3))

    def body(me: int) -> None:
        lock.here(me, "first", me)
        if me != 1:
            lock.here(me, "second", me)

    with pytest.raises(RunError) as caught:
        lock.run([lambda me=me: body(me) for me in range(3)])  # type: ignore[misc]
    assert isinstance(caught.value.cause, OutOfStepError)


def test_all_double_stays_double() -> None:
    with AllDouble():
        x = torch.ones(3, dtype=torch.float64)
        assert x.float().dtype is torch.float64
        assert x.to(torch.float32).dtype is torch.float64
        assert torch.softmax(x, -1, dtype=torch.float32).dtype is torch.float64


def test_balanced_is_what_numpy_says() -> None:
    assert [len(balanced(1003, 6, rank)) for rank in range(6)] == [168, 167, 167, 167, 167, 167]


def test_cells_that_nobody_holds_are_refused() -> None:
    layout = Layout.along((7,), 0, [(Span(0, 3),), (Span(3, 6),)], [3, 3])
    with pytest.raises(TpshardError, match=r"cells \[6\] to \[6\] are held by no rank"):
        layout.tiles()
