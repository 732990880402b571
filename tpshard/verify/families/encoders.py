"""Encoders: the BERT family and its relatives."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.slots import IN, OUT, Slot

_BERT = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "self.query": Slot("query", OUT),
    "self.key": Slot("key_value", OUT),
    "self.value": Slot("key_value", OUT),
    "attention.output.dense": Slot("query", IN, consumer=True),
    "crossattention.self.query": Slot("query", OUT, cross=True),
    "crossattention.self.key": Slot("key_value", OUT, cross=True),
    "crossattention.self.value": Slot("key_value", OUT, cross=True),
    "crossattention.output.dense": Slot("query", IN, consumer=True, cross=True),
    "intermediate.dense": Slot("channel", OUT),
    "output.dense": Slot("channel", IN, consumer=True),
    "predictions.decoder": Slot("word", 0),
    "predictions.bias": Slot("word", 0),
    "lm_head.decoder": Slot("word", 0),
    "lm_head.bias": Slot("word", 0),
    "generator_lm_head": Slot("word", 0),
}
_DISTILBERT = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "q_lin": Slot("query", OUT),
    "k_lin": Slot("key_value", OUT),
    "v_lin": Slot("key_value", OUT),
    "out_lin": Slot("query", IN, consumer=True),
    "lin1": Slot("channel", OUT),
    "lin2": Slot("channel", IN, consumer=True),
    "vocab_projector": Slot("word", 0),
}
_ALBERT = {
    "word_embeddings": Slot("word", 0, consumer=True),
    "attention.query": Slot("query", OUT),
    "attention.key": Slot("key_value", OUT),
    "attention.value": Slot("key_value", OUT),
    "attention.dense": Slot("query", IN, consumer=True),
    "ffn": Slot("channel", OUT),
    "ffn_output": Slot("channel", IN, consumer=True),
    "predictions.decoder": Slot("word", 0),
    "predictions.bias": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra"), _BERT),
    **dict.fromkeys(("data2vec-text", "ernie", "roberta-prelayernorm"), _BERT),
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}
TIED_BY_DEFAULT = frozenset(FAMILIES)
