"""Encoder-decoders, which translate, summarise and answer."""

from __future__ import annotations

from tests.architectures import GROUPED, Architecture
from tpshard.checkpoint import Checkpoint
from tpshard.layout import Shape

TP = (2, 4, 3)
_T5 = {
    "vocab_size": 211, "d_model": 44, "d_kv": 10, "d_ff": 52, "num_layers": 1, "num_decoder_layers": 2,
    "num_heads": 12, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_GATED = _T5 | {"feed_forward_proj": "gated-gelu"}
_LONG = _T5 | {"local_radius": 5, "global_block_size": 4}
_BART = {  # heads of 7 and of 14 cells
    "vocab_size": 211, "d_model": 84, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 34, "encoder_attention_heads": 12, "decoder_attention_heads": 6, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_BART_TP = (2, 6, 3)
_GEMMA = GROUPED | {"hidden_size": 48, "head_dim": 10, "query_pre_attn_scalar": 10}
_CROSSED = {
    "hidden_size": 56,
    "intermediate_size": 34,
    "num_attention_heads": 8,
    "head_dim": 6,
    "cross_attention_hidden_size": 48,
}
_STACKS = "encoder", "decoder"

ARCHITECTURES = (
    Architecture("t5", "t5", _T5, TP),
    Architecture("t5", "t5", _GATED | {"tie_word_embeddings": False}, TP, variant="gated, untied"),
    Architecture("mt5", "t5", _GATED, TP),
    Architecture("umt5", "t5", _GATED, TP),
    Architecture("longt5", "t5", _LONG, TP),
    Architecture(
        "longt5", "t5", _LONG | {"encoder_attention_type": "transient-global"}, TP, variant="transient global"
    ),
    Architecture(
        "switch_transformers",
        "switch_transformers",
        _T5 | {"num_layers": 2, "num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        TP,
    ),
    *(
        Architecture(kind, "bart", _BART, _BART_TP)
        for kind in ("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "pegasus")
    ),
    Architecture(
        "mvp",
        "bart",
        _BART | {"use_prompt": True, "prompt_length": 5, "prompt_mid_dim": 26},
        _BART_TP,
        variant="with prompts",
    ),
    Architecture("plbart", "bart", _BART, _BART_TP),
    Architecture("pegasus_x", "bart", _BART | {"block_size": 8, "num_global_tokens": 5}, _BART_TP),
    Architecture(
        "led",
        "led",
        _BART | {"attention_window": [8], "max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 41},
        _BART_TP,
    ),
    Architecture("bigbird_pegasus", "bigbird_pegasus", _BART | {"attention_type": "original_full"}, _BART_TP),
    Architecture(
        "nllb-moe",
        "nllb-moe",
        _BART | {"encoder_layers": 2, "num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        _BART_TP,
    ),
    Architecture(
        "prophetnet",
        "prophetnet",
        {
            "vocab_size": 211, "hidden_size": 84, "encoder_ffn_dim": 52, "decoder_ffn_dim": 34, "ngram": 2,
            "num_encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_attention_heads": 12, "num_buckets": 10,
            "num_decoder_attention_heads": 6, "max_position_embeddings": 40,
        },
        _BART_TP,
    ),
    Architecture(
        "t5gemma",
        "t5gemma",
        {"encoder": _GEMMA | {"num_hidden_layers": 1}, "decoder": _GEMMA | _CROSSED, "vocab_size": 211},
    ),
)  # fmt: skip


def old_tensors(checkpoint: Checkpoint) -> dict[str, Shape]:
    """What files on the hub hold besides what is saved today."""
    shared = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name.endswith("shared.weight")}
    fairseq = any(".fc1." in name for name in checkpoint.tensors)
    deberta = any("rel_embeddings" in name for name in checkpoint.tensors)
    return {
        **{name.replace("shared", f"{stack}.embed_tokens"): s for name, s in shared.items() for stack in _STACKS},
        **{name.replace("shared.weight", f"{stack}.version"): (1,) for name in shared for stack in _STACKS if fairseq},
        **dict.fromkeys(["lm_head.weight"] * len(shared), (211, 44)),  # T5 1.1 and after: not tied to shared
        **({"mask_predictions.dense.weight": (84, 84), "lm_predictions.lm_head.bias": (211,)} if deberta else {}),
    }
