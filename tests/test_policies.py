"""The built-in policies, held against models that transformers itself makes and saves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from tests.architectures import ALWAYS, Architecture, architectures, fused, senses, translators
from tests.proof import Arrays, config_of, cut_arrays
from tests.tiny_models import save_model
from tpshard.assignment import match_all
from tpshard.checkpoint import Checkpoint, open_full
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.document import parse_documents
from tpshard.errors import PolicyError
from tpshard.layout import Shape
from tpshard.library import builtin_policies, choose_policy
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

MODEL_CHECKS = ("forward", "backward", "generic", "self-test")
_ONE_MORE_WORD = [  # a layer that transformers leaves out
    f"mtp.{name}.weight"
    for name in ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.self_attn.q_proj")
]
ON_THE_HUB = {
    "qwen3_next": _ONE_MORE_WORD,
    "qwen3_5": _ONE_MORE_WORD,
    "qwen3_5_moe": [f"model.language_model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")],
    "nemotron_h": [f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "norm", "mixer.q_proj")],
}
GROUPED = [kind for kind in tiny_models.SIZES if "num_key_value_heads" in tiny_models.SIZES[kind]]


@pytest.mark.parametrize("model_type", ["albert", "cohere", "distilbert", "gpt2", "llama", "olmo2", "phi3", "stablelm"])
@pytest.mark.parametrize("tp", [3, 6])
def test_the_model_runs_on_more_ranks(model_type: str, tp: int, tmp_path: Path) -> None:
    """Three ranks: 52 channels do not divide. Six: the three key-value heads are replicated."""
    save_model(model_type, tmp_path / "source", kv_heads=3)
    run(plan_split(tmp_path / "source", tmp_path / "shards", tp))
    report = verify(Request(tmp_path / "shards", against=tmp_path / "source", workers=1))
    verdicts = {check.name: check.verdict for check in report.checks if check.name in MODEL_CHECKS}
    assert verdicts == dict.fromkeys(MODEL_CHECKS, Verdict.PASS), report


@pytest.mark.parametrize("model_type", GROUPED)
def test_key_value_heads_are_dealt_replicated_or_refused(model_type: str, tmp_path: Path) -> None:
    """Six query heads; of 1, 2 and 3 key-value heads, what neither divides nor is divided is refused."""
    for kv_heads in (1, 2, 3):
        source = tmp_path / str(kv_heads)
        save_model(model_type, source, kv_heads, num_hidden_layers=1)
        for tp in (2, 3, 6):
            if kv_heads % tp == 0 or tp % kv_heads == 0:
                assert plan_split(source, tmp_path / "shards", tp).warnings == ()
            else:
                refusal = rf"{kv_heads} units cannot be dealt to {tp} ranks \(--tp that works"
                with pytest.raises(PolicyError, match=refusal):
                    plan_split(source, tmp_path / "shards", tp)


# ---------------------------------------------------------------------------------------------- tensors and rules


BUILT_IN = [name for name, policy in builtin_policies().items() if "remote" not in policy.mark.file]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.sweep) for n in BUILT_IN])
def test_every_tensor_of_every_head_has_a_rule_and_every_rule_a_tensor(name: str, tmp_path: Path) -> None:
    """For each class of each architecture, words tied and not, with cross-attention, and buffers of old files."""
    policy = builtin_policies()[name]
    unmet = set(policy.levels[0])
    for number, (config, head) in enumerate(variants(found for found in architectures() if found.policy == name)):
        tiny_models.build(config, head).save_pretrained(tmp_path / str(number))
        checkpoint = open_full(tmp_path / str(number))
        assert choose_policy("auto", checkpoint.config) is policy
        unmet -= set(match_all(policy, checkpoint.shapes | old_buffers(checkpoint)).values())
    assert unmet == set()


def variants(found: Iterable[Architecture]) -> Iterator[tuple[Any, str]]:
    """Configs with small changes, and all classes that transformers has for each."""
    for architecture in found:
        model_type = architecture.model_type
        config = config_of(architecture)
        for head in tiny_models.heads(config):
            yield config_of(architecture, **senses.NEEDS[head]) if head in senses.NEEDS else config, head
        for changes, head in senses.MORE.get(architecture.name, ()):
            yield config_of(architecture, **changes), head
        if not architecture.head:
            untied = config_of(architecture, tie_word_embeddings=False)
            yield untied, tiny_models.word_head(untied)
        if model_type in ("bert", "gpt2", "roberta"):
            decoder = config_of(architecture, is_decoder=True, add_cross_attention=True)
            yield from ((decoder, head) for head in tiny_models.heads(decoder) if "LM" in head and "Masked" not in head)
        if model_type == "ernie":
            yield config_of(architecture, use_task_id=True), "ErnieModel"


def old_buffers(checkpoint: Checkpoint) -> dict[str, Shape]:
    """What files of older versions, or on the hub, hold besides the weights."""
    rotary = [".self_attn.o_proj.", ".self_attn.dense."]
    layers = {name.partition(end)[0] for name in checkpoint.tensors for end in rotary if end in name}
    attentions = {name.rpartition(".c_attn.")[0] for name in checkpoint.tensors if ".c_attn." in name}
    experts = {name.partition(".experts.")[0] for name in checkpoint.tensors if ".mlp.experts.0.gate_proj." in name}
    if any(".linear_attn." in name for name in checkpoint.tensors):
        experts = set()  # hybrids have theirs in ON_THE_HUB
    embeddings = {name.rpartition(".word_embeddings.")[0] for name in checkpoint.tensors if "embeddings.word" in name}
    tables = {name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith("relative_position_bias_table")}
    positions = {
        name.rpartition(".position_embedding.")[0] for name in checkpoint.tensors if ".position_embedding." in name
    }
    convolutions = {name.partition(".pos_conv_embed.")[0] for name in checkpoint.tensors if ".pos_conv_embed." in name}
    return {
        **{f"{layer}.self_attn.rotary_emb.inv_freq": (5,) for layer in layers},
        **translators.old_tensors(checkpoint),
        **{f"{attention}.bias": (1, 1, 40, 40) for attention in attentions},
        **{f"{attention}.masked_bias": () for attention in attentions},
        **{f"{place}.position_ids": (1, 40) for place in embeddings | positions},
        **{f"{table}.relative_position_index": (9, 9) for table in tables},
        **{f"{place}.pos_conv_embed.conv.weight_{part}": (1, 1, 8) for place in convolutions for part in "gv"},
        **fused.old_buffers(checkpoint),
        **{f"{place}.experts.{name}": (5, 38, 44) for place in experts for name in ("gate_up_proj", "down_proj")},
        **(FURTHER if experts else {}),
        **dict.fromkeys(ON_THE_HUB.get(str(checkpoint.config["model_type"]), ()), (44,)),
    }


FURTHER: dict[str, Shape] = {  # of layers that predict further tokens, beside what all layers have
    **{f"model.layers.2.{name}.weight": (44,) for name in ("enorm", "hnorm", "shared_head.norm")},
    **{f"model.mtp_{name}.0.weight": (44,) for name in ("emb_norm", "hidden_norm")},
    "model.layers.2.eh_proj.weight": (44, 88),
    "model.mtp_linear_proj.0.weight": (44, 88),
    "model.layers.2.shared_head.head.weight": (211, 44),
}

# ---------------------------------------------------------------------------------------------- worked by hand


def shards_of(folder: Path, model_type: str, tp: int, kv_heads: int) -> tuple[Arrays, list[Arrays]]:
    """The source's tensors and each rank's, as arrays."""
    save_model(model_type, folder / "source", kv_heads)
    return cut_arrays(folder, tp)


def rows(*runs: tuple[int, int]) -> np.ndarray:
    return np.concatenate([np.arange(first, last) for first, last in runs])


def test_gpt2_fused_attention(tmp_path: Path) -> None:
    """Six heads of 11: q is columns 0 to 65, k 66 to 131, v 132 to 197. Rank 1 of 2 has heads 3, 4, 5 of each."""
    whole, ranks = shards_of(tmp_path, "gpt2", 2, 6)
    layer = "transformer.h.1.attn"
    mine = rows((33, 66), (99, 132), (165, 198))
    np.testing.assert_array_equal(ranks[1][f"{layer}.c_attn.weight"], whole[f"{layer}.c_attn.weight"][:, mine])
    np.testing.assert_array_equal(ranks[1][f"{layer}.c_attn.bias"], whole[f"{layer}.c_attn.bias"][mine])
    np.testing.assert_array_equal(ranks[1][f"{layer}.c_proj.weight"], whole[f"{layer}.c_proj.weight"][33:66])
    np.testing.assert_array_equal(ranks[1][f"{layer}.c_proj.bias"], whole[f"{layer}.c_proj.bias"])  # whole, added once


def test_phi3_fused_attention(tmp_path: Path) -> None:
    """Six query and two key-value heads of 10: q is rows 0 to 59, k 60 to 79, v 80 to 99."""
    whole, ranks = shards_of(tmp_path, "phi3", 2, 2)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    np.testing.assert_array_equal(ranks[0][name], whole[name][rows((0, 30), (60, 70), (80, 90))])
    np.testing.assert_array_equal(ranks[1][name], whole[name][rows((30, 60), (70, 80), (90, 100))])


def test_phi3_fused_feed_forward_dealt_unevenly(tmp_path: Path) -> None:
    """52 channels on three ranks: 18, 17, 17. Gate is rows 0 to 51, up 52 to 103; down_proj has the same channels."""
    whole, ranks = shards_of(tmp_path, "phi3", 3, 3)
    gate_up, down = "model.layers.2.mlp.gate_up_proj.weight", "model.layers.2.mlp.down_proj.weight"
    np.testing.assert_array_equal(ranks[0][gate_up], whole[gate_up][rows((0, 18), (52, 70))])
    np.testing.assert_array_equal(ranks[1][gate_up], whole[gate_up][rows((18, 35), (70, 87))])
    np.testing.assert_array_equal(ranks[1][down], whole[down][:, 18:35])


def test_grouped_heads_on_more_ranks_than_they_are(tmp_path: Path) -> None:
    """Six ranks, six query heads, three key-value heads: ranks 2 and 3 share key-value head 1."""
    whole, ranks = shards_of(tmp_path, "qwen2", 6, 3)
    layer = "model.layers.0.self_attn"
    for rank in (2, 3):
        for leaf in ("weight", "bias"):
            key, query = f"{layer}.k_proj.{leaf}", f"{layer}.q_proj.{leaf}"
            np.testing.assert_array_equal(ranks[rank][key], whole[key][10:20])
            np.testing.assert_array_equal(ranks[rank][query], whole[query][rank * 10 : rank * 10 + 10])


def test_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    """1003 words on two ranks: 502 and 501, of the embedding and of the head alike."""
    whole, ranks = shards_of(tmp_path, "llama", 2, 2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(ranks[0][name], whole[name][:502])
        np.testing.assert_array_equal(ranks[1][name], whole[name][502:])


def test_cohere_norm_of_each_head(tmp_path: Path) -> None:
    """A row of norm weights for each head: rank 1 of 3 has query heads 2 and 3, key-value head 1."""
    whole, ranks = shards_of(tmp_path, "cohere", 3, 3)
    layer = "model.layers.0.self_attn"
    np.testing.assert_array_equal(ranks[1][f"{layer}.q_norm.weight"], whole[f"{layer}.q_norm.weight"][2:4])
    np.testing.assert_array_equal(ranks[1][f"{layer}.k_norm.weight"], whole[f"{layer}.k_norm.weight"][1:2])


# ---------------------------------------------------------------------------------------------- auto


def test_built_in_policies_read_strictly_are_the_same() -> None:
    """Every value and every place in the file."""
    for item in sorted(files("tpshard").joinpath("policies").iterdir(), key=lambda entry: entry.name):
        text = item.read_text("utf-8")
        assert parse_documents(text, item.name, trusted=True) == parse_documents(text, item.name)


def test_unknown_model_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(PolicyError) as caught:
        choose_policy("auto", {"model_type": "qwen22"})
    assert caught.value.message == "none of the built-in policies applies to model_type 'qwen22'"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean 'qwen2'?")
