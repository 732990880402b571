"""Models of every kind: encoder-decoder, vision, audio, vision and language. Inputs are made from their own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import tiny_models
from tpshard.convert import plan_merge, plan_split, run
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

TEXT = {
    "vocab_size": 211, "hidden_size": 60, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 77, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 42, "intermediate_size": 34, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 28,
    "patch_size": 7, "num_channels": 3,
}  # fmt: skip
SEQUENCES = {
    "vocab_size": 211, "d_model": 60, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 34, "encoder_attention_heads": 6, "decoder_attention_heads": 6, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
PROJECTIONS = """
  "*{q_proj,k_proj,v_proj}": {rule: column, unit: UNIT}
  "*{out_proj,o_proj}": {rule: row, unit: UNIT}
  "*fc1": column
  "*fc2": row
"""

KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "t5": (
        "t5",
        "T5ForConditionalGeneration",
        {"vocab_size": 211, "d_model": 44, "d_kv": 10, "d_ff": 52, "num_layers": 2, "num_heads": 6},
        "auto",
    ),
    "bart": ("bart", "BartForConditionalGeneration", SEQUENCES, "auto"),
    "whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        SEQUENCES
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 40, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
        PROJECTIONS.replace("UNIT", "10") + '  "*conv1": {rule: column, gather: true}\n',
    ),
    "wav2vec2": (
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {**TEXT, "vocab_size": 33, "conv_dim": (26, 38), "conv_kernel": (10, 3), "conv_stride": (5, 2),
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True,
         "feat_extract_norm": "layer", "num_feat_extract_layers": 2},
        PROJECTIONS.replace("UNIT", "10").replace("*fc1", "*intermediate_dense").replace("*fc2", "*output_dense"),
    ),
    "vit": (
        "vit",
        "ViTForImageClassification",
        VISION,
        """
  "*attention.attention.{query,key,value}": {rule: column, unit: 7}
  "*attention.output.dense": {rule: row, unit: 7}
  "*intermediate.dense": column
  "*layer.*.output.dense": row
  "*patch_embeddings.projection": {rule: column, gather: true}
""",
    ),
    "clip": (
        "clip",
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 26},
        PROJECTIONS.replace("UNIT", "1").replace("*{q_proj", "*text_model.*.{q_proj").replace("*{out", "*text_model.*.{out")
        .replace("unit: 1", "unit: 10") + '  "*vision_model.*.{q_proj,k_proj,v_proj}": {rule: column, unit: 7}\n'
        '  "*vision_model.*.out_proj": {rule: row, unit: 7}\n',
    ),
    "llava": (
        "llava",
        "LlavaForConditionalGeneration",
        {"text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 2},
         "vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 210},
        """
  "*vision_tower.*.{q_proj,k_proj,v_proj}": {rule: column, unit: 7}
  "*vision_tower.*.out_proj": {rule: row, unit: 7}
  "*language_model.*.{q_proj,k_proj,v_proj}": {rule: column, unit: 10}
  "*language_model.*.o_proj": {rule: row, unit: 10}
  "*{gate_proj,up_proj,fc1}": column
  "*{down_proj,fc2}": row
""",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_split_verify_merge(kind: str, tmp_path: Path) -> None:
    model_type, head, sizes, rules = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    tiny_models.build(config, head).save_pretrained(tmp_path / "model")
    policy = rules
    if rules != "auto":
        policy = str(tmp_path / "policy.yaml")
        Path(policy).write_text(f"name: {kind}\ndefault: replicate\nrules:\n{rules.strip(chr(10))}\n")
    run(plan_split(tmp_path / "model", tmp_path / "shards", 2, policy))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "model", workers=1))
    checks = {check.name: check for check in report.checks}
    for name in ("weights", "forward", "backward", "generic", "self-test"):
        assert checks[name].verdict is Verdict.PASS, (name, checks[name])
    assert checks["forward"].figures["worst_relative_error"] <= 1e-12
    assert not any("not reached" in note for note in checks["forward"].notes), checks["forward"].notes
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    merged = tmp_path / "merged/model.safetensors"
    assert merged.read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
