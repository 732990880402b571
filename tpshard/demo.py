"""A small checkpoint of a real shape, made on the spot: what ``tpshard demo`` works on.

A Llama with grouped key-value heads (fewer than ranks, so that they are replicated), a vocabulary that does not
divide, BF16 weights in two files with an index. No torch, no download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tpshard.header import byte_count, header_bytes
from tpshard.layout import Shape

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 312,
    "intermediate_size": 880,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 8003,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tensor_shapes() -> dict[str, Shape]:
    """Every tensor of the demo's model, as Hugging Face names them."""
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    query = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    key_value = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (query, hidden),
            f"{at}.self_attn.k_proj.weight": (key_value, hidden),
            f"{at}.self_attn.v_proj.weight": (key_value, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, query),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def make_checkpoint(folder: Path | str, seed: int = 0) -> int:
    """Write the checkpoint into a new folder; returns its bytes. The same seed gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    shapes = tensor_shapes()
    names = list(shapes)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    random = np.random.default_rng(seed)
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file_name = f"model-{number:05d}-of-{len(halves):05d}.safetensors"
        with (folder / file_name).open("xb") as file:
            file.write(header_bytes(((name, "BF16", shapes[name]) for name in half), {"format": "pt"}))
            for name in half:
                file.write(_bfloat16(random, shapes[name]))
                weight_map[name] = file_name
    total = sum(byte_count("BF16", shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    return total


def _bfloat16(random: np.random.Generator, shape: Shape) -> bytes:
    """Weights of trained size; norms around one. BF16 is the upper half of a float32."""
    values = random.standard_normal(shape, dtype=np.float32)
    values = (1 + values / 10 if len(shape) == 1 else values / shape[-1] ** 0.5).astype(np.float32)
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
