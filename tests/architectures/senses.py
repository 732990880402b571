"""Models that see or hear, and those that also speak of it: vision, audio, vision and language.

Convolutions and images are as small as the architecture lets them be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.architectures import GROUPED, PLAIN, Architecture

TP = (2, 4, 3)
SHARED = (2, 8, 4)  # key-value heads are shared

IMAGE: Mapping[str, Any] = {"image_size": 28, "patch_size": 7, "num_channels": 3}
LAYERS: Mapping[str, Any] = {"intermediate_size": 34, "num_hidden_layers": 2}
VISION: Mapping[str, Any] = {**IMAGE, **LAYERS, "hidden_size": 60, "num_attention_heads": 12}
LABELS: Mapping[str, Any] = {"num_labels": 5}
EIGHT: Mapping[str, Any] = {**VISION, "hidden_size": 56, "num_attention_heads": 8}

VIT = "ViTForImageClassification"

ARCHITECTURES = (
    Architecture("vit", "vit", {**VISION, **LABELS}, TP, "ViTForImageClassification"),
    Architecture("deit", "vit", {**VISION, **LABELS}, TP, "DeiTForImageClassificationWithTeacher"),
    Architecture("vit_msn", "vit", {**VISION, **LABELS}, TP, "ViTMSNForImageClassification"),
    Architecture("beit", "beit", {**VISION, **LABELS, "use_relative_position_bias": True, "use_shared_relative_position_bias": False, "layer_scale_init_value": 0.1, "use_absolute_position_embeddings": True}, TP, "BeitForImageClassification"),
    Architecture("data2vec-vision", "beit", {**VISION, **LABELS, "use_relative_position_bias": True, "use_shared_relative_position_bias": False, "layer_scale_init_value": 0.1, "use_absolute_position_embeddings": True}, TP, "Data2VecVisionForImageClassification"),
    Architecture("dinov2", "dinov2", {**VISION, **LABELS, "mlp_ratio": 3}, TP, "Dinov2ForImageClassification"),
    Architecture("dinov2", "dinov2", {**VISION, **LABELS, "mlp_ratio": 3, "use_swiglu_ffn": True}, TP, "Dinov2ForImageClassification", "swiglu"),
    Architecture("dinov2_with_registers", "dinov2", {**VISION, **LABELS, "mlp_ratio": 3}, TP, "Dinov2WithRegistersForImageClassification"),
    Architecture("dinov3_vit", "dinov3_vit", {**VISION, "hidden_size": 96}, TP, "DINOv3ViTModel"),
    Architecture("audio-spectrogram-transformer", "vit", {**VISION, **LABELS, "patch_size": 5, "max_length": 30, "num_mel_bins": 12, "frequency_stride": 4, "time_stride": 4}, TP, "ASTForAudioClassification"),
    Architecture("swin", "swin", {**LABELS, "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 1, 1, 1], "num_heads": [3, 6, 12, 24], "window_size": 2}, (3, 8), "SwinForImageClassification"),
    Architecture("swinv2", "swinv2", {**LABELS, "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 1, 1, 1], "num_heads": [3, 6, 12, 24], "window_size": 2}, (3, 8), "Swinv2ForImageClassification"),
    Architecture("convnext", "convnext", {**LABELS, "image_size": 32, "hidden_sizes": [8, 12, 20, 28], "depths": [1, 1, 1, 1]}, TP, "ConvNextForImageClassification"),
    Architecture("convnextv2", "convnextv2", {**LABELS, "image_size": 32, "hidden_sizes": [8, 12, 20, 28], "depths": [1, 1, 1, 1]}, TP, "ConvNextV2ForImageClassification"),
    Architecture("resnet", "resnet", {**LABELS, "embedding_size": 6, "hidden_sizes": [16, 24, 40, 56], "depths": [2, 1, 1, 1]}, TP, "ResNetForImageClassification"),
    Architecture("segformer", "segformer", {**LABELS, "hidden_sizes": [12, 24, 36, 48], "num_attention_heads": [1, 3, 6, 12], "depths": [1, 1, 1, 1], "decoder_hidden_size": 20, "image_size": 64}, (3, 2), "SegformerForSemanticSegmentation"),
    Architecture("clip", "clip", {"text_config": {**PLAIN}, "vision_config": {**VISION}, "projection_dim": 26}, TP, "CLIPModel"),
    Architecture("siglip", "siglip", {"text_config": {**PLAIN, "projection_size": 60}, "vision_config": {**VISION}}, TP, "SiglipModel"),
    Architecture("siglip2", "siglip", {"text_config": {**PLAIN, "projection_size": 60}, "vision_config": {**VISION, "num_patches": 16}}, TP, "Siglip2Model"),
    Architecture("whisper", "whisper", {"vocab_size": 211, "d_model": 60, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 52, "decoder_ffn_dim": 34, "encoder_attention_heads": 12, "decoder_attention_heads": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 40, "suppress_tokens": None, "begin_suppress_tokens": None}, (2, 6, 3), "WhisperForConditionalGeneration"),
    *(Architecture(kind, "wavlm" if kind == "wavlm" else "wav2vec2", {**PLAIN, "vocab_size": 33, "conv_dim": (26, 38), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_feat_extract_layers": 2}, TP, head)
      for kind, head in (("wav2vec2", "Wav2Vec2ForCTC"), ("hubert", "HubertForCTC"), ("wavlm", "WavLMForCTC"), ("data2vec-audio", "Data2VecAudioForCTC"), ("unispeech", "UniSpeechForCTC"), ("unispeech-sat", "UniSpeechSatForCTC"), ("sew", "SEWForCTC"))),
)  # fmt: skip

TEXT: Mapping[str, Any] = {**GROUPED, "hidden_size": 80, "max_position_embeddings": 90}
CLIP_VISION: Mapping[str, Any] = {**EIGHT, "model_type": "clip_vision_model"}
SIGLIP_VISION: Mapping[str, Any] = {**EIGHT, "model_type": "siglip_vision_model"}
ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]}


def both(text: str, vision: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": {**TEXT, "model_type": text}, "vision_config": vision, **more}


LANGUAGE = (
    Architecture("llava", "llava", both("llama", CLIP_VISION, image_token_index=210), SHARED, "LlavaForConditionalGeneration"),
    Architecture("llava", "llava-mistral", both("mistral", CLIP_VISION, image_token_index=210), SHARED, "LlavaForConditionalGeneration", "mistral"),
    Architecture("llava", "llava-qwen2", both("qwen2", SIGLIP_VISION, image_token_index=210, vision_feature_select_strategy="full"), SHARED, "LlavaForConditionalGeneration", "qwen2"),
    Architecture("llava_next", "llava-mistral", both("mistral", CLIP_VISION, image_token_index=210, image_grid_pinpoints=[[28, 28], [28, 56]]), SHARED, "LlavaNextForConditionalGeneration"),
    Architecture("vipllava", "llava", both("llama", CLIP_VISION, image_token_index=210, vision_feature_layers=[-2, -1]), SHARED, "VipLlavaForConditionalGeneration"),
    Architecture("llava_onevision", "llava-qwen2", both("qwen2", SIGLIP_VISION, image_token_index=210, video_token_index=209, image_grid_pinpoints=[[28, 28], [28, 56]], vision_feature_select_strategy="full", vision_feature_layer=-1), SHARED, "LlavaOnevisionForConditionalGeneration"),
    Architecture("paligemma", "paligemma", both("gemma", SIGLIP_VISION, image_token_index=210, projection_dim=80), SHARED, "PaliGemmaForConditionalGeneration"),
    Architecture("gemma3", "gemma3", both("gemma3_text", SIGLIP_VISION, image_token_index=210, mm_tokens_per_image=4), SHARED, "Gemma3ForConditionalGeneration"),
    Architecture("idefics3", "idefics3", both("llama", {**EIGHT, "image_size": 28}, image_token_id=210, scale_factor=2), SHARED, "Idefics3ForConditionalGeneration"),
    Architecture("smolvlm", "idefics3", both("llama", {**EIGHT, "image_size": 28}, image_token_id=210, scale_factor=2), SHARED, "SmolVLMForConditionalGeneration"),
    Architecture("internvl", "internvl", both("qwen2", {**EIGHT, "image_size": [28, 28], "patch_size": [7, 7]}, image_token_id=210), SHARED, "InternVLForConditionalGeneration"),
    Architecture("mistral3", "mistral3", both("mistral", {**EIGHT, "model_type": "pixtral", "head_dim": 8, "hidden_size": 64}, image_token_index=210, spatial_merge_size=2), SHARED, "Mistral3ForConditionalGeneration"),
    Architecture("llava", "pixtral", both("mistral", {**EIGHT, "model_type": "pixtral", "head_dim": 8, "hidden_size": 64}, image_token_index=210, vision_feature_layer=-1, vision_feature_select_strategy="full"), SHARED, "LlavaForConditionalGeneration", "pixtral"),
    Architecture("qwen2_vl", "qwen2_vl", {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 80, "num_heads": 8, "mlp_ratio": 3, "patch_size": 4}, "image_token_id": 210, "video_token_id": 209, "vision_start_token_id": 208, "vision_end_token_id": 207}, SHARED, "Qwen2VLForConditionalGeneration"),
    Architecture("qwen2_5_vl", "qwen2_vl", {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 80, "num_heads": 8, "intermediate_size": 37, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}, "image_token_id": 210, "video_token_id": 209, "vision_start_token_id": 208, "vision_end_token_id": 207}, SHARED, "Qwen2_5_VLForConditionalGeneration"),
    Architecture("qwen3_vl", "qwen2_vl", {"text_config": {**TEXT, "head_dim": 10, "rope_parameters": ROPE}, "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 80, "num_heads": 8, "intermediate_size": 37, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, "image_token_id": 210, "video_token_id": 209, "vision_start_token_id": 208, "vision_end_token_id": 207}, SHARED, "Qwen3VLForConditionalGeneration"),
    Architecture("mllama", "mllama", {"text_config": {**TEXT, "model_type": "mllama_text_model", "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "vision_config": {**IMAGE, "hidden_size": 56, "attention_heads": 8, "intermediate_size": 34, "num_hidden_layers": 2, "num_global_layers": 1, "vision_output_dim": 112, "intermediate_layers_indices": [1], "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}, "image_token_index": 210}, SHARED, "MllamaForConditionalGeneration"),
    Architecture("qwen2_audio", "qwen2_audio", {"text_config": {**TEXT, "model_type": "qwen2"}, "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 56, "encoder_layers": 2, "encoder_attention_heads": 8, "encoder_ffn_dim": 34, "num_mel_bins": 8, "max_source_positions": 16}, "audio_token_index": 210}, SHARED, "Qwen2AudioForConditionalGeneration"),
    Architecture("blip", "blip", {"text_config": {**PLAIN, "encoder_hidden_size": 60}, "vision_config": VISION, "projection_dim": 26, "image_text_hidden_size": 29}, TP, "BlipForConditionalGeneration"),
    Architecture("clip_text_model", "clip_tower", PLAIN, TP, "CLIPTextModel"),
    Architecture("clip_vision_model", "clip_tower", VISION, TP, "CLIPVisionModel"),
    Architecture("siglip_vision_model", "siglip_tower", VISION, TP, "SiglipVisionModel"),
    Architecture("sam", "sam", {"vision_config": {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 12, "mlp_dim": 34, "image_size": 32, "patch_size": 4, "output_channels": 24, "window_size": 3, "global_attn_indexes": [1]}, "prompt_encoder_config": {"hidden_size": 24, "image_size": 32, "patch_size": 4, "image_embedding_size": 8, "mask_input_channels": 8}, "mask_decoder_config": {"hidden_size": 24, "num_attention_heads": 4, "mlp_dim": 26, "iou_head_hidden_dim": 22}}, (2, 3), "SamModel"),
)  # fmt: skip
