"""The unsharded model in float64, a layer at a time, to compare verify with: ``python -m tests.bench.streamed SRC``.

What one would write by hand where the model does not fit in memory: transformers' own layers, each filled from the
files, run on the tokens, and dropped. Knows Llama only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

TOKENS = 48  # as many as verify takes


class Weights:
    def __init__(self, folder: Path) -> None:
        self.index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self.files = {name: safe_open(folder / name, "pt") for name in set(self.index.values())}

    def of(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.files[self.index[name]].get_tensor(name).double()
        return tensor

    def fill(self, module: nn.Module, path: str) -> None:
        state = {name: self.of(f"{path}.{name}") for name in module.state_dict()}
        module.load_state_dict(state, assign=True)


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    weights = Weights(folder)
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

    tokens = torch.arange(0, config.vocab_size, config.vocab_size // TOKENS)[:TOKENS].reshape(2, -1)
    x: Any = nn.functional.embedding(tokens, weights.of("model.embed_tokens.weight"))
    positions = torch.arange(x.shape[1])[None]
    rotary = LlamaRotaryEmbedding(config)(x, positions)
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        for number in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = LlamaDecoderLayer(config, number)
            weights.fill(layer, f"model.layers.{number}")
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        norm = LlamaRMSNorm(config.hidden_size)
        weights.fill(norm, "model.norm")
        logits = norm(x) @ weights.of("lm_head.weight").T
    print(f'{{"norm": {float(logits.norm())}}}')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
