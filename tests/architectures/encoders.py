"""Encoders of the BERT family and its relatives: as many key-value heads as query heads."""

from __future__ import annotations

from tests.architectures import GROUPED, PLAIN, Architecture

TP = (2, 4, 3)
NARROW = PLAIN | {"embedding_size": 26}  # embeddings narrower than hidden
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32}
_LOCAL = ["sliding_attention", "full_attention"]

ARCHITECTURES = (
    *(
        Architecture(kind, "bert", PLAIN, TP)
        for kind in ("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text")
    ),
    Architecture("roberta-prelayernorm", "bert", PLAIN, TP),
    Architecture("ernie", "bert", PLAIN, TP),
    Architecture("electra", "bert", NARROW, TP),
    Architecture("albert", "albert", NARROW, TP),
    Architecture(
        "distilbert",
        "distilbert",
        {"vocab_size": 211, "dim": 84, "n_layers": 2, "n_heads": 12, "hidden_dim": 52, "max_position_embeddings": 40},
        TP,
    ),
    *(Architecture(kind, "bert-like", PLAIN, TP) for kind in ("layoutlm", "megatron-bert", "rembert")),
    Architecture("bert-generation", "bert-like", PLAIN, TP, head="BertGenerationDecoder"),
    Architecture("big_bird", "bert-like", PLAIN | {"attention_type": "original_full"}, TP),
    Architecture("dpr", "bert-like", PLAIN | {"projection_dim": 26}, TP, head="DPRQuestionEncoder"),
    Architecture("splinter", "bert-like", PLAIN, TP, head="SplinterForQuestionAnswering"),
    Architecture("roformer", "bert-like", PLAIN | {"hidden_size": 72, "embedding_size": 26}, TP),
    Architecture("tapas", "bert-like", PLAIN, TP),
    Architecture("markuplm", "bert-like", PLAIN | {"max_depth": 5}, TP, head="MarkupLMForTokenClassification"),
    Architecture("lilt", "lilt", PLAIN | {"hidden_size": 96}, TP, head="LiltForTokenClassification"),
    Architecture("esm", "esm", PLAIN | {"hidden_size": 72, "position_embedding_type": "rotary"}, TP),
    Architecture("mpnet", "mpnet", PLAIN, TP),
    Architecture("longformer", "longformer", PLAIN | {"attention_window": [6, 10]}, TP),
    Architecture(
        "xmod",
        "xmod",
        PLAIN | {"languages": ["de_DE", "en_XX"], "default_language": "de_DE", "adapter_layer_norm": True},
        TP,
    ),
    Architecture("deberta", "deberta", NARROW | _RELATIVE, TP),
    Architecture(
        "deberta-v2", "deberta-v2", NARROW | _RELATIVE | {"conv_kernel_size": 3, "norm_rel_ebd": "layer_norm"}, TP
    ),
    Architecture("modernbert", "modernbert", PLAIN | {"hidden_size": 72, "layer_types": _LOCAL}, TP),
    Architecture("modernbert-decoder", "modernbert", PLAIN | {"hidden_size": 72, "layer_types": _LOCAL}, TP),
    *(
        Architecture(kind, "nomic_bert", PLAIN | {"hidden_size": 72}, TP)
        for kind in ("nomic_bert", "gte", "jina_embeddings_v3")
    ),
    Architecture("eurobert", "eurobert", GROUPED),
    Architecture(
        "xlnet",
        "xlnet",
        {"vocab_size": 211, "d_model": 84, "n_layer": 2, "n_head": 12, "d_inner": 52, "pad_token_id": 0},
        TP,
    ),
)
