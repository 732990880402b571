"""DeepSeek's own inference files: byte for byte as the oracle's, which are as DeepSeek's converter's; and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import deepseek_oracle
from tests.engines.folders import BLOCK, DEEPSEEK, deepseek_folder
from tests.engines.moves import assert_ranks, assert_same, do, flip, refused, verdict, whole
from tpshard.cli.main import _run
from tpshard.engines.settings.deepseek import DeepSeek

Capture = pytest.CaptureFixture[str]
FILES = "model{}-mp%d.safetensors"


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    deepseek_folder(folder, request.param == "fp8")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "hf"
    deepseek_folder(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_there_and_back(source: Path, ranks: int, tmp_path: Path) -> None:
    do("split", source, tmp_path / "mp", "--tp", str(ranks), "--engine", "deepseek")
    deepseek_oracle.write(source, tmp_path / "theirs", DEEPSEEK["n_routed_experts"], ranks)
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes() == (tmp_path / "mp" / file.name).read_bytes(), file.name
    do("merge", tmp_path / "mp", tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(source))
    do("merge", tmp_path / "theirs", tmp_path / "again", "--config", source)
    assert_same(whole(tmp_path / "again"), whole(source))


def test_other_numbers_of_ranks_and_engines(source: Path, tmp_path: Path) -> None:
    deepseek_oracle.write(source, tmp_path / "four", 12, 4)
    do("reshard", tmp_path / "four", tmp_path / "two", "--tp", "2", "--to", "deepseek", "--config", source)
    assert_ranks(tmp_path / "two", FILES % 2, load_file, deepseek_oracle.rank_tensors(whole(source), 12, 2))
    do("reshard", tmp_path / "two", tmp_path / "native", "--tp", "4")
    do("merge", tmp_path / "native", tmp_path / "back")
    assert_same(whole(tmp_path / "back"), whole(source))


def test_the_layer_that_predicts_further_words_is_left_out(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors = whole(plain)
    mtp = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    mtp["model.layers.3.eh_proj.weight"] = torch.randn(40, 80)
    (tmp_path / "hf").mkdir()
    save_file({**tensors, **mtp}, tmp_path / "hf/model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert _run(["split", str(tmp_path / "hf"), str(tmp_path / "mp"), "--tp", "2", "--engine", "deepseek"]) == 0
    assert "model.layers.3.eh_proj.weight is of a layer beyond num_hidden_layers" in capsys.readouterr().err
    assert_ranks(tmp_path / "mp", FILES % 2, load_file, deepseek_oracle.rank_tensors(tensors, 12, 2))


def inference_config(**changes: Any) -> dict[str, Any]:
    """As in DeepSeek's inference/configs, of the tiny model."""
    return {
        "vocab_size": 220, "dim": 40, "inter_dim": 192, "moe_inter_dim": 32, "n_layers": 3, "n_dense_layers": 1,
        "n_heads": 4, "n_routed_experts": 12, "n_shared_experts": 2, "n_activated_experts": 3, "n_expert_groups": 4,
        "n_limited_groups": 2, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 26, "kv_lora_rank": 20,
        "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "dtype": "bf16", **changes,
    }  # fmt: skip


