"""Encoders of the BERT family and its relatives: as many key-value heads as query heads."""

from __future__ import annotations

from tests.architectures import PLAIN, Architecture

TP = (2, 4, 3)
NARROW = PLAIN | {"embedding_size": 26}  # embeddings narrower than hidden

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
)
