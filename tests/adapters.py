"""LoRA adapters made by PEFT on tiny models, with random numbers everywhere: a B of zeros hides faults."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

from tests import a_model, tiny_models

RANK, ALPHA = 5, 7
ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
EIGHT: Mapping[str, Mapping[str, Any]] = {  # eight heads, which go into four ranks
    "llama": {"num_attention_heads": 8},
    "phi3": {"num_attention_heads": 8},
    "bert": {"num_attention_heads": 8, "hidden_size": 72},
}


@dataclass(frozen=True)
class Case:
    """A model, the layers that are adapted, and PEFT's options. ``tp``: ranks to cut for."""

    model: str
    tp: int
    targets: list[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        more = "".join(f"-{key}" for key in self.options)
        return f"{self.model}@{self.tp}{more}"


LLAMA = Case("llama", 2, ATTENTION + FEED_FORWARD)
PHI3 = Case("phi3", 2, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
GPT2 = Case("gpt2", 3, ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True})
BERT = Case("bert", 2, ["query", "key", "value", "dense"], {"use_rslora": True, "bias": "lora_only"})
DORA = Case(
    "llama",
    2,
    ["q_proj", "o_proj", "embed_tokens", "lm_head"],
    {
        "use_dora": True,
        "modules_to_save": ["norm"],
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"1.self_attn.q_proj": 11},
    },
)
CASES = [
    LLAMA,
    Case("llama", 4, ATTENTION + FEED_FORWARD, sizes=EIGHT["llama"]),  # two key-value heads, each on two ranks
    PHI3,
    Case("phi3", 4, PHI3.targets, sizes=EIGHT["phi3"]),
    GPT2,
    Case("gpt2", 2, ["wte", "c_attn", "c_proj"], {"fan_in_fan_out": True}),
    BERT,
    Case("bert", 4, ["query", "dense", "word_embeddings"], sizes=EIGHT["bert"]),
    Case("bert", 3, ["query", "dense"], {"lora_bias": True}),
    DORA,
    Case("gpt2", 2, ["c_attn", "c_proj"], {"fan_in_fan_out": True, "use_dora": True}),
]  # fmt: skip


def make(case: Case, folder: Path, *, zero_b: bool = False) -> None:
    """``folder/base``, ``folder/adapter`` and ``folder/merged``: what PEFT itself makes of the two, in float64."""
    layers = "n_layer" if case.model == "gpt2" else "num_hidden_layers"
    tiny_models.save_model(case.model, folder / "base", **{layers: 2}, **case.sizes)
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    model = getattr(transformers, tiny_models.word_head(config)).from_pretrained(folder / "base", dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings, and of embeddings that are saved whole
        options: dict[str, Any] = {"target_modules": case.targets, "r": RANK, "lora_alpha": ALPHA} | dict(case.options)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    around = 1.0 if "magnitude" in name else 0.0
                    parameter.copy_(around + torch.randn(parameter.shape, generator=generator) / 4)
                    if zero_b and "lora_B" in name:
                        parameter.zero_()
        adapted.save_pretrained(folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder / "merged")


def make_vit(folder: Path) -> None:
    """Of a model whose tensors are called otherwise on disk."""
    sizes = {"hidden_size": 66, "num_attention_heads": 6, "intermediate_size": 52, "image_size": 12, "patch_size": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2, num_labels=5, **sizes))
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = ["q_proj", "o_proj", "fc1", "fc2", "projection"]  # the last is a convolution
        config = peft.LoraConfig(target_modules=targets, r=3, modules_to_save=["classifier"])
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(folder / "adapter")


def make_any(folder: Path) -> None:
    """Of a module that transformers does not know, without a config."""
    torch.manual_seed(0)
    model = a_model.NetThatUsesAll()
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=["words", "up", "down", "head"], r=3, bias="all")
        adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(folder / "adapter")
