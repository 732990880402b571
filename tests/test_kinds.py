"""Encoder-decoders, by policies that replicate what they do not name. Inputs are made from the models' own configs."""

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
        """
  shared: {rule: row, dims: io}
  "*.{q,k,v}": {rule: column, unit: 10}
  "*.o": {rule: row, unit: 10}
  "*.relative_attention_bias": {rule: column, dims: io}
  "*.wi": column
  "*.wo": row
""",
    ),
    "bart": ("bart", "BartForConditionalGeneration", SEQUENCES, PROJECTIONS.replace("UNIT", "10")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_split_verify_merge(kind: str, tmp_path: Path) -> None:
    model_type, head, sizes, rules = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    tiny_models.build(config, head).save_pretrained(tmp_path / "model")
    (tmp_path / "policy.yaml").write_text(f"name: {kind}\ndefault: replicate\nrules:\n{rules.strip(chr(10))}\n")
    run(plan_split(tmp_path / "model", tmp_path / "shards", 2, str(tmp_path / "policy.yaml")))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "model", workers=1))
    checks = {check.name: check for check in report.checks}
    for name in ("weights", "forward", "backward", "generic", "self-test"):
        assert checks[name].verdict is Verdict.PASS, (name, checks[name])
    assert checks["forward"].figures["worst_relative_error"] <= 1e-12
    assert not any("not reached" in note for note in checks["forward"].notes), checks["forward"].notes
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    merged = tmp_path / "merged/model.safetensors"
    assert merged.read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
