"""Policies of models that see and hear, worked by hand; names and defaults that files of other versions have."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import tiny_models
from tests.architectures import Architecture, senses
from tests.build import load
from tests.proof import config_of, save
from tests.test_policies import rows
from tpshard.checkpoint import open_full
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.errors import PolicyError
from tpshard.expressions import evaluate
from tpshard.library import builtin_policies, choose_policy
from tpshard.mesh import Grid, Mesh
from tpshard.verify.inputs import make_inputs

OF_NAME = {found.name: found for found in senses.ARCHITECTURES}
Arrays = Mapping[str, np.ndarray]


def shards_of(name: str, tp: int, folder: Path, **changes: Any) -> tuple[Arrays, list[Arrays]]:
    """The source's tensors and each rank's; ``changes`` are made to config.json, not to the weights."""
    if not (folder / "source").exists():
        save(OF_NAME[name], folder / "source")
    config = json.loads((folder / "source/config.json").read_text())
    (folder / "source/config.json").write_text(json.dumps(config | changes))
    run(plan_split(folder / "source", folder / f"shards-{tp}", tp))
    files = [folder / "source/model.safetensors", *sorted((folder / f"shards-{tp}").glob("rank-*.safetensors"))]
    whole, *ranks = ({name: tensor.array() for name, tensor in load(file).items()} for file in files)
    return whole, ranks


def test_swin_deals_each_stage_by_heads_of_its_own(tmp_path: Path) -> None:
    """Heads of eight cells, 3 in the first stage, 6 in the second: two ranks have 2 and 1 of the first."""
    whole, ranks = shards_of("swin", 2, tmp_path)
    first, second = (f"swin.encoder.layers.{stage}.blocks.0.attention" for stage in (0, 1))
    np.testing.assert_array_equal(ranks[0][f"{first}.self.key.weight"], whole[f"{first}.self.key.weight"][:16])
    np.testing.assert_array_equal(ranks[1][f"{first}.self.key.weight"], whole[f"{first}.self.key.weight"][16:])
    np.testing.assert_array_equal(
        ranks[1][f"{first}.output.dense.weight"], whole[f"{first}.output.dense.weight"][:, 16:]
    )
    table = f"{first}.self.relative_position_bias_table"
    np.testing.assert_array_equal(ranks[1][table], whole[table][:, 2:])
    np.testing.assert_array_equal(ranks[1][f"{second}.self.key.bias"], whole[f"{second}.self.key.bias"][24:])


def test_swin_on_more_ranks_than_heads(tmp_path: Path) -> None:
    """Eight ranks, three heads in the first stage: ranks 3 to 7 have none of its attention, in query and output alike."""
    whole, ranks = shards_of("swin", 8, tmp_path)
    first = "swin.encoder.layers.0.blocks.0.attention"
    np.testing.assert_array_equal(ranks[2][f"{first}.self.query.weight"], whole[f"{first}.self.query.weight"][16:24])
    for rank in range(3, 8):
        assert ranks[rank][f"{first}.self.query.weight"].shape == (0, 24)
        assert ranks[rank][f"{first}.output.dense.weight"].shape == (24, 0)


def test_siglip_attention_of_the_head(tmp_path: Path) -> None:
    """Twelve heads of 5: q is rows 0 to 59, k 60 to 119, v 120 to 179. Rank 2 of 3 has heads 8 to 11 of each."""
    whole, ranks = shards_of("siglip_vision_model", 3, tmp_path)
    mine = rows((40, 60), (100, 120), (160, 180))
    for leaf in ("in_proj_weight", "in_proj_bias"):
        np.testing.assert_array_equal(ranks[2][f"head.attention.{leaf}"], whole[f"head.attention.{leaf}"][mine])
    out = "head.attention.out_proj.weight"
    np.testing.assert_array_equal(ranks[2][out], whole[out][:, 40:])


def test_dinov2_gate_and_up(tmp_path: Path) -> None:
    """120 channels: gate is rows 0 to 119 of weights_in, up 120 to 239."""
    whole, ranks = shards_of("dinov2 (gated)", 3, tmp_path)
    name = "dinov2.encoder.layer.1.mlp.weights_{}.weight"
    np.testing.assert_array_equal(ranks[1][name.format("in")], whole[name.format("in")][rows((40, 80), (160, 200))])
    np.testing.assert_array_equal(ranks[1][name.format("out")], whole[name.format("out")][:, 40:80])


@pytest.mark.parametrize("at_the_top", [False, True])
def test_qwen2_vl_says_its_sizes_in_two_places(at_the_top: bool, tmp_path: Path) -> None:
    """The text's heads stand under text_config, or at the top of older files. The tower has eight heads of 4."""
    save(OF_NAME["qwen2_vl"], tmp_path / "source")
    text = json.loads((tmp_path / "source/config.json").read_text())["text_config"]
    changes = {"text_config": None, **text, "model_type": "qwen2_vl"} if at_the_top else {}
    whole, ranks = shards_of("qwen2_vl", 4, tmp_path, **changes)
    fused, key = "visual.blocks.1.attn.qkv.weight", "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(ranks[3][fused], whole[fused][rows((24, 32), (56, 64), (88, 96))])
    np.testing.assert_array_equal(ranks[3][key], whole[key][10:])  # the second of two heads, on two ranks


