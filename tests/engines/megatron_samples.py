"""Tiny models of each family, their Megatron folders, and the proof that megatron-core computes what transformers does."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.megatron_oracle import Cut, Tensors, write_folder
from tests.engines.megatron_truth import run_jobs

TOKENS = [[3, 17, 42, 8, 99, 61, 5], [88, 2, 0, 71, 30, 12, 44]]

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 12, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "rope_parameters": ROPE,
}  # fmt: skip
GPT2 = {
    "vocab_size": 101, "n_embd": 48, "n_inner": 88, "n_layer": 4, "n_head": 8, "n_positions": 32,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}  # fmt: skip
NEOX = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 32, "hidden_act": "gelu", "use_parallel_residual": False, "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5, "rope_parameters": ROPE | {"partial_rotary_factor": 0.25},
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama_tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama_mha": ("llama", LLAMA | {"num_key_value_heads": 8}),
    "llama_few_groups": ("llama", LLAMA | {"num_key_value_heads": 2}),
    "llama_one_group": ("llama", LLAMA | {"num_key_value_heads": 1}),
    "llama_wide_head": ("llama", LLAMA | {"head_dim": 20}),
    "mistral": ("mistral", LLAMA | {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA | {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", LLAMA | {"num_key_value_heads": 2, "head_dim": 20}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", NEOX),
}


def twin(name: str, folder: Path) -> tuple[Tensors, dict[str, Any], torch.Tensor]:
    """A random model with no zero bias and no unit norm, saved as transformers saves it; its tensors, config, logits."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, values = MODELS[name]
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in key or ".ln_" in key else 0.15 * noise)
        logits = model(torch.tensor(TOKENS)).logits
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), logits


def twins(scratch: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensors, dict[str, Any], torch.Tensor]]:
    """A model's folder, tensors, config and logits, made when first asked for."""

    @cache
    def made(name: str) -> tuple[Path, Tensors, dict[str, Any], torch.Tensor]:
        folder = scratch.mktemp(name) / "hf"
        return folder, *twin(name, folder)

    return made


def cuts_of(name: str) -> list[tuple[str, Cut]]:
    """Samples to keep: folder name and cut. Only megatron-core names, version 3, not virtual ones can be run."""
    wanted = [("tp1", Cut(1)), ("tp2", Cut(2)), ("tp4", Cut(4)), ("tp2pp2", Cut(2, 2)), ("tp1pp4", Cut(1, 4))]
    wanted = [(label, Cut(c.tp, c.pp, divisible_by=16)) for label, c in wanted]
    if name == "mixtral":
        wanted.append(("tp1ep2", Cut(ep=2, divisible_by=16)))
        wanted.append(("tp2ep2", Cut(2, ep=2, divisible_by=16)))
        for experts in ("te", "grouped"):
            wanted.append((f"tp2_{experts}", Cut(2, names="mcore-te", experts=experts, divisible_by=16)))
        return wanted
    wanted.append(("tp2_te", Cut(2, names="mcore-te")))
    wanted.append(("tp2pp2_te", Cut(2, 2, names="mcore-te")))
    wanted.append(("tp2pp2vp2", Cut(2, 2, virtual=2, divisible_by=16)))
    legacy = Cut(2, names="legacy", divisible_by=16)
    if name not in ("qwen3",):
        wanted.append(("tp2_legacy", legacy))
        wanted.append(("tp2pp2_legacy", Cut(2, 2, names="legacy", divisible_by=16)))
    if name in ("gpt2", "gpt_neox", "llama_mha"):
        for version in (0, 1.0, 2.0):
            old = Cut(2, names="legacy-old" if name == "gpt2" else "legacy", version=version, divisible_by=16)
            wanted.append((f"tp2_v{version:g}", old))
    return wanted


def runnable(cut: Cut) -> bool:
    return cut.names.startswith("mcore") and cut.version == 3.0 and cut.virtual == 1 and cut.experts != "grouped"


def main(keep: Path | None) -> None:
    root = keep or Path(tempfile.mkdtemp())
    grids: dict[tuple[int, int, int], list[tuple[str, dict[str, Any], torch.Tensor]]] = {}
    for name in MODELS:
        shutil.rmtree(root / name, ignore_errors=True)
        hf, config, logits = twin(name, root / name / "hf")
        torch.save({"tokens": TOKENS, "logits": logits}, root / name / "logits.pt")
        for label, cut in cuts_of(name):
            folder = root / name / label
            write_folder(folder, hf, config, cut)
            if runnable(cut):
                job = {"folder": str(folder), "config": config, "tokens": TOKENS}
                grids.setdefault((cut.tp, cut.pp, cut.ep), []).append((f"{name}/{label}", job, logits))
    for (tp, pp, ep), entries in sorted(grids.items()):
        answers = run_jobs([job for _, job, _ in entries], tp, pp, ep)
        for (label, job, logits), answer in zip(entries, answers, strict=True):
            ours = torch.tensor(answer[0, pp - 1, 0]["logits"])[:, :, : logits.shape[-1]]
            worst = (ours - logits).abs().max().item()
            print(f"{label:32} worst {worst:.2e} of {logits.abs().max():.1f}", flush=True)
            assert worst <= 1e-4 * logits.abs().max(), label
            (Path(job["folder"]) / "shapes.json").write_text(
                json.dumps({str(place): found["shapes"] for place, found in answer.items()}, indent=1)
            )
    if keep is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
