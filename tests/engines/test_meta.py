"""Meta's consolidated folders: written as the oracle has them, read as they are in the world, run on fairscale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engines import meta_oracle
from tests.engines.folders import llama_folder
from tests.engines.meta_forward import logits
from tests.engines.moves import assert_ranks, assert_same, do, flip, refused, verdict, whole
from tests.engines.test_meta_oracle import TOKENS, forward

Capture = pytest.CaptureFixture[str]
PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
FAST = {"rope_theta": 500000.0, "rope_type": "default"}
SCALED = {**meta_oracle.SCALED, "rope_theta": 50000.0}
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # engine, ranks, embedding axis, what the config adds
    "one rank": ("meta", 1, 0, {"rope_parameters": PLAIN}),
    "Llama 2": ("meta:llama2", 2, 1, {"rope_parameters": PLAIN, "num_key_value_heads": 8}),
    "CodeLlama": ("meta:llama2", 4, 1, {"rope_parameters": {**PLAIN, "rope_theta": 1e6}, "intermediate_size": 256}),
    "Llama 3": ("meta", 4, 0, {"rope_parameters": FAST}),
    "Llama 3.2": ("meta", 2, 0, {"rope_parameters": SCALED, "tie_word_embeddings": True}),
}


def load(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def made(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[Path, dict[str, Any]]:
    llama_folder(folder / "hf", dtype, **changes)
    (folder / "hf/tokenizer.model").write_bytes(b"sentences")
    return folder / "hf", json.loads((folder / "hf/config.json").read_text())


def theirs(folder: Path, ranks: int = 2, axis: int = 0, **changes: Any) -> Path:
    """A folder of Meta's own: no config.json."""
    source, config = made(folder, **changes)
    cut = meta_oracle.rank_tensors(whole(source), config, ranks, axis)
    meta_oracle.write(cut, meta_oracle.params(config), folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    engine, ranks, axis, changes = CASES[case]
    source, config = made(tmp_path, **changes)
    do("split", source, tmp_path / "meta", "--tp", str(ranks), "--engine", engine)
    want = meta_oracle.rank_tensors(whole(source), config, ranks, axis)
    assert_ranks(tmp_path / "meta", "consolidated.{:02d}.pth", load, want)
    params = json.loads((tmp_path / "meta/params.json").read_text())
    expected = meta_oracle.params(config)
    if engine == "meta:llama2":  # whose code refuses keys that it does not know
        optional = {"n_kv_heads": config["num_attention_heads"], "rope_theta": 10000.0}
        expected = {key: value for key, value in expected.items() if optional.get(key) != value}
    assert params == expected
    assert (tmp_path / "meta/tokenizer.model").read_bytes() == b"sentences"
    do("merge", tmp_path / "meta", tmp_path / "back")
    (tmp_path / "meta/tpshard.json").unlink()
    do("merge", tmp_path / "meta", tmp_path / "again")
    for folder in (tmp_path / "back", tmp_path / "again"):
        assert_same(whole(folder), whole(source))
        names = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".safetensors"}
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"} == names


@pytest.mark.parametrize("case", CASES)
def test_metas_own_folder(case: str, tmp_path: Path) -> None:
    """Without config.json, which is made of params.json: a head is then not known to be tied, and stays."""
    _, ranks, axis, changes = CASES[case]
    folder = theirs(tmp_path, ranks, axis, **changes)
    for rank in range(ranks):  # as old files have it
        path = folder / f"consolidated.{rank:02d}.pth"
        torch.save({**load(path), "rope.freqs": torch.ones(3)}, path)
    do("merge", folder, tmp_path / "back")
    want = whole(tmp_path / "hf")
    want.setdefault("lm_head.weight", want["model.embed_tokens.weight"])
    assert_same(whole(tmp_path / "back"), want)
    ours, before = (transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("back", "hf"))
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(ours, key) == getattr(before, key)
    assert (ours.vocab_size, ours.rms_norm_eps, ours.dtype) == (before.vocab_size, before.rms_norm_eps, before.dtype)
    assert ours.rope_parameters == before.rope_parameters


