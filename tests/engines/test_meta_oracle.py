"""The consolidated checkpoints that the oracle makes run on fairscale's layers as the model does in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.engines import meta_oracle
from tests.engines.folders import llama_folder
from tests.engines.meta_forward import logits

TOKENS = torch.tensor([[3, 211, 7, 100, 42, 9, 150], [5, 6, 200, 1, 77, 30, 12]])
PLAIN: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
CASES = {  # ranks, embedding axis, what the config adds
    "one file": (1, 0, {"rope_parameters": PLAIN}),
    "Llama 2": (2, 1, {"rope_parameters": PLAIN, "num_key_value_heads": 8}),
    "Llama 3": (2, 0, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
    "Llama 3.1": (4, 0, {"rope_parameters": meta_oracle.SCALED | {"rope_theta": 50000.0}, "tie_word_embeddings": True}),
}


def forward(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        out: torch.Tensor = model(TOKENS).logits
    return out


@pytest.mark.parametrize("case", CASES)
def test_the_oracles_files_run_on_fairscale(case: str, tmp_path: Path) -> None:
    pytest.importorskip("fairscale")
    ranks, axis, changes = CASES[case]
    llama_folder(tmp_path / "hf", **changes)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    whole = load_file(tmp_path / "hf/model.safetensors")
    cut = meta_oracle.rank_tensors(whole, config, ranks, axis)
    params = meta_oracle.params(config)
    meta_oracle.write(cut, params, tmp_path / "meta")
    want = forward(tmp_path / "hf")
    torch.testing.assert_close(logits(tmp_path / "meta", TOKENS, tmp_path), want, rtol=1e-4, atol=1e-4)
    if case == "Llama 3":
        for name in cut[0]:
            if name.endswith("wq.weight"):  # as transformers has them
                for tensors in cut:
                    tensors[name] = meta_oracle.halves(tensors[name], 8 // ranks)
        meta_oracle.write(cut, params, tmp_path / "wrong")
        assert (logits(tmp_path / "wrong", TOKENS, tmp_path) - want).abs().max() > 1e-2


@pytest.mark.parametrize("axis", [0, 1])
def test_back(axis: int, tmp_path: Path) -> None:
    llama_folder(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    whole = load_file(tmp_path / "hf/model.safetensors")
    cut = meta_oracle.rank_tensors(whole, config, 2, axis)
    torch.testing.assert_close(meta_oracle.whole_tensors(cut, config), dict(whole), rtol=0, atol=0)
    params = meta_oracle.params(config)
    again = meta_oracle.config(params, 212)
    assert {key: config[key] for key in again} == again
