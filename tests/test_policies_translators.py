"""Encoder-decoders and encoders beyond BERT: what their policies cut, worked by hand, and wrong cuts that are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.architectures import Architecture, architectures
from tests.planting import along, reverse
from tests.proof import Arrays, cut_arrays, save
from tests.test_layout_check import changed, said, with_config
from tests.test_policies import rows
from tpshard.checkpoint import Checkpoint, open_shards
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.errors import PolicyError
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify


def architecture(name: str) -> Architecture:
    return next(found for found in architectures() if found.name == name)


def shards_of(folder: Path, name: str, tp: int) -> tuple[Arrays, list[Arrays]]:
    """The source's tensors and each rank's, as arrays."""
    save(architecture(name), folder / "source")
    return cut_arrays(folder, tp)


# ---------------------------------------------------------------------------------------------- worked by hand


def test_t5_relative_bias_is_dealt_as_the_heads(tmp_path: Path) -> None:
    """Twelve heads of 10 on three ranks. The table has a row for each bucket, a column for each head."""
    whole, ranks = shards_of(tmp_path, "t5", 3)
    layer = "decoder.block.0.layer.0.SelfAttention"
    table, query, out = (f"{layer}.{part}.weight" for part in ("relative_attention_bias", "q", "o"))
    assert whole[table].shape == (32, 12)
    np.testing.assert_array_equal(ranks[1][table], whole[table][:, 4:8])
    np.testing.assert_array_equal(ranks[1][query], whole[query][40:80])
    np.testing.assert_array_equal(ranks[1][out], whole[out][:, 40:80])


def test_deberta_is_fused_by_head(tmp_path: Path) -> None:
    """Twelve heads of 7, each with its q, k and v, 21 rows; the loose biases have 7 for each head."""
    whole, ranks = shards_of(tmp_path, "deberta", 3)
    layer = "deberta.encoder.layer.1.attention.self"
    np.testing.assert_array_equal(ranks[1][f"{layer}.in_proj.weight"], whole[f"{layer}.in_proj.weight"][84:168])
    np.testing.assert_array_equal(ranks[1][f"{layer}.v_bias"], whole[f"{layer}.v_bias"][28:56])
    np.testing.assert_array_equal(ranks[1][f"{layer}.pos_proj.weight"], whole[f"{layer}.pos_proj.weight"][28:56])


def test_modernbert_is_fused_in_blocks(tmp_path: Path) -> None:
    """Twelve heads of 6: q is rows 0 to 71, k 72 to 143, v 144 to 215. 52 channels: 18, 17, 17 of each half."""
    whole, ranks = shards_of(tmp_path, "modernbert", 3)
    attention, halves, back = (f"model.layers.1.{part}.weight" for part in ("attn.Wqkv", "mlp.Wi", "mlp.Wo"))
    np.testing.assert_array_equal(ranks[1][attention], whole[attention][rows((24, 48), (96, 120), (168, 192))])
    np.testing.assert_array_equal(ranks[1][halves], whole[halves][rows((18, 35), (70, 87))])
    np.testing.assert_array_equal(ranks[1][back], whole[back][:, 18:35])


def test_bart_has_two_feed_forward_widths(tmp_path: Path) -> None:
    """52 channels in the encoder: 18, 17, 17; 34 in the decoder: 12, 11, 11."""
    whole, ranks = shards_of(tmp_path, "bart", 3)
    for name, own in (("encoder.layers.0", slice(18, 35)), ("decoder.layers.1", slice(12, 23))):
        for part in ("fc1.weight", "fc1.bias"):
            np.testing.assert_array_equal(ranks[1][f"model.{name}.{part}"], whole[f"model.{name}.{part}"][own])
        np.testing.assert_array_equal(ranks[1][f"model.{name}.fc2.weight"], whole[f"model.{name}.fc2.weight"][:, own])


def test_the_stack_with_fewer_heads_sets_the_limit(tmp_path: Path) -> None:
    """Twelve heads in the encoder, six in the decoder: four ranks are refused for the decoder's sake."""
    save(architecture("bart"), tmp_path / "source")
    with pytest.raises(PolicyError, match=r"^model\.decoder.*6 units cannot be dealt to 4 ranks \(--tp that works .*6"):
        plan_split(tmp_path / "source", tmp_path / "shards", 4)


# ---------------------------------------------------------------------------------------------- wrong cuts are found


@pytest.mark.parametrize(
    ("name", "rule", "layer"),
    [
        ("deberta", "attention.self.in_proj: {rule: column, parts: [H, H, H]}", "layer.0.attention.output.dense"),
        ("modernbert", "attn.Wqkv: {rule: column, heads: H}", "layers.0.attn.Wo"),
    ],
)
def test_the_obvious_wrong_cut_is_named(name: str, rule: str, layer: str, tmp_path: Path) -> None:
    found = architecture(name)
    save(found, tmp_path / "source")
    (tmp_path / "policy.yaml").write_text(f"name: wrong\nextends: {found.policy}\nrules:\n  {rule}\n")
    run(plan_split(tmp_path / "source", tmp_path / "shards", 2, str(tmp_path / "policy.yaml")))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "source", workers=1))
    forward = next(check for check in report.checks if check.name == "forward")
    assert forward.verdict is Verdict.FAIL
    assert forward.findings[0].layer
    assert forward.findings[0].layer.endswith(layer)  # the first row layer after it


# ---------------------------------------------------------------------------------------------- the layout check


def split(name: str, folder: Path) -> Checkpoint:
    save(architecture(name), folder / "source")
    run(plan_split(folder / "source", folder / "shards", 2))
    return open_shards(folder / "shards")


def test_each_stack_is_checked_by_its_own_sizes(tmp_path: Path) -> None:
    """Twelve heads of 7 in the encoder, six of 14 in the decoder; 34 channels in the decoder alone."""
    shards = split("bart", tmp_path)
    assert said(shards) == []
    first_35 = along(0, [0, 35, 84])
    (finding,) = said(changed(shards, "decoder.layers.1.self_attn.q_proj.weight", first_35))
    assert finding.endswith("cut at row 35 is inside query head 2 (head size 14)")
    (finding,) = said(changed(shards, "encoder.layers.0.self_attn.q_proj.weight", first_35))
    assert finding.endswith("config.json asks for query head 5 (cell 0 of 7)")
    wider = said(with_config(shards, decoder_ffn_dim=35))
    assert len(wider) == 6  # fc1 with its bias, fc2, of two layers
    assert all("decoder.layers" in text and "has 34 cells" in text for text in wider)


def test_cross_attention_and_the_relative_bias_are_dealt_by_heads(tmp_path: Path) -> None:
    shards = split("t5", tmp_path)
    assert said(shards) == []
    query, table = "1.layer.1.EncDecAttention.q", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    for name in (query, table):
        (finding,) = said(changed(shards, name, reverse))
        assert name in finding
        assert "rank order [1, 0] differs from" in finding
    assert "is cut along axis 0, config.json asks for axis 1" in said(changed(shards, table, along(0, [0, 16, 32])))[0]
