"""Tiny random models of real architectures, saved by transformers as it saves any model.

No two sizes are equal and biases and norms are random: equal sizes and zero biases hide faults. Six query heads go
into 2, 3 and 6 ranks; a vocabulary of 1003 goes into none of them.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)  # tests run side by side: more threads than cores wait for one another

HEADS, VOCAB, LAYERS, FFN, POSITIONS = 6, 1003, 3, 52, 40
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = BASE | {"hidden_size": 66}
DECODER = BASE | {"num_key_value_heads": 2}
FREE = DECODER | {"hidden_size": 44, "head_dim": 10}  # six heads of 10 are 60, not 44
MULTIPLE = FREE | {"hidden_size": 48}  # where hidden must be a multiple of the heads
BOUND = DECODER | {"hidden_size": 60}  # where hidden must be heads x head size, and the latter even

SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "smollm3", "seed_oss"), FREE),
    **dict.fromkeys(("exaone4", "ernie4_5", "nemotron", "hunyuan_v1_dense", "glm", "glm4", "phi3"), FREE),
    **dict.fromkeys(("llama", "arcee", "cwm", "jais2", "gemma2", "gemma3_text", "vaultgemma"), MULTIPLE),
    **dict.fromkeys(("granite", "olmo", "olmo2", "olmo3", "starcoder2"), BOUND),
    **dict.fromkeys(("cohere2", "helium"), BOUND | {"head_dim": 10}),
    "cohere": BOUND | {"use_qk_norm": True},
    "phi": BOUND | {"qk_layernorm": True, "partial_rotary_factor": 0.4},
    "stablelm": BOUND | {"qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.4},
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text"), ENCODER),
    **dict.fromkeys(("roberta-prelayernorm", "ernie"), ENCODER),
    **dict.fromkeys(("electra", "albert"), ENCODER | {"embedding_size": 26}),  # narrower than hidden
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 66, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS,
        "n_inner": FFN, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "distilbert": {
        "vocab_size": VOCAB, "dim": 66, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FFN,
        "max_position_embeddings": POSITIONS,
    },
}  # fmt: skip


def save_model(model_type: str, folder: Path, kv_heads: int = 2, head: str | None = None, **changes: Any) -> None:
    """A model of ``model_type`` in a new folder; ``head``: its class, else the one that predicts words."""
    config = make_config(model_type, kv_heads, **changes)
    build(config, head or word_head(config)).save_pretrained(folder)


def make_config(model_type: str, kv_heads: int = 2, **changes: Any) -> Any:
    """The config; ``kv_heads`` counts where the architecture knows grouped heads."""
    sizes = SIZES[model_type]
    grouped = {"num_key_value_heads": kv_heads} if "num_key_value_heads" in sizes else {}
    return transformers.AutoConfig.for_model(model_type, **(sizes | grouped | changes))


def build(config: Any, head: str) -> Any:
    """The model, with random weights everywhere: no zero bias, no norm of ones."""
    torch.manual_seed(0)
    model = getattr(transformers, head)(copy.deepcopy(config)).eval()  # which saving changes
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


HALVES = "ProphetNetEncoder", "ProphetNetDecoder", "T5GemmaEncoderModel"  # never saved by themselves


def heads(config: Any) -> Iterator[str]:
    """The names of all model classes that transformers has for a config."""
    path = type(config).__module__.replace(".configuration_", ".modeling_")
    if importlib.util.find_spec(path) is None:  # a config for the classes of another architecture
        yield MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
        return
    module = importlib.import_module(path)
    for name in module.__all__:
        found = getattr(module, name)
        of_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if of_model and found.config_class is type(config) and name not in HALVES and "pretrained" not in name.lower():
            yield name


def word_head(config: Any) -> str:
    """The class that predicts words."""
    for endings in (("ForConditionalGeneration", "MTModel"), ("ForMaskedLM",), ("ForCausalLM", "LMHeadModel")):
        if found := next((name for name in heads(config) if name.endswith(endings)), None):
            return found
    raise LookupError(f"no class of {config.model_type} predicts words")