def test_llama_1_and_2_leave_the_vocabulary_to_the_tokenizer(tmp_path: Path) -> None:
    folder = theirs(tmp_path, 2, 1)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({"model": {**params, "vocab_size": -1}}))
    do("merge", folder, tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(tmp_path / "hf"))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_runs_on_fairscale(case: str, tmp_path: Path) -> None:
    pytest.importorskip("fairscale")
    engine, ranks, _, changes = CASES[case]
    if engine == "meta:llama2":
        changes = {**changes, "rope_parameters": PLAIN}
    source, _ = made(tmp_path, torch.float32, **changes)
    do("split", source, tmp_path / "meta", "--tp", str(ranks), "--engine", engine)
    torch.testing.assert_close(logits(tmp_path / "meta", TOKENS, tmp_path), forward(source), rtol=1e-4, atol=1e-4)


def test_between_versions_and_numbers_of_ranks(tmp_path: Path) -> None:
    source, config = made(tmp_path)
    do("split", source, tmp_path / "four", "--tp", "4", "--engine", "meta", "--no-manifest")
    do("reshard", tmp_path / "four", tmp_path / "two", "--tp", "2", "--to", "meta:llama2")
    want = meta_oracle.rank_tensors(whole(source), config, 2, 1)
    assert_ranks(tmp_path / "two", "consolidated.{:02d}.pth", load, want)
    do("reshard", tmp_path / "two", tmp_path / "vllm", "--tp", "2", "--to", "vllm")
    assert not (tmp_path / "vllm/params.json").exists()
    do("merge", tmp_path / "vllm", tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(source))


def test_verified_and_a_fault_found(tmp_path: Path, capsys: Capture) -> None:
    source, _ = made(tmp_path, torch.float32, tie_word_embeddings=True)
    do("split", source, tmp_path / "meta", "--tp", "2", "--engine", "meta:llama2")
    told = ("--against", source, "--level", "forward")
    code, said = verdict(capsys, tmp_path / "meta", *told)
    assert code == 0, said
    (tmp_path / "meta/tpshard.json").unlink()
    code, said = verdict(capsys, tmp_path / "meta", *told)
    assert code == 0, said
    path = tmp_path / "meta/consolidated.01.pth"
    tensors = load(path)
    tensors["layers.1.attention.wq.weight"] = meta_oracle.halves(tensors["layers.1.attention.wq.weight"], 4)
    torch.save(tensors, path)
    code, said = verdict(capsys, tmp_path / "meta", *told)
    assert code == 1
    assert "model.layers.1.self_attn.q_proj.weight" in said


def test_a_tied_heads_copy_that_differs(tmp_path: Path, capsys: Capture) -> None:
    """By the manifest the model's words stay the embedding's; without one neither is to be preferred."""
    source, _ = made(tmp_path, tie_word_embeddings=True)
    do("split", source, tmp_path / "meta", "--tp", "2", "--engine", "meta")
    path = tmp_path / "meta/consolidated.01.pth"
    tensors = load(path)
    tensors["output.weight"][3, 5] += 1
    torch.save(tensors, path)
    code, said = verdict(capsys, tmp_path / "meta", "--level", "files")
    assert code == 1
    assert "consolidated.01.pth" in said
    (tmp_path / "meta/tpshard.json").unlink()
    said = refused(capsys, 3, "merge", tmp_path / "meta", tmp_path / "back")
    assert "lm_head.weight and model.embed_tokens.weight differ" in said
    assert not (tmp_path / "back").exists()


def test_a_head_of_its_own_that_is_equal_stays(tmp_path: Path) -> None:
    """The manifest tells a head that was in the source from one that was written for the engine."""
    source, _ = made(tmp_path, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, source / "model.safetensors", {"format": "pt"})
    do("split", source, tmp_path / "meta", "--tp", "2", "--engine", "meta")
    do("merge", tmp_path / "meta", tmp_path / "back")
    assert_same(whole(tmp_path / "back"), {**tensors, **head})


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 52}, "'dim' is 52, which does not go into 8 heads"),
        ({"dim": 56}, "'dim' is 56, by norm.weight it is 48"),
        ({"n_layers": 4}, "'n_layers' is 4, by the layers' names it is 3"),
        ({"n_kv_heads": 2}, "'n_kv_heads' is 2, by wk it is 4"),
        ({"vocab_size": 300}, "'vocab_size' is 300, by output.weight it is 212"),
        ({"multiple_of": 512}, "'hidden channels' is 512, by w1 it is 140"),
        ({"n_heads": "8"}, "'n_heads' is '8', not a count"),
        ({"use_scaled_rope": "yes"}, "'use_scaled_rope' is 'yes', not true or false"),
    ],
)
def test_params_that_are_another_models(change: dict[str, Any], said: str, tmp_path: Path, capsys: Capture) -> None:
    folder = theirs(tmp_path)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, **change}))
    assert said in refused(capsys, 3, "merge", folder, tmp_path / "back")


