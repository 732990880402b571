"""Llama on fairscale's layers, as Meta's own code has it: every rank runs from its own file of a consolidated folder.

Rows 2i and 2i + 1 of a head turn together here, so files whose queries lie as transformers has them are found out.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu


def logits(folder: Path, tokens: torch.Tensor, scratch: Path) -> torch.Tensor:
    """What the ranks say together; as many as there are files."""
    ranks = len(list(folder.glob("*.pth")))
    torch.save(tokens, scratch / "tokens.pt")
    for name in ("rendezvous", "logits.pt"):
        (scratch / name).unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")  # imports torch once, not in every rank
    context.set_forkserver_preload([__name__, "fairscale.nn.model_parallel.layers"])
    running = [context.Process(target=rank_logits, args=(folder, scratch, rank, ranks)) for rank in range(ranks)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * ranks
    out: torch.Tensor = torch.load(scratch / "logits.pt")
    return out


def column(of: int, to: int, gather: bool = False) -> nn.Module:
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear

    return ColumnParallelLinear(of, to, bias=False, gather_output=gather, init_method=lambda weight: weight)


def row(of: int, to: int) -> nn.Module:
    from fairscale.nn.model_parallel.layers import RowParallelLinear

    return RowParallelLinear(of, to, bias=False, input_is_parallel=True, init_method=lambda weight: weight)


def angles(length: int, size: int, params: dict[str, Any]) -> torch.Tensor:
    """[length, size / 2]: how far each pair of a head turns at each place."""
    speeds = params.get("rope_theta", 10000.0) ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    if params.get("use_scaled_rope"):  # slow pairs turn eight times slower, fast ones as ever, others between
        turns = 8192 * speeds / (2 * math.pi)
        share = ((turns - 1) / (4 - 1)).clamp(0, 1)
        speeds = speeds * (share + (1 - share) / 8)
    return torch.outer(torch.arange(length, dtype=torch.float32), speeds)


def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = even * by.cos() - odd * by.sin(), even * by.sin() + odd * by.cos()
    return torch.stack(pairs, -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        dim = params["dim"]
        self.size = dim // params["n_heads"]
        keys = (params.get("n_kv_heads") or params["n_heads"]) * self.size
        self.wq, self.wk, self.wv, self.wo = column(dim, dim), column(dim, keys), column(dim, keys), row(dim, dim)

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        out = scaled_dot_product_attention(turned(q, by), turned(k, by), v, is_causal=True, enable_gqa=True)
        done: torch.Tensor = self.wo(out.transpose(1, 2).flatten(2))
        return done


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = column(dim, inner), row(inner, dim), column(dim, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(silu(self.w1(x)) * self.w3(x))
        return out


class Layer(nn.Module):
    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        from tests.engines.meta_oracle import feed_forward_size

        dim = params["dim"]
        inner = feed_forward_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier"))
        self.attention, self.feed_forward = Attention(params), FeedForward(dim, inner)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dim, params["norm_eps"]) for _ in range(2))

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), by)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, params: dict[str, Any], vocabulary: int, by_rows: bool) -> None:
        super().__init__()
        from fairscale.nn.model_parallel.layers import ParallelEmbedding, VocabParallelEmbedding

        self.params = params
        table = VocabParallelEmbedding if by_rows else ParallelEmbedding  # Llama 3; Llama 1 and 2
        self.tok_embeddings = table(vocabulary, params["dim"], init_method=lambda weight: weight)
        self.layers = nn.ModuleList(Layer(params) for _ in range(params["n_layers"]))
        self.norm = nn.RMSNorm(params["dim"], params["norm_eps"])
        self.output = column(params["dim"], vocabulary, gather=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        by = angles(tokens.shape[1], self.params["dim"] // self.params["n_heads"], self.params)
        for layer in self.layers:
            x = layer(x, by)
        out: torch.Tensor = self.output(self.norm(x))
        return out


def rank_logits(folder: Path, scratch: Path, rank: int, ranks: int) -> None:
    from fairscale.nn.model_parallel import initialize_model_parallel

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", f"file://{scratch / 'rendezvous'}", rank=rank, world_size=ranks)
    initialize_model_parallel(ranks)
    files = sorted(folder.glob("*.pth"))
    tensors = torch.load(files[rank], weights_only=True)
    params = json.loads((folder / "params.json").read_text())
    vocabulary = tensors["output.weight"].shape[0] * ranks
    model = Llama(params, vocabulary, by_rows=tensors["tok_embeddings.weight"].shape[0] < vocabulary)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "rope.freqs"}, strict=True)
    with torch.inference_mode():
        out = model(torch.load(scratch / "tokens.pt"))
    if rank == 0:
        torch.save(out, scratch / "logits.pt")
