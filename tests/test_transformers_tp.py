"""Native shards hold the cells that transformers itself loads by a model's own plan, or it is said here how they differ.

Every architecture with a plan is compared at two ranks, each cell by its number.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import transformers

from tests.architectures import Architecture, architectures
from tests.build import load
from tests.engines.hf_tp_oracle import Cells, by_tensor, has_plan, local_tensors, model_class_of, numbered
from tests.proof import save
from tpshard.conversion import run
from tpshard.convert import plan_split

RANKS = 2
OTHERWISE = {  # cut by both, but not alike: transformers cuts the rows as they come and gathers the output
    ("glm", "mlp.gate_up_proj"), ("glm4", "mlp.gate_up_proj"), ("phi3", "mlp.gate_up_proj"),
    ("phi3", "self_attn.qkv_proj"), ("qwen3_next", "linear_attn.out_proj"), ("qwen3_5_text", "linear_attn.in_proj_qkv"),
    ("qwen3_5_text", "linear_attn.out_proj"), ("qwen3_5_moe_text", "linear_attn.in_proj_qkv"),
    ("qwen3_5_moe_text", "linear_attn.out_proj"), ("qwen3_5", "linear_attn.in_proj_qkv"),
    ("qwen3_5", "linear_attn.out_proj"), ("qwen3_5_moe", "linear_attn.in_proj_qkv"),
    ("qwen3_5_moe", "linear_attn.out_proj"),
    # transformers 5.23 cuts the fused tensor first and takes it apart then: its ranks get rows of the wrong projection
    ("hrm_text", "attn.gqkv_proj"), ("hrm_text", "mlp.gate_up_proj"),
}  # fmt: skip
WHOLE_HERE = {  # cut by transformers alone
    ("doge", "self_attn.dt_proj"),  # its output is gathered at once
    ("gemma4_text (shared keys)", "self_attn.k_proj"), ("gemma4_text (shared keys)", "self_attn.v_proj"),
    ("gemma4_unified_text", "self_attn.k_proj"), ("gemma4_unified_text", "self_attn.v_proj"),
    ("llama4", "multi_modal_projector.linear_1"), ("llama4", "patch_embedding.linear"),
    ("llama4", "vision_adapter.mlp.fc1"), ("llama4", "vision_adapter.mlp.fc2"),
}  # fmt: skip
FOUND = {item.name: item for item in architectures()}


def joined(parts: list[np.ndarray]) -> list[np.ndarray]:
    """One array where the parameters hold different cells of the tensor, which was put apart; else each."""
    together = np.concatenate(parts)
    return [together] if len(parts) > 1 and len(np.unique(together)) == len(together) else parts


def difference(ours: np.ndarray, theirs: np.ndarray, whole: int) -> str:
    if np.array_equal(ours, theirs):
        return ""
    if theirs.size == whole:
        return "whole there"
    return "whole here" if ours.size == whole else "order" if set(ours) == set(theirs) else "otherwise"


def differences(folder: Path, shards: Path, whole: Cells, head: str) -> dict[str, set[str]]:
    """How the two differ -> the tensors for which they do, layers' numbers left out."""
    out: dict[str, set[str]] = {}
    for rank, file in enumerate(sorted(shards.glob("rank-*.safetensors"))):
        ours = {name: tensor.array().ravel() for name, tensor in load(file).items()}
        theirs = by_tensor(local_tensors(folder, model_class_of(folder, head), rank, RANKS), whole)
        for name, parts in theirs.items():
            assert parts, f"{name} is not among transformers' tensors"
            for part in joined(parts):
                if how := difference(ours[name], part, whole[name].size):
                    out.setdefault(how, set()).add(re.sub(r"\.\d+(?=\.)", ".*", name))
    return out


def compared(architecture: Architecture, scratch: Path) -> dict[str, set[str]]:
    save(architecture, scratch / "source")
    model_class = model_class_of(scratch / "source", architecture.head)
    if not has_plan(model_class, transformers.AutoConfig.from_pretrained(scratch / "source")):
        pytest.skip("no plan")
    whole = numbered(scratch / "source", scratch / "numbered")
    run(plan_split(scratch / "numbered", scratch / "shards", RANKS))
    return differences(scratch / "numbered", scratch / "shards", whole, architecture.head)


def check(name: str, scratch: Path) -> None:
    found = compared(FOUND[name], scratch)
    found.pop("whole there", None)  # a plan may leave whole what a policy cuts
    for how, known in (("otherwise", OTHERWISE), ("whole here", WHOLE_HERE)):
        expected = {end for of, end in known if of == name}
        assert {end for end in expected if any(end in tensor for tensor in found.get(how, ()))} == expected
        left = {tensor for tensor in found.pop(how, ()) if not any(end in tensor for end in expected)}
        assert left == set(), how
    assert found == {}


FEW = ("llama", "gemma2", "phi3", "mixtral", "deepseek_v3", "gpt_neox", "qwen3_next")


@pytest.mark.parametrize("name", FEW)
def test_shards_are_what_transformers_loads(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(FOUND) - set(FEW)))
def test_all_shards_are_what_transformers_loads(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