def test_whisper_counts_the_decoders_heads_apart(tmp_path: Path) -> None:
    save(OF_NAME["whisper"], tmp_path / "source")  # twelve heads in the encoder, six in the decoder
    with pytest.raises(PolicyError, match="decoder.*6 units cannot be dealt to 4 ranks"):
        plan_split(tmp_path / "source", tmp_path / "shards", 4)


@pytest.mark.parametrize(
    "name", ["llava", "gemma3", "idefics3", "mistral3", "mllama", "qwen2_audio", "qwen2_vl", "qwen3_vl"]
)
def test_stages_are_of_the_text(name: str, tmp_path: Path) -> None:
    """The tower's layers have numbers, too: all of it is the first stage's."""
    save(OF_NAME[name], tmp_path / "source")
    conversion = plan_split(tmp_path / "source", tmp_path / "shards", Grid(Mesh(1, pp=2)))
    held = {item.stored.name: [shard is not None for shard in item.want.shards] for item in conversion.plan.items}
    text = {
        tensor: stages for tensor, stages in held.items() if "self_attn.o_proj" in tensor and "vision" not in tensor
    }
    assert set(map(tuple, text.values())) == {(True, False), (False, True)}
    towers = [stages for tensor, stages in held.items() if re.search("vision|visual|audio_tower|projector", tensor)]
    assert len(towers) > 10
    assert all(stages == [True, False] for stages in towers)


# ---------------------------------------------------------------------------------------------- what config.json leaves out

DEFAULTED = {
    found.policy: found for found in senses.ARCHITECTURES if any(key.endswith("_config") for key in found.sizes)
}


@pytest.mark.parametrize("policy", sorted(set(DEFAULTED) - {"qwen2_vl"}))
def test_defaults_are_those_of_the_config_classes(policy: str) -> None:
    """A config that says of its text and tower only what they are: each number is the one that transformers takes."""
    found = DEFAULTED[policy]
    bare = {"model_type": found.model_type, **kinds_of(found)}
    config = transformers.AutoConfig.for_model(**bare)
    variables = builtin_policies()[policy].variables
    seen = 0
    for name in ("H", "K", "V", "T", "A"):
        for key in re.findall(r"\w+_config\.\w+", str(variables.get(name, ""))):
            part, _, leaf = key.partition(".")
            assert evaluate(name, bare, variables) == getattr(getattr(config, part), leaf), name
            seen += 1
    assert seen


def kinds_of(found: Architecture) -> dict[str, Any]:
    parts = {key: value for key, value in found.sizes.items() if key.endswith("_config")}
    return {key: {"model_type": value["model_type"]} if "model_type" in value else {} for key, value in parts.items()}


def test_sizes_that_are_nowhere_are_not_guessed(tmp_path: Path) -> None:
    save(OF_NAME["qwen2_vl"], tmp_path / "source")
    with pytest.raises(PolicyError, match=r"k_proj.*heads: 'K' is not in the config"):
        shards_of("qwen2_vl", 2, tmp_path, text_config={"num_attention_heads": 8})