def test_its_own_configuration_will_do(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    deepseek_oracle.write(plain, tmp_path / "mp", 12, 2)
    (tmp_path / "tiny.json").write_text(json.dumps(inference_config()))
    do("merge", tmp_path / "mp", tmp_path / "back", "--config", tmp_path / "tiny.json")
    assert_same(whole(tmp_path / "back"), whole(plain))
    made = json.loads((tmp_path / "back/config.json").read_text())
    theirs = json.loads((plain / "config.json").read_text())
    assert {key: made[key] for key in DEEPSEEK if key in made and key != "max_position_embeddings"} == {
        key: theirs[key] for key in DEEPSEEK if key in made and key != "max_position_embeddings"
    }
    lacking = {key: value for key, value in inference_config().items() if key != "n_heads"}
    (tmp_path / "tiny.json").write_text(json.dumps(lacking))
    said = refused(capsys, 3, "merge", tmp_path / "mp", tmp_path / "more", "--config", tmp_path / "tiny.json")
    assert "lacks 'n_heads'" in said


def test_fp8_in_its_own_configuration() -> None:
    made = DeepSeek().given(inference_config(dtype="fp8", q_lora_rank=0))
    assert made["quantization_config"]["weight_block_size"] == [128, 128]
    assert made["q_lora_rank"] is None
    assert BLOCK != 128


def test_verified_and_a_fault_found(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    do("split", plain, tmp_path / "mp", "--tp", "2", "--engine", "deepseek")
    code, said = verdict(capsys, tmp_path / "mp", "--against", plain, "--level", "forward")
    assert code == 0, said
    (tmp_path / "mp/tpshard.json").unlink()
    path = tmp_path / "mp/model1-mp2.safetensors"
    tensors = load_file(path)
    one, other = (f"layers.1.ffn.experts.{n}.w1.weight" for n in (7, 9))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, path)
    told = ("--against", plain, "--level", "forward")
    code, said = verdict(capsys, tmp_path / "mp", *told)
    assert code == 1
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in said


# ---------------------------------------------------------------------------------------------- refused


def test_without_a_configuration(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    deepseek_oracle.write(plain, tmp_path / "mp", 12, 2)
    assert "give one with --config" in refused(capsys, 3, "merge", tmp_path / "mp", tmp_path / "back")


def test_ranks_that_are_missing_or_of_another_run(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    deepseek_oracle.write(plain, tmp_path / "mp", 12, 4)
    words = ("merge", tmp_path / "mp", tmp_path / "back", "--config", plain)
    last = tmp_path / "mp/model3-mp4.safetensors"
    kept = last.read_bytes()
    last.unlink()
    assert "rank 3 has no file, and there are 4 ranks" in refused(capsys, 3, *words)
    (tmp_path / "mp/model3-mp2.safetensors").write_bytes(kept)
    assert "has files of 2 ranks and of 4" in refused(capsys, 3, *words)
    (tmp_path / "mp/model3-mp2.safetensors").unlink()
    last.write_bytes(kept)
    (tmp_path / "mp/model4-mp4.safetensors").write_bytes(kept)
    assert "has a file of rank 4, and there are 4 ranks" in refused(capsys, 3, *words)
    (tmp_path / "mp/model4-mp4.safetensors").unlink()
    tensors = load_file(last)
    save_file({**tensors, "norm.weight": tensors["norm.weight"] * 2}, last)
    assert "norm.weight: ranks 0 and 3 hold copies that differ" in refused(capsys, 3, *words)
    save_file({**tensors, "layers.1.ffn.experts.3.w1.weight": tensors["layers.1.ffn.experts.11.w1.weight"] + 1}, last)
    assert "layers.1.ffn.experts.3.w1.weight" in refused(capsys, 3, *words)
    save_file({**tensors, "layers.1.attn.indexer.wk.weight": torch.ones(3, 5)}, last)
    assert "has no such tensor in a deepseek model" in refused(capsys, 3, *words)


def test_a_configuration_of_another_model(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    deepseek_oracle.write(plain, tmp_path / "mp", 12, 2)
    config = json.loads((plain / "config.json").read_text())
    for change, code in (({"n_routed_experts": 10}, 2), ({"model_type": "llama"}, 3)):
        (tmp_path / "other.json").write_text(json.dumps({**config, **change}))
        refused(capsys, code, "merge", tmp_path / "mp", tmp_path / "back", "--config", tmp_path / "other.json")
        assert not (tmp_path / "back").exists()


def test_ranks_that_do_not_go(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("split", plain, tmp_path / "mp", "--engine", "deepseek", "--tp")
    refused(capsys, 2, *words, "3")
    assert "leave out --pp" in refused(capsys, 2, *words, "2", "--pp", "2")
    assert not (tmp_path / "mp").exists()


def test_a_damaged_file(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    do("split", plain, tmp_path / "mp", "--tp", "2", "--engine", "deepseek")
    path = tmp_path / "mp/model1-mp2.safetensors"
    flip(path, path.stat().st_size // 2)  # an expert's
    code, said = verdict(capsys, tmp_path / "mp", "--level", "files")
    assert code == 1
    assert "model1-mp2.safetensors" in said
    refused(capsys, 3, "merge", tmp_path / "mp", tmp_path / "back")