def test_a_config_that_is_another_models(tmp_path: Path, capsys: Capture) -> None:
    folder = theirs(tmp_path)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    said = refused(capsys, 3, "merge", folder, tmp_path / "back", "--config", tmp_path / "other.json")
    assert "num_attention_heads is 4 in config.json, 8 by" in said


def test_a_rank_that_is_missing(tmp_path: Path, capsys: Capture) -> None:
    folder = theirs(tmp_path, 4)
    (folder / "consolidated.03.pth").rename(tmp_path / "last")
    assert "is a rank's file missing?" in refused(capsys, 3, "merge", folder, tmp_path / "back")
    (tmp_path / "last").rename(folder / "consolidated.03.pth")
    (folder / "consolidated.01.pth").unlink()
    assert "rank 1 has no file, and there are 4 ranks" in refused(capsys, 3, "merge", folder, tmp_path / "back")


def test_ranks_of_two_models(tmp_path: Path, capsys: Capture) -> None:
    folder = theirs(tmp_path)
    tensors = load(folder / "consolidated.01.pth")
    torch.save({**tensors, "norm.weight": tensors["norm.weight"] + 1}, folder / "consolidated.01.pth")
    assert "ranks 0 and 1 hold copies that differ" in refused(capsys, 3, "merge", folder, tmp_path / "back")
    torch.save({**tensors, "norm.weight": torch.ones(47).bfloat16()}, folder / "consolidated.01.pth")
    assert "shapes [48], [47]" in refused(capsys, 3, "merge", folder, tmp_path / "back")
    torch.save({**tensors, "extra.weight": torch.ones(3)}, folder / "consolidated.01.pth")
    assert "extra.weight" in refused(capsys, 3, "merge", folder, tmp_path / "back")


def test_the_other_version_asked_for(tmp_path: Path, capsys: Capture) -> None:
    folder = theirs(tmp_path)
    said = refused(capsys, 3, "merge", folder, tmp_path / "back", "--from", "meta:llama2")
    assert "has files of Meta consolidated.NN.pth llama3" in said


def test_no_configuration_at_all(tmp_path: Path, capsys: Capture) -> None:
    folder = theirs(tmp_path)
    (folder / "params.json").unlink()
    assert "give one with --config" in refused(capsys, 3, "merge", folder, tmp_path / "back")


@pytest.mark.parametrize(
    ("engine", "change", "said"),
    [
        ("meta", {"attention_bias": True}, "self_attn.k_proj.bias: Meta consolidated.NN.pth has no place for it"),
        ("meta", {"head_dim": 10}, "8 heads of 10 cells are not the hidden size 48"),
        ("meta", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("meta", {"rope_parameters": {**SCALED, "factor": 32.0}}, '"factor": 32.0'),
        ("meta:llama2", {"rope_parameters": SCALED}, "positions turn by"),
    ],
)
def test_what_meta_has_no_word_for(
    engine: str, change: dict[str, Any], said: str, tmp_path: Path, capsys: Capture
) -> None:
    source, _ = made(tmp_path, **change)
    words = ("split", source, tmp_path / "meta", "--tp", "2", "--engine", engine)
    assert said in refused(capsys, 3, *words)
    assert not (tmp_path / "meta").exists()


def test_what_fairscale_does_not_cut(tmp_path: Path, capsys: Capture) -> None:
    source, _ = made(tmp_path)
    words = ("split", source, tmp_path / "meta", "--engine", "meta", "--tp")
    assert "holds each head on one rank" in refused(capsys, 2, *words, "8")
    shutil.copy(source / "config.json", tmp_path / "config.json")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert "no names are known for model_type 'mistral'" in refused(capsys, 3, *words, "2")


def test_a_damaged_file(tmp_path: Path, capsys: Capture) -> None:
    source, _ = made(tmp_path)
    do("split", source, tmp_path / "meta", "--tp", "2", "--engine", "meta")
    flip(tmp_path / "meta/consolidated.00.pth", 5000)
    code, said = verdict(capsys, tmp_path / "meta", "--level", "files")
    assert code == 1, said