def test_older_clip_files_say_the_sizes_twice() -> None:
    variables = builtin_policies()["clip"].variables
    sizes = {"hidden_size": 48, "num_attention_heads": 12}
    config = {"text_config": {**sizes, "num_attention_heads": 8}, "text_config_dict": sizes}
    assert evaluate("T", config, variables) == 12
    assert transformers.CLIPConfig(**copy.deepcopy(config)).text_config.num_attention_heads == 12
    assert evaluate("T", config | {"text_config_dict": None}, variables) == 8


def test_a_text_that_has_no_policy_is_refused() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "opt"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    with pytest.raises(
        PolicyError, match=r"for model_type 'llava' applies to this config.json.*go by text_config.model_type"
    ):
        choose_policy("auto", config)


def test_norms_over_all_heads_of_internvl_are_refused(tmp_path: Path) -> None:
    found = OF_NAME["internvl"]
    tower = {**found.sizes["vision_config"], "use_qk_norm": True}
    save(
        Architecture("internvl", "internvl", {**found.sizes, "vision_config": tower}, head=found.head),
        tmp_path / "source",
    )
    with pytest.raises(PolicyError, match=r"has no rule for 4 tensors: .*attention\.k_norm"):
        plan_split(tmp_path / "source", tmp_path / "shards", 2)


# ---------------------------------------------------------------------------------------------- what verify feeds them

POSITIONS = {  # 28 x 28 pixels are 4 x 4 patches of 7
    "llava": 16,  # without the class token
    "llava (qwen2)": 16,  # SigLIP has none
    "llava (pixtral)": 16,
    "llava_next": 16 + 4 * (4 + 1),  # the whole, and one tile whose lines end in a token of their own
    "llava_onevision": 16 + 4 * (4 + 1),
    "vipllava": 16,
    "paligemma": 16,
    "gemma3": 4,  # as mm_tokens_per_image says
    "idefics3": 16 // 2**2,
    "internvl": 16 // 2**2,
    "mistral3": 16 // 2**2,
    "mllama": 1,  # the text attends to the image instead
    "qwen2_vl": 16 // 2**2,
    "qwen2_audio": 32 // 4,  # 32 frames
    "voxtral": 32 // 2 // 4,
}


@pytest.mark.parametrize("name", POSITIONS)
def test_tokens_that_stand_for_an_image_or_a_sound(name: str) -> None:
    found = OF_NAME[name]
    config = config_of(found)
    tokens = make_inputs(tiny_models.build(config, found.head), config, 2, 0, torch.float32)["input_ids"]
    assert (tokens == 210).sum(dim=1).tolist() == [POSITIONS[name]] * 2


# ---------------------------------------------------------------------------------------------- names of other versions

TOWERS = r"embeddings\.\w+_embedding", r"encoder\.layers", "head", "post_layernorm", "pre_layrnorm"
RENAMINGS: tuple[tuple[str, str], ...] = (  # what is saved today, what stands in other files
    (rf"^vision_tower\.(?=({'|'.join(TOWERS)})\.)", "vision_tower.vision_model."),
    (r"^(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
)


@pytest.mark.parametrize(
    "name",
    [
        *("llava", "llava (qwen2)", "llava_next", "gemma3", "paligemma", "internvl", "mistral3", "mllama", "qwen2_vl"),
        *("qwen2_5_vl", "qwen2_audio"),
    ],
)
def test_names_of_other_versions_meet_the_same_rules(name: str, tmp_path: Path) -> None:
    save(OF_NAME[name], tmp_path / "source")
    checkpoint = open_full(tmp_path / "source")
    policy = choose_policy("auto", checkpoint.config)
    other = 0
    for tensor in checkpoint.tensors:
        for pattern, replacement in RENAMINGS:
            renamed = re.sub(pattern, replacement, tensor)
            other += renamed != tensor
            assert policy.match(renamed) is policy.match(tensor), renamed
    assert other
