"""What verify says of bad input: one clear line, the right verdict and exit code, no traceback, no hang."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import a_model
from tests.tampering import Folder, Tensors, read_file, write_file
from tests.test_verify import POLICY, split_net
from tests.tiny_models import save_model
from tpshard.cli.main import _run
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.errors import UsageError
from tpshard.layout import Box
from tpshard.verify import files, native
from tpshard.verify.inputs import token_ids
from tpshard.verify.models import Recipe
from tpshard.verify.report import CheckResult, Report, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify
from tpshard.verify.values import WHOLE, StoredWeights

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its shards, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    save_model("qwen2", folder / "model", kv_heads=2, num_hidden_layers=2)
    run(plan_split(folder / "model", folder / "shards", 2))
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The model of tests.a_model, random everywhere; no config.json."""
    torch.manual_seed(3)
    state = {n: torch.randn_like(value) for n, value in a_model.build({})[0].state_dict().items()}
    return net_of(tmp_path, {n: ("F32", list(value.shape), value.numpy().tobytes()) for n, value in state.items()})


def net_of(folder: Path, tensors: Tensors) -> Path:
    (folder / "net").mkdir()
    write_file(folder / "net/model.safetensors", {"format": "pt"}, tensors)
    (folder / "net.yaml").write_text(POLICY)
    return folder / "net"


