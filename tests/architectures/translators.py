"""Encoder-decoders, which translate, summarise and answer."""

from __future__ import annotations

from tests.architectures import Architecture

TP = (2, 4, 3)
_T5 = {
    "vocab_size": 211, "d_model": 44, "d_kv": 10, "d_ff": 52, "num_layers": 1, "num_decoder_layers": 2,
    "num_heads": 12, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_GATED = _T5 | {"feed_forward_proj": "gated-gelu"}
_BART = {  # heads of 7 and of 14 cells
    "vocab_size": 211, "d_model": 84, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 34, "encoder_attention_heads": 12, "decoder_attention_heads": 6, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_BART_TP = (2, 6, 3)

ARCHITECTURES = (
    Architecture("t5", "t5", _T5, TP),
    Architecture("t5", "t5", _GATED | {"tie_word_embeddings": False}, TP, variant="gated, untied"),
    Architecture("mt5", "t5", _GATED, TP),
    Architecture("umt5", "t5", _GATED, TP),
    Architecture("longt5", "t5", _T5, TP),
    Architecture(
        "longt5", "t5", _T5 | {"encoder_attention_type": "transient-global"}, TP, variant="transient global"
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
    *(Architecture(kind, "bart", _BART, _BART_TP) for kind in ("pegasus_x", "plbart")),
)  # fmt: skip
