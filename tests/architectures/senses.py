"""Models that see or hear: vision, audio, and towers of either beside a text.

Images and convolutions are as small as the architecture lets them be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.architectures import GROUPED, PLAIN, Architecture

Sizes = Mapping[str, Any]
TP = (2, 4, 3)
SHARED = (2, 8, 4)  # of two key-value heads

LABELS: Sizes = {"num_labels": 5}
IMAGE: Sizes = {"image_size": 28, "patch_size": 7, "num_channels": 3}
LAYERS: Sizes = {"intermediate_size": 34, "num_hidden_layers": 2}
VISION: Sizes = {**IMAGE, **LAYERS, "hidden_size": 60, "num_attention_heads": 12}
EIGHT: Sizes = {**IMAGE, **LAYERS, "hidden_size": 56, "num_attention_heads": 8}  # beside a text of eight

# ---------------------------------------------------------------------------------------------- towers of images

BEIT: Sizes = {
    **VISION, **LABELS, "use_relative_position_bias": True, "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1, "use_absolute_position_embeddings": True,
}  # fmt: skip
STAGES: Sizes = {  # the first has three heads, for eight ranks
    **LABELS, "image_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 24, "depths": [2, 1, 1, 1],
    "num_heads": [3, 6, 12, 24],
}  # fmt: skip
CONVOLUTIONS: Sizes = {**LABELS, "image_size": 32, "hidden_sizes": [8, 12, 20, 28], "depths": [1, 1, 1, 1]}
DINOV2: Sizes = {
    **IMAGE,
    **LABELS,
    "num_hidden_layers": 2,
    "hidden_size": 60,
    "num_attention_heads": 12,
    "mlp_ratio": 3,
}

_VISION = (
    Architecture("vit", "vit", {**VISION, **LABELS}, TP, "ViTForImageClassification"),
    Architecture("deit", "vit", {**VISION, **LABELS}, TP, "DeiTForImageClassificationWithTeacher"),
    Architecture("vit_msn", "vit", {**VISION, **LABELS}, TP, "ViTMSNForImageClassification"),
    Architecture("ijepa", "vit", {**VISION, **LABELS}, TP, "IJepaForImageClassification"),
    Architecture("beit", "beit", BEIT, TP, "BeitForImageClassification"),
    Architecture("data2vec-vision", "beit", BEIT, TP, "Data2VecVisionForImageClassification"),
    Architecture("dinov2", "dinov2", DINOV2, TP, "Dinov2ForImageClassification"),
    Architecture("dinov2", "dinov2", {**DINOV2, "use_swiglu_ffn": True}, TP, "Dinov2ForImageClassification", "gated"),
    Architecture("dinov2_with_registers", "dinov2", DINOV2, TP, "Dinov2WithRegistersForImageClassification"),
    Architecture("dinov3_vit", "dinov3_vit", {**VISION, "hidden_size": 96}, TP, "DINOv3ViTModel"),
    Architecture("swin", "swin", STAGES, (3, 8, 2), "SwinForImageClassification"),
    Architecture("swinv2", "swinv2", STAGES, (3, 8, 2), "Swinv2ForImageClassification"),
    Architecture("convnext", "convnext", CONVOLUTIONS, TP, "ConvNextForImageClassification"),
    Architecture("convnextv2", "convnextv2", CONVOLUTIONS, TP, "ConvNextV2ForImageClassification"),
    Architecture(
        "resnet",
        "resnet",
        {**LABELS, "embedding_size": 6, "hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 1, 1]},
        TP,
        "ResNetForImageClassification",
    ),
    Architecture(
        "segformer",
        "segformer",
        {
            **LABELS, "image_size": 64, "hidden_sizes": [12, 24, 36, 48], "num_attention_heads": [1, 3, 6, 12],
            "depths": [1, 1, 1, 1], "decoder_hidden_size": 20,
        },
        (3, 2),
        "SegformerForSemanticSegmentation",
    ),
    Architecture(
        "sam",
        "sam",
        {
            "vision_config": {
                "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 12, "mlp_dim": 34, "image_size": 32,
                "patch_size": 4, "output_channels": 256, "window_size": 3, "global_attn_indexes": [1],
            },
            "prompt_encoder_config": {
                "hidden_size": 256, "image_size": 32, "patch_size": 4, "image_embedding_size": 8,
                "mask_input_channels": 8,
            },
            "mask_decoder_config": {
                "hidden_size": 256, "num_attention_heads": 4, "mlp_dim": 26, "iou_head_hidden_dim": 22
            },
        },
        TP,
        "SamModel",
    ),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------- images and texts apart

PAIR: Sizes = {"text_config": {**PLAIN, "projection_size": 60}, "vision_config": VISION, "projection_dim": 26}
PATCHES: Sizes = {**PAIR, "vision_config": {**VISION, "num_patches": 16}}

_PAIRS = (
    Architecture("clip", "clip", PAIR, TP, "CLIPModel"),
    Architecture("metaclip_2", "clip", PAIR, TP, "MetaClip2Model"),
    Architecture("siglip", "siglip", PAIR, TP, "SiglipModel"),
    Architecture("siglip2", "siglip", PATCHES, TP, "Siglip2Model"),
    Architecture("clip_text_model", "clip_tower", PLAIN, TP, "CLIPTextModel"),
    Architecture("clip_vision_model", "clip_tower", VISION, TP, "CLIPVisionModel"),
    Architecture("siglip_text_model", "siglip_tower", PLAIN, TP, "SiglipTextModel"),
    Architecture("siglip_vision_model", "siglip_tower", VISION, TP, "SiglipVisionModel"),
    Architecture("siglip2_text_model", "siglip_tower", PLAIN, TP, "Siglip2TextModel"),
    Architecture("siglip2_vision_model", "siglip_tower", PATCHES["vision_config"], TP, "Siglip2VisionModel"),
    Architecture(
        "blip",
        "blip",
        {
            "text_config": {**PLAIN, "encoder_hidden_size": 60}, "vision_config": VISION, "projection_dim": 26,
            "image_text_hidden_size": 29,
        },
        TP,
        "BlipForConditionalGeneration",
    ),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------- sound

SAMPLES: Sizes = {
    **PLAIN, "vocab_size": 33, "conv_dim": (26, 38), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True,
    "feat_extract_norm": "layer", "num_feat_extract_layers": 2,
}  # fmt: skip
GROUP_NORM: Sizes = {**SAMPLES, "do_stable_layer_norm": False, "feat_extract_norm": "group"}  # as the base models

_SOUND = (
    Architecture("wav2vec2", "wav2vec2", SAMPLES, TP, "Wav2Vec2ForCTC"),
    Architecture("wav2vec2", "wav2vec2", GROUP_NORM, TP, "Wav2Vec2ForCTC", "base"),
    Architecture("hubert", "wav2vec2", SAMPLES, TP, "HubertForCTC"),
    Architecture("data2vec-audio", "wav2vec2", SAMPLES, TP, "Data2VecAudioForCTC"),
    Architecture("unispeech", "wav2vec2", SAMPLES, TP, "UniSpeechForCTC"),
    Architecture("unispeech-sat", "wav2vec2", SAMPLES, TP, "UniSpeechSatForCTC"),
    Architecture("sew", "wav2vec2", SAMPLES, TP, "SEWForCTC"),
    Architecture("wavlm", "wavlm", SAMPLES, TP, "WavLMForCTC"),
    Architecture(
        "audio-spectrogram-transformer",
        "vit",
        {
            **VISION, **LABELS, "patch_size": 5, "max_length": 30, "num_mel_bins": 12, "frequency_stride": 4,
            "time_stride": 4,
        },
        TP,
        "ASTForAudioClassification",
    ),
    Architecture(
        "whisper",
        "whisper",
        {
            "vocab_size": 211, "d_model": 60, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 52,
            "decoder_ffn_dim": 34, "encoder_attention_heads": 12, "decoder_attention_heads": 6, "num_mel_bins": 8,
            "max_source_positions": 16, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        (2, 6, 3),
        "WhisperForConditionalGeneration",
    ),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------- and text

TEXT: Sizes = {**GROUPED, "max_position_embeddings": 90}
CLIP: Sizes = {**EIGHT, "model_type": "clip_vision_model"}
SIGLIP: Sizes = {**EIGHT, "model_type": "siglip_vision_model"}
PIXTRAL: Sizes = {**EIGHT, "model_type": "pixtral", "head_dim": 8, "hidden_size": 64}
TILES: Sizes = {"image_grid_pinpoints": [[28, 28], [28, 56]]}
WHOLE: Sizes = {"vision_feature_select_strategy": "full"}  # there is no class token to leave out


def beside(text: str, vision: Sizes, **more: Any) -> Sizes:
    """Sizes of a text and of a tower; token 210 stands for an image."""
    tokens = {"image_token_index": 210, "image_token_id": 210, "video_token_index": 209, "video_token_id": 209}
    return {"text_config": {**TEXT, "model_type": text}, "vision_config": vision, **tokens, **more}


def qwen(vision: Sizes, **more: Any) -> Sizes:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]}
    tokens = {"image_token_id": 210, "video_token_id": 209, "vision_start_token_id": 208, "vision_end_token_id": 207}
    tower = {"depth": 2, "num_heads": 8, "patch_size": 4, **vision}
    return {"text_config": {**TEXT, "rope_parameters": rope, **more}, "vision_config": tower, **tokens}


def heard(text: str, audio: Sizes) -> Sizes:
    sound = {"num_mel_bins": 8, "max_source_positions": 16, **audio}
    return {
        "text_config": {**TEXT, "model_type": text},
        "audio_config": sound,
        "audio_token_id": 210,
        "audio_token_index": 210,
    }


ENCODER: Sizes = {
    "model_type": "qwen2_audio_encoder", "d_model": 56, "encoder_layers": 2, "encoder_attention_heads": 8,
    "encoder_ffn_dim": 34,
}  # fmt: skip
SLOWER: Sizes = {  # four frames side by side make a position
    "model_type": "voxtral_encoder", "hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 8,
    "intermediate_size": 224,
}  # fmt: skip
WIDE: Sizes = {"hidden_size": 32, "out_hidden_size": 80, "intermediate_size": 37}
LLAVA, NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
ONEVISION = "LlavaOnevisionForConditionalGeneration"

_LANGUAGE = (
    Architecture("llava", "llava", beside("llama", CLIP), SHARED, LLAVA),
    Architecture("llava", "llava-mistral", beside("mistral", CLIP), SHARED, LLAVA, "mistral"),
    Architecture("llava", "llava-qwen2", beside("qwen2", SIGLIP, **WHOLE), SHARED, LLAVA, "qwen2"),
    Architecture("llava", "pixtral", beside("mistral", PIXTRAL, vision_feature_layer=-1, **WHOLE), SHARED, LLAVA, "pixtral"),
    Architecture("llava_next", "llava", beside("llama", CLIP, **TILES), SHARED, NEXT),
    Architecture("llava_next", "llava-mistral", beside("mistral", CLIP, **TILES), SHARED, NEXT, "mistral"),
    Architecture("llava_next", "llava-qwen2", beside("qwen2", CLIP, **TILES), SHARED, NEXT, "qwen2"),
    Architecture("vipllava", "llava", beside("llama", CLIP, vision_feature_layers=[-2, -1]), SHARED, "VipLlavaForConditionalGeneration"),
    Architecture("llava_onevision", "llava-qwen2", beside("qwen2", SIGLIP, vision_feature_layer=-1, **TILES, **WHOLE), SHARED, ONEVISION),
    Architecture("paligemma", "paligemma", beside("gemma", SIGLIP, projection_dim=80), SHARED, "PaliGemmaForConditionalGeneration"),
    Architecture("paligemma", "paligemma2", beside("gemma2", SIGLIP, projection_dim=80), SHARED, "PaliGemmaForConditionalGeneration", "2"),
    Architecture("gemma3", "gemma3", beside("gemma3_text", SIGLIP, mm_tokens_per_image=4), SHARED, "Gemma3ForConditionalGeneration"),
    Architecture("idefics3", "idefics3", beside("llama", EIGHT, scale_factor=2), SHARED, "Idefics3ForConditionalGeneration"),
    Architecture("smolvlm", "idefics3", beside("llama", EIGHT, scale_factor=2), SHARED, "SmolVLMForConditionalGeneration"),
    *(
        Architecture(
            "internvl",
            "internvl",
            beside(text, {**EIGHT, "image_size": [28, 28], "patch_size": [7, 7]}),
            SHARED,
            "InternVLForConditionalGeneration",
            variant,
        )
        for text, variant in (("qwen2", ""), ("qwen3", "qwen3"))
    ),
    *(
        Architecture(
            "mistral3",
            policy,
            beside(text, PIXTRAL, spatial_merge_size=2),
            SHARED,
            "Mistral3ForConditionalGeneration",
            variant,
        )
        for policy, text, variant in (("mistral3", "mistral", ""), ("mistral3-ministral", "ministral3", "ministral"))
    ),
    Architecture("qwen2_vl", "qwen2_vl", qwen({"embed_dim": 32, "hidden_size": 80, "mlp_ratio": 3}), SHARED, "Qwen2VLForConditionalGeneration"),
    Architecture("qwen2_5_vl", "qwen2_vl", qwen({**WIDE, "window_size": 16, "fullatt_block_indexes": [1]}), SHARED, "Qwen2_5_VLForConditionalGeneration"),
    Architecture("qwen3_vl", "qwen2_vl", qwen({**WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, head_dim=10), SHARED, "Qwen3VLForConditionalGeneration"),
    Architecture(
        "mllama",
        "mllama",
        {
            "text_config": {
                **TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                **IMAGE, **LAYERS, "hidden_size": 56, "attention_heads": 8, "num_global_layers": 1,
                "vision_output_dim": 112, "intermediate_layers_indices": [1], "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            "image_token_index": 210,
        },
        SHARED,
        "MllamaForConditionalGeneration",
    ),
    Architecture(
        "llama4",
        "llama4-images",
        {
            "text_config": {
                **TEXT, "num_hidden_layers": 2, "head_dim": 6, "intermediate_size": 26, "intermediate_size_mlp": 52,
                "num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "moe_layers": [1],
            },
            "vision_config": {
                "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8,
                "image_size": 16, "patch_size": 4, "vision_output_dim": 36, "projector_input_dim": 36,
                "projector_output_dim": 36, "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": 210,
        },
        SHARED,
        "Llama4ForConditionalGeneration",
    ),
    Architecture("qwen2_audio", "qwen2_audio", heard("qwen2", ENCODER), SHARED, "Qwen2AudioForConditionalGeneration"),
    Architecture("voxtral", "voxtral", heard("llama", SLOWER), SHARED, "VoxtralForConditionalGeneration"),
)  # fmt: skip

ARCHITECTURES = (*_VISION, *_PAIRS, *_SOUND, *_LANGUAGE)

# What a class needs besides, and sizes that bring other tensors: for the test that every tensor meets a rule.
NEEDS: Mapping[str, Sizes] = {
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "Data2VecVisionForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
}
MORE: Mapping[str, tuple[tuple[Sizes, str], ...]] = {
    "beit": (({"use_shared_relative_position_bias": True, "use_relative_position_bias": False}, "BeitModel"),),
    "swin": (({"use_absolute_embeddings": True}, "SwinModel"),),
    "wav2vec2": (
        ({"add_adapter": True, "output_hidden_size": 22}, "Wav2Vec2Model"),
        ({"use_weighted_layer_sum": True}, "Wav2Vec2ForSequenceClassification"),
        ({"adapter_attn_dim": 6}, "Wav2Vec2ForCTC"),
    ),
    "whisper": (
        ({"use_weighted_layer_sum": True}, "WhisperForAudioClassification"),
        ({"tie_word_embeddings": False}, "WhisperForConditionalGeneration"),
    ),
    "llava": (({"vision_config": SIGLIP}, "LlavaForConditionalGeneration"),),
}
