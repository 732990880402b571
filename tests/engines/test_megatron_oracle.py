"""megatron-core computes the logits of transformers from the files that tests/engines/megatron_oracle.py writes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_logits_tell_right_rows_from_wrong_ones(tmp_path: Path, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engines import megatron_oracle
    from tests.engines.megatron_samples import TOKENS, twin
    from tests.engines.megatron_truth import logits_of

    hf, config, expected = twin("llama_few_groups", tmp_path / "hf")
    if wrong:  # [q; k; v] as wholes, as other engines have it
        monkeypatch.setattr(megatron_oracle, "fused_qkv", lambda q, k, v, _: torch.cat([q, k, v]))
    megatron_oracle.write_folder(tmp_path / "ranks", hf, config, megatron_oracle.Cut(4, divisible_by=16))
    logits = torch.tensor(logits_of(tmp_path / "ranks", config, TOKENS, tp=4))[..., : config["vocab_size"]]
    worst = (logits - expected).abs().max().item()
    assert (worst < 1e-4) != wrong
