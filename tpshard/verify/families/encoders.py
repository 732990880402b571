"""Encoders: the BERT family and its relatives."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.families.decoders import LLAMA
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
_MPNET = {
    **_BERT,
    "attn.q": Slot("query", OUT),
    "attn.k": Slot("key_value", OUT),
    "attn.v": Slot("key_value", OUT),
    "attn.o": Slot("query", IN, consumer=True),
    "relative_attention_bias": Slot("query", 1, row_per_head=True),  # a table [buckets, heads]
}
_LONGFORMER = {
    **_BERT,
    "self.query_global": Slot("query", OUT),
    "self.key_global": Slot("key_value", OUT),
    "self.value_global": Slot("key_value", OUT),
}
_ESM = {name: slot for name, slot in _BERT.items() if name != "lm_head.bias"}  # added to gathered words
_DEBERTA_V2 = {
    **_BERT,
    "self.query_proj": Slot("query", OUT),
    "self.key_proj": Slot("key_value", OUT),
    "self.value_proj": Slot("key_value", OUT),
    "self.pos_key_proj": Slot("key_value", OUT),
    "self.pos_query_proj": Slot("query", OUT),
}
_MODERNBERT = {
    "tok_embeddings": Slot("word", 0, consumer=True),
    "attn.Wqkv": Slot("qkv", OUT),
    "attn.q_proj": Slot("query", OUT),
    "attn.k_proj": Slot("key_value", OUT),
    "attn.v_proj": Slot("key_value", OUT),
    "attn.Wo": Slot("query", IN, consumer=True),
    "mlp.Wi": Slot("gate_up", OUT),
    "mlp.Wo": Slot("channel", IN, consumer=True),
    "decoder": Slot("word", 0),
}
_NOMIC = {
    "word_embeddings": Slot("word", 0, consumer=True),
    **dict.fromkeys(("attn.Wqkv", "mixer.Wqkv", "qkv_proj"), Slot("qkv", OUT)),
    **dict.fromkeys(("attn.out_proj", "mixer.out_proj", "o_proj"), Slot("query", IN, consumer=True)),
    **dict.fromkeys(("fc1", "fc11", "fc12"), Slot("channel", OUT)),
    "up_gate_proj": Slot("gate_up", OUT),
    **dict.fromkeys(("fc2", "down_proj"), Slot("channel", IN, consumer=True)),
    **dict.fromkeys(("predictions.decoder", "predictions.bias", "lm_head.decoder", "lm_head.bias"), Slot("word", 0)),
}
_XLNET = {  # attention is loose parameters, used inside a larger forward: whole
    "word_embedding": Slot("word", 0, consumer=True),
    "ff.layer_1": Slot("channel", OUT),
    "ff.layer_2": Slot("channel", IN, consumer=True),
    "lm_loss": Slot("word", 0),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra"), _BERT),
    **dict.fromkeys(("data2vec-text", "ernie", "roberta-prelayernorm"), _BERT),
    **dict.fromkeys(("bert-generation", "big_bird", "dpr", "layoutlm", "markuplm", "megatron-bert"), _BERT),
    **dict.fromkeys(("rembert", "roformer", "splinter", "tapas"), _BERT),
    "deberta-v2": _DEBERTA_V2,
    "esm": _ESM,
    "eurobert": LLAMA,
    **dict.fromkeys(("gte", "jina_embeddings_v3", "nomic_bert"), _NOMIC),
    "longformer": _LONGFORMER,
    **dict.fromkeys(("modernbert", "modernbert-decoder"), _MODERNBERT),
    "mpnet": _MPNET,
    "xlnet": _XLNET,
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}
TIED_BY_DEFAULT = frozenset(FAMILIES) - {"eurobert", "rembert"}
