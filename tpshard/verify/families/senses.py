"""Vision transformers, towers of CLIP's kind and encoders of sound: as many key-value heads as query heads.

Models whose stages or towers have heads of their own are not here.
"""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.verify.slots import IN, OUT, Slot

_FEED_FORWARD = {"fc1": Slot("channel", OUT), "fc2": Slot("channel", IN, consumer=True)}
_SEPARATE = {
    "q_proj": Slot("query", OUT),
    "k_proj": Slot("key_value", OUT),
    "v_proj": Slot("key_value", OUT),
}
_VIT = {
    "attention.query": Slot("query", OUT),
    "attention.key": Slot("key_value", OUT),
    "attention.value": Slot("key_value", OUT),
    "attention.output.dense": Slot("query", IN, consumer=True),
    "intermediate.dense": Slot("channel", OUT),
    "output.dense": Slot("channel", IN, consumer=True),
}
_BEIT = {  # [distances, heads]
    **_VIT,
    "relative_position_bias_table": Slot("query", 1, row_per_head=True),
}
_DINOV2 = {
    **_VIT,
    **_FEED_FORWARD,
    "weights_in": Slot("gate_up", OUT),
    "weights_out": Slot("channel", IN, consumer=True),
}
_DINOV3 = {
    **_SEPARATE,
    "attention.o_proj": Slot("query", IN, consumer=True),
    "gate_proj": Slot("channel", OUT),
    "up_proj": Slot("channel", OUT),
    "down_proj": Slot("channel", IN, consumer=True),
}
_CLIP = {
    **_SEPARATE,
    **_FEED_FORWARD,
    "token_embedding": Slot("word", 0, consumer=True),
    "out_proj": Slot("query", IN, consumer=True),
}
_SIGLIP = {  # torch's own attention in the head
    **_CLIP,
    "in_proj_weight": Slot("qkv", OUT),
    "in_proj_bias": Slot("qkv", OUT),
}
_WAV2VEC2 = {
    **_SEPARATE,
    "attention.out_proj": Slot("query", IN, consumer=True),
    "intermediate_dense": Slot("channel", OUT),
    "output_dense": Slot("channel", IN, consumer=True),
}

FAMILIES: Mapping[str, Mapping[str, Slot]] = {
    **dict.fromkeys(("vit", "deit", "ijepa", "vit_msn", "audio-spectrogram-transformer"), _VIT),
    **dict.fromkeys(("beit", "data2vec-vision"), _BEIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    "dinov3_vit": _DINOV3,
    **dict.fromkeys(("clip_text_model", "clip_vision_model"), _CLIP),
    **dict.fromkeys(("siglip_text_model", "siglip_vision_model"), _SIGLIP),
    **dict.fromkeys(("siglip2_text_model", "siglip2_vision_model"), _SIGLIP),
    **dict.fromkeys(("wav2vec2", "hubert", "sew", "data2vec-audio", "unispeech", "unispeech-sat"), _WAV2VEC2),
}
TIED_BY_DEFAULT: frozenset[str] = frozenset()  # none predicts words