@pytest.fixture(autouse=True)
def no_run_is_left_behind() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def said(capsys: Capture, *words: str | Path) -> tuple[int, str, str]:
    """Exit code, output and the error line of ``tpshard verify``."""
    code = _run(["verify", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 1, err
    return code, out, err


def checks(report: Report) -> dict[str, CheckResult]:
    assert len({check.name for check in report.checks}) == len(report.checks), "a check is told twice"
    return {check.name: check for check in report.checks}


def net_report(net: Path, build: str, **more: Any) -> Report:
    return verify(Request(split_net(net), against=net, factory=f"tests.a_model:{build}", workers=1, **more))


def change_tensor(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    metadata, tensors = read_file(path)
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, change(data))
    write_file(path, metadata, tensors)


# ------------------------------------------------------------------------------------------ files that change


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    """Other weights, of the same size."""
    data = bytearray(path.read_bytes())
    data[-4000:] = bytes(4000)
    path.write_bytes(data)


def replace(path: Path) -> None:
    """The same bytes in another file: a copy that was moved into place."""
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


CHANGES = [
    (vanish, "No such file or directory"),
    (truncate, r"ends at byte|changed while it was being read"),
    (rewrite, "changed while it was being read"),
    (replace, "changed while it was being read"),
]
changes = pytest.mark.parametrize(("change", "line"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])


WEIGHTS, MODEL = "tpshard.verify.run.check_weights", "tpshard.verify.model_checks.check_model"


@changes
@pytest.mark.parametrize(("stage", "which"), [(WEIGHTS, "shard"), (WEIGHTS, "source"), (MODEL, "shard")])
def test_a_file_that_changes_between_two_checks(
    change: Any, line: str, which: str, stage: str, model: Path, shards: Path, capsys: Capture, monkeypatch: Any
) -> None:
    path = Folder(shards).file(1) if which == "shard" else model / "model.safetensors"
    module, _, name = stage.rpartition(".")
    check = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(stage, lambda *args: (change(path), check(*args))[1])
    code, out, err = said(capsys, shards, "--against", model, "--level", "forward")
    assert (code, out) == (5, "")
    assert re.search(line, err), err
    assert str(path) in err


@pytest.mark.parametrize(
    ("change", "line", "holder"),
    [
        (vanish, "No such file", WHOLE), (vanish, "No such file", 1), (truncate, "ends at byte", 0),
        (truncate, "ends at byte", 1), (rewrite, "changed while", WHOLE), (rewrite, "changed while", 1),
    ],
)  # fmt: skip
def test_a_file_that_changes_while_the_model_runs(
    change: Any, line: str, holder: int, model: Path, shards: Path, capsys: Capture, monkeypatch: Any
) -> None:
    """In whichever run it is met: the file has failed, the shards have not."""
    path = Folder(shards).file(holder) if holder != WHOLE else model / "model.safetensors"
    read, done = StoredWeights._read, []

    def reading(self: StoredWeights, stored: Any, rank: int, source: Any, box: Box) -> torch.Tensor:
        of_path = source._checkpoint.files[0].path.parent == path.parent and (holder in (rank, WHOLE))
        if of_path and not done and "layers.1" in stored.name:
            source.close()  # as if others had been read in between
            change(path)
            done.append(path)
        return read(self, stored, rank, source, box)

    monkeypatch.setattr(StoredWeights, "_read", reading)
    code, out, err = said(capsys, shards, "--against", model, "--level", "forward")
    assert done
    assert (code, out) == (5, "")
    assert re.search(line, err), err


@pytest.mark.parametrize("change", [vanish, truncate, rewrite])
def test_a_shard_that_changes_while_files_are_checked(
    change: Any, shards: Path, capsys: Capture, monkeypatch: Any
) -> None:
    """After its header was read, before its digest was: found like any other change."""
    file_digest, file = files.file_digest, Folder(shards).file(1)

    def late(path: Path, *more: Any) -> str:
        if path == file:
            change(file)
        return file_digest(path, *more)

    monkeypatch.setattr(files, "file_digest", late)
    code, out, _ = said(capsys, shards, "--level", "files")
    assert code == 1
    told = {vanish: "is missing", truncate: "its header cannot be read", rewrite: "the manifest says"}
    assert told[change] in out


@pytest.mark.parametrize(
    "error", [MemoryError("no more"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("holder", [WHOLE, 0, 1])
def test_memory_that_is_short_is_no_fault_of_the_shards(
    error: Exception, holder: int, model: Path, shards: Path, capsys: Capture, monkeypatch: Any
) -> None:
    read = StoredWeights.read

    def reading(self: StoredWeights, name: str, where: int, box: Box) -> torch.Tensor:
        if where == holder and "layers.1" in name:
            raise error
        return read(self, name, where, box)

    monkeypatch.setattr(StoredWeights, "read", reading)
    code, out, err = said(capsys, shards, "--against", model)
    assert (code, out) == (5, "")
    assert "not enough memory" in err


# ------------------------------------------------------------------------------------------ config.json

OTHER_CONFIGS: dict[str, dict[str, Any]] = {
    "rope": {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
    "activation": {"hidden_act": "gelu"},
    "norms": {"rms_norm_eps": 0.1},
    "heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20},
}
other_configs = pytest.mark.parametrize("fields", OTHER_CONFIGS.values(), ids=OTHER_CONFIGS)


@other_configs
def test_another_config_is_not_the_one_that_was_carried_over(fields: dict[str, Any], shards: Path) -> None:
    Folder(shards).edit_config(**fields)
    report = verify(Request(shards, level="files", workers=1))
    assert report.verdict is Verdict.FAIL
    assert [finding.file for finding in report.checks[0].findings] == ["config.json"]


@other_configs
def test_another_config_that_is_sealed_again_is_not_the_sources(
    fields: dict[str, Any], model: Path, shards: Path
) -> None:
    folder = Folder(shards)
    folder.edit_config(**fields)
    folder.reseal()
    report = verify(Request(shards, against=model, level="weights", workers=1))
    assert str(report.checks[1].findings[0]) == "config.json: is not the source's"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}, {"layout", "forward"}),
        ({"num_attention_heads": 5}, {"layout"}),
        ({"hidden_size": 88}, set()),
        ({"num_hidden_layers": 4}, set()),
    ],
)
def test_sizes_that_do_not_fit_are_found_without_the_source(
    fields: dict[str, Any], found: set[str], shards: Path
) -> None:
    folder = Folder(shards)
    folder.edit_config(**fields)
    folder.reseal()
    report = verify(Request(shards, workers=1))
    assert found <= {check.name for check in report.checks if check.verdict is Verdict.FAIL}
    assert report.verdict is not Verdict.PASS


def test_what_a_config_says_besides_sizes_is_believed_without_the_source(shards: Path) -> None:
    """Both the unsharded and the sharded model are what it says: nothing differs. docs/verify.md says so."""
    folder = Folder(shards)
    folder.edit_config(**OTHER_CONFIGS["rope"], **OTHER_CONFIGS["activation"])
    folder.reseal()
    assert verify(Request(shards, workers=1)).verdict is Verdict.PASS


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', ""])
def test_a_broken_config(text: str, model: Path, shards: Path, capsys: Capture) -> None:
    (shards / "config.json").write_text(text)
    code, out, _ = said(capsys, shards, "--against", model)
    assert code == 1
    assert "config.json: digest is" in out
    (model / "config.json").write_text(text)
    code, out, err = said(capsys, shards, "--against", model)
    assert (code, out) == (3, "")
    assert str(model / "config.json") in err


def test_no_config(model: Path, shards: Path, capsys: Capture) -> None:
    (model / "config.json").unlink()
    code, out, _ = said(capsys, shards, "--against", model)
    assert code == 4
    assert "config.json names no architecture" in out
    (shards / "config.json").unlink()
    code, out, _ = said(capsys, shards)
    assert code == 1
    assert "config.json: is missing" in out


ODD: list[dict[str, Any]] = [
    {"architectures": {"a": 1}}, {"architectures": []}, {"architectures": ["Linear"]}, {"architectures": ["__name__"]},
    {"architectures": ["AutoConfig"]}, {"architectures": ["PreTrainedModel"]}, {"architectures": ["BertModel"]},
    {"hidden_size": "big"}, {"hidden_size": None}, {"hidden_size": -4}, {"hidden_size": 0}, {"hidden_size": [44]},
    {"vocab_size": 0}, {"vocab_size": -1}, {"vocab_size": 1003.5}, {"num_attention_heads": 0}, {"head_dim": 0},
    {"num_key_value_heads": "2"}, {"num_hidden_layers": 0}, {"num_hidden_layers": None}, {"model_type": 7},
    {"model_type": "nobodys"}, {"model_type": None}, {"hidden_act": "nobodys"}, {"max_position_embeddings": 0},
    {"rope_parameters": "x"}, {"quantization_config": {"quant_method": "gptq"}}, {"torch_dtype": "float3"},
    {"is_encoder_decoder": True}, {"text_config": 3}, {"intermediate_size": 51},
]  # fmt: skip


@pytest.mark.parametrize("fields", ODD, ids=[json.dumps(fields) for fields in ODD])
def test_an_odd_config_never_ends_in_a_traceback(fields: dict[str, Any], shards: Path, capsys: Capture) -> None:
    folder = Folder(shards)
    folder.edit_config(**fields)
    folder.reseal()
    code, _, err = said(capsys, shards, "--level", "forward")
    harmless = {"max_position_embeddings", "torch_dtype", "is_encoder_decoder", "text_config", "num_key_value_heads"}
    harmless |= {"quantization_config"}  # of tensors that are dense; split refuses such a source
    assert code in ((0, 1, 4) if set(fields) & harmless else (1, 4)), err


# ------------------------------------------------------------------------------------------ tensors and classes


def test_a_class_that_wants_more_than_there_is(model: Path, shards: Path, tmp_path: Path) -> None:
    folder = Folder(shards)
    folder.edit_config(architectures=["Qwen2ForSequenceClassification"])
    folder.reseal()
    forward = checks(verify(Request(shards, workers=1)))["forward"]
    assert forward.verdict is Verdict.INCONCLUSIVE
    assert "the checkpoint gives Qwen2ForSequenceClassification no score.weight (1 such tensors)" in str(forward.reason)


def test_tensors_that_the_class_does_not_know_are_told(shards: Path) -> None:
    folder = Folder(shards)
    folder.edit_config(architectures=["Qwen2Model"])
    folder.reseal()
    forward = checks(verify(Request(shards, workers=1)))["forward"]
    assert any("not used by the model: lm_head.weight" in note for note in forward.notes)


def test_transformers_is_not_installed(shards: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, _ = said(capsys, shards)
    assert code == 4
    assert "transformers is not installed (pip install 'tpshard[hf]', or name the model with --model)" in out


def test_transformers_that_changed_its_table(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its conversion table is no public interface."""

    def changed(*_: Any, **__: Any) -> None:
        raise TypeError("takes 1 positional argument")

    monkeypatch.setattr("transformers.core_model_loading.rename_source_key", changed)
    forward = checks(verify(Request(shards, workers=1)))["forward"]
    assert "does not tell what Qwen2ForCausalLM loads: TypeError: takes 1 positional" in str(forward.reason)


def test_a_parameter_that_cannot_be_made(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library stacks or turns tensors that will not be stacked or turned."""

    def raising(source: object) -> torch.Tensor:
        raise ValueError("of different shapes")

    monkeypatch.setattr("tpshard.verify.models.renamed", lambda name: Recipe((name,), raising))
    forward = checks(verify(Request(shards, workers=1)))["forward"]
    assert forward.verdict is Verdict.INCONCLUSIVE
    assert "cannot be made of lm_head.weight: ValueError: of different shapes" in str(forward.reason)


def test_inputs_that_cannot_be_made(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpshard.verify.inputs.token_ids", lambda *_: {}["vocabulary"])
    forward = checks(verify(Request(shards, workers=1)))["forward"]
    assert "no inputs can be made for Qwen2ForCausalLM: KeyError" in str(forward.reason)


def test_a_device_that_is_not_there_is_refused_first(
    shards: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("tpshard.verify.run.check_files", lambda *_: pytest.fail("too late"))
    code, out, err = said(capsys, shards, "--device", "cuda")
    assert (code, out) == (2, "")
    assert err == "tpshard: error: --device cuda: torch sees no GPU here (leave --device out)\n"


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_in_a_shard_only(value: float, model: Path, shards: Path) -> None:
    folder, name = Folder(shards), "model.layers.1.mlp.up_proj.weight"
    folder.set_bytes(name, 1, 120, np.float32(value).tobytes())
    folder.reseal()
    found = checks(verify(Request(shards, against=model, workers=1)))
    assert {name for name, check in found.items() if check.verdict is Verdict.FAIL} == {"weights", "forward"}
    assert found["backward"].verdict is Verdict.INCONCLUSIVE
    assert (found["forward"].findings[0].layer, found["forward"].findings[0].rank) == ("model.layers.1.mlp.up_proj", 1)
    assert "not finite" in str(found["forward"].findings[0])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_in_a_word_that_is_not_met(value: float, made: Path, model: Path) -> None:
    met = set(token_ids(1003, 38, 2, 0).flatten().tolist())
    row = next(row for row in range(1002, 0, -1) if row not in met)
    data, at = np.float32(value).tobytes(), (row * 44 + 7) * 4
    name = "model.embed_tokens.weight"
    change_tensor(model / "model.safetensors", name, lambda old: old[:at] + data + old[at + 4 :])
    run(plan_split(model, model.parent / "cut", 2))
    found = checks(verify(Request(model.parent / "cut", against=model, workers=1)))
    assert found["weights"].verdict is Verdict.PASS
    assert str(found["forward"].reason) == f"{name}: the source holds NaN or infinite values"
    report = verify(Request(made / "shards", against=model, workers=1))  # the shards are sound, the source is not
    assert report.verdict is Verdict.FAIL


DTYPES = {
    "F8_E4M3": (torch.float8_e4m3fn, Verdict.PASS, ""),
    "F8_E5M2": (torch.float8_e5m2, Verdict.PASS, ""),
    "I8": (torch.int8, Verdict.INCONCLUSIVE, "expected torch.int8, got torch.float64"),
    "F8_E8M0": (torch.uint8, Verdict.INCONCLUSIVE, "up.weight: dtype F8_E8M0 has no arithmetic here"),
    "U16": (torch.int16, Verdict.INCONCLUSIVE, "up.weight: dtype U16 has no arithmetic here"),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_without_arithmetic(dtype: str, tmp_path: Path) -> None:
    """FP8 numbers without scales are numbers; packed words are none."""
    stored, verdict, reason = DTYPES[dtype]
    torch.manual_seed(1)
    tensors: Tensors = {}
    for name, value in a_model.build({})[0].state_dict().items():
        packed = name == "up.weight" or dtype.startswith("F8_E4") or dtype == "F8_E5M2"
        new = (torch.randn_like(value) * 4).to(stored if packed else torch.float32)
        tensors[name] = (dtype if packed else "F32", list(value.shape), bytes(new.untyped_storage()))
    net = net_of(tmp_path, tensors)
    found = checks(net_report(net, "build"))
    assert found["weights"].verdict is Verdict.PASS
    assert found["forward"].verdict is verdict
    assert reason in str(found["forward"].reason)
    if verdict is Verdict.PASS:
        assert found["generic"].verdict is found["self-test"].verdict is Verdict.PASS
        assert found["forward"].figures["native"]["dtype"] == "bfloat16"


def test_packed_words_have_another_shape(tmp_path: Path) -> None:
    state = a_model.build({})[0].state_dict()
    tensors: Tensors = {n: ("F32", list(value.shape), value.numpy().tobytes()) for n, value in state.items()}
    tensors["up.weight"] = ("U8", [33, 7], bytes(33 * 7))
    net = net_of(tmp_path, tensors)
    with pytest.raises(UsageError, match=r"its up.weight is \[33, 14\], on disk \[33, 7\]"):
        net_report(net, "build")


# ------------------------------------------------------------------------------------------ models that do not run


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("build_raising", "the unsharded model itself does not run: ValueError: no such forward"),
        ("build_leaving", "the unsharded model itself does not run: SystemExit: 0"),
        ("build_whole_numbers", "the model returns no floating-point tensor to compare"),
        ("build_no_output", "the model returns no floating-point tensor to compare"),
    ],
)
def test_a_model_that_does_not_run_is_inconclusive(build: str, reason: str, net: Path) -> None:
    report = net_report(net, build)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert str(checks(report)["forward"].reason) == reason
    assert checks(report)["layers"].verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("build_one_way", "NotImplementedError: no derivative is known"),
        ("build_overwriting", "modified by an inplace operation"),
    ],
)
def test_a_model_without_a_way_back_goes_forward(build: str, reason: str, net: Path) -> None:
    report = net_report(net, build)
    found = checks(report)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "the unsharded model has no way back from the model's output: " in str(found["backward"].reason)
    assert reason in str(found["backward"].reason)
    assert {name: check.verdict for name, check in found.items() if name in ("forward", "generic", "self-test")} == (
        dict.fromkeys(("forward", "generic", "self-test"), Verdict.PASS)
    )
    assert net_report(net, build, level="forward").verdict is Verdict.PASS


def test_a_model_without_history_has_no_gradients(net: Path) -> None:
    found = checks(net_report(net, "build_without_history"))
    assert found["forward"].verdict is Verdict.PASS
    assert found["backward"].verdict is Verdict.INCONCLUSIVE
    assert "covered no parameters" in str(found["backward"].reason)


def test_a_rank_whose_output_has_another_shape_fails(net: Path) -> None:
    report = net_report(net, "build_losing")
    assert report.verdict is Verdict.FAIL
    assert checks(report)["forward"].findings[0].layer == "the model's output"


def test_a_model_function_that_leaves_is_a_usage_error(net: Path, capsys: Capture) -> None:
    code, _, err = said(capsys, split_net(net), "--model", "tests.a_model:build_exit")
    assert code == 2
    assert "--model tests.a_model:build_exit failed: SystemExit: 0" in err


# ------------------------------------------------------------------------------------------ beside the verdict


def test_figures_that_cannot_be_had_are_a_remark(net: Path) -> None:
    found = checks(net_report(net, "build_double_only"))
    assert {check.verdict for name, check in found.items() if name != "layout"} == {Verdict.PASS}
    said_so = "no figures in float32: the unsharded model does not run: RuntimeError: not in this dtype"
    assert said_so in found["forward"].notes
    assert found["forward"].figures["native"] is None


def test_figures_that_are_not_finite_are_a_remark(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = native.execute

    def overflowing(*args: Any) -> Any:
        outcome = execute(*args)
        return dataclasses.replace(outcome, outputs=[[out[0] * float("inf")] for out in outcome.outputs])

    monkeypatch.setattr(native, "execute", overflowing)
    found = checks(net_report(net, "build", level="forward"))
    assert "no figures in float32: there are numbers that are not finite in its range" in found["forward"].notes
    assert found["forward"].verdict is Verdict.PASS


def test_a_loss_that_cannot_be_had_is_a_remark(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loss(output: Any) -> torch.Tensor:
        raise ValueError("no labels")

    monkeypatch.setattr("tpshard.verify.loss.loss_of", lambda subject: ("loss", subject.inputs, no_loss))
    found = checks(net_report(net, "build"))
    assert found["backward"].verdict is Verdict.PASS
    assert "no figure of a real loss (loss): the unsharded model does not run: ValueError: no labels" in (
        found["backward"].notes
    )


def test_a_model_that_does_not_run_with_generic_weights(net: Path) -> None:
    report = net_report(net, "build_small_norms")
    found = checks(report)
    assert found["forward"].verdict is found["backward"].verdict is Verdict.PASS
    assert "with generic weights: the unsharded model does not run: ValueError" in str(found["generic"].reason)
    assert report.verdict is Verdict.INCONCLUSIVE
