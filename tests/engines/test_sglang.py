"""SGLang's folders: as vLLM's, but for the scales of attention and the names of experts. Read from SGLang's source."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from tests.engines.folders import llama_folder, mixtral_folder  # noqa: E402
from tpshard.conversion import run, without_manifest  # noqa: E402
from tpshard.convert import plan_merge, plan_split  # noqa: E402
from tpshard.engines.opening import Source  # noqa: E402


@pytest.mark.parametrize("make", [llama_folder, mixtral_folder])
def test_as_vllm_has_it_but_for_scales_and_experts(tmp_path: Path, make: object) -> None:
    make(tmp_path / "hf")  # type: ignore[operator]
    for engine in ("sglang", "vllm"):
        run(without_manifest(plan_split(tmp_path / "hf", tmp_path / engine, 2, engine=engine)))
    for rank in range(2):
        ours, vllm = (load_file(tmp_path / e / f"model-rank-{rank}-part-0.safetensors") for e in ("sglang", "vllm"))
        wanted = {n.replace(".routed_experts.", "."): t for n, t in vllm.items() if not n.endswith("_scale")}
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items())
    run(plan_merge(Source(tmp_path / "sglang", "sglang"), tmp_path / "merged"))
    hf, merged = (load_file(tmp_path / where / "model.safetensors") for where in ("hf", "merged"))
    assert hf.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in hf.items())
