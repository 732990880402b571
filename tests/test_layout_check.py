"""The layout check knows every architecture that a built-in policy accepts, and is seen to fail.

Layouts are changed in memory: a shard folder is opened and one tensor's record replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import tiny_models
from tests.architectures import architectures
from tests.planting import (
    along,
    eight_heads,
    last_rank_takes_more,
    like_a_column,
    overlapping_row,
    reverse,
    same,
    whole,
)
from tests.test_policies import variants
from tpshard.checkpoint import Checkpoint, open_shards
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.layout import Layout, Shard
from tpshard.library import builtin_policies
from tpshard.roles import Role
from tpshard.verify.families import FAMILIES, TIED_BY_DEFAULT, are_tied, sizes_of
from tpshard.verify.layout import check_layout
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

MODEL_TYPES = sorted(tiny_models.SIZES)

L1 = "model.layers.1"
Change = Callable[[Layout], Layout]


@functools.cache
def shards_of(model_type: str, tp: int = 2, kv_heads: int = 2, policy: str = "auto", **changes: Any) -> Checkpoint:
    """A tiny model, split; only what the manifest says of it is used after its folder is gone."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "shards")
        tiny_models.save_model(model_type, source, kv_heads, **changes)
        if "\n" in policy:
            Path(scratch, "policy.yaml").write_text(policy)
            policy = str(Path(scratch, "policy.yaml"))
        run(plan_split(source, target, tp, policy))
        return open_shards(target)


def changed(shards: Checkpoint, part_of_name: str, change: Change, role: Role | None = None) -> Checkpoint:
    """The same shards with the layout (and role) of all tensors changed whose name holds ``part_of_name``."""
    tensors = dict(shards.tensors)
    hit = [name for name in tensors if part_of_name in name]
    assert hit, part_of_name
    for name in hit:
        old = tensors[name]
        assert old.record
        record = dataclasses.replace(old.record, role=role or old.role)
        tensors[name] = dataclasses.replace(old, layout=change(old.layout), record=record)
    return dataclasses.replace(shards, tensors=tensors)


def with_config(shards: Checkpoint, **fields: Any) -> Checkpoint:
    kept = {key: value for key, value in shards.config.items() if key not in fields}
    return dataclasses.replace(shards, config=kept | {k: v for k, v in fields.items() if v is not None})


def without(shards: Checkpoint, *parts_of_names: str) -> Checkpoint:
    kept = {name: t for name, t in shards.tensors.items() if not any(part in name for part in parts_of_names)}
    return dataclasses.replace(shards, tensors=kept)


def said(shards: Checkpoint) -> list[str]:
    result = check_layout(shards)
    assert result.verdict is (Verdict.FAIL if result.findings else Verdict.PASS), result
    return [str(finding) for finding in result.findings]


# ---------------------------------------------------------------------------------------------- what is known


def test_what_is_known_has_a_policy() -> None:
    accepted = {str(kind) for policy in builtin_policies().values() for kind in policy.applies_to["model_type"]}
    assert set(FAMILIES) - accepted == set()
    assert set(FAMILIES) >= TIED_BY_DEFAULT


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    """What config.json may leave out: tied words, and the size of a head (six heads of 60 cells, or its own)."""
    assert are_tied({"model_type": model_type}) is transformers.AutoConfig.for_model(model_type).tie_word_embeddings
    widths = {"gpt2": ("n_embd", "n_head"), "distilbert": ("dim", "n_heads")}
    hidden, heads = widths.get(model_type, ("hidden_size", "num_attention_heads"))
    given = {hidden: 60, heads: 6}
    config = transformers.AutoConfig.for_model(model_type, **given)
    sizes = sizes_of({"model_type": model_type, **given})
    assert sizes
    assert sizes.head == (getattr(config, "head_dim", None) or 10)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_split_writes_passes(model_type: str) -> None:
    """Key-value heads dealt (2 on 2, 3 on 3, 4 on 4 ranks) and replicated (3 on 6, 2 on 4 and 8)."""
    for tp, kv_heads in ((2, 2), (3, 3), (6, 3)):
        assert said(shards_of(model_type, tp, kv_heads)) == [], (tp, kv_heads)
    for tp, kv_heads in ((4, 4), (4, 2), (8, 2)):
        assert said(shards_of(model_type, tp, kv_heads, **eight_heads(model_type))) == [], (tp, kv_heads)


@pytest.mark.parametrize("name", sorted({found.policy for found in architectures() if found.model_type in FAMILIES}))
def test_every_class_passes_from_disk(name: str, tmp_path: Path) -> None:
    """Base models, classifiers and word heads, tied and not, with cross-attention: no false alarm."""
    known = [found for found in architectures() if found.policy == name and found.model_type in FAMILIES]
    for number, (config, head) in enumerate(variants(known[:2])):
        source, target = tmp_path / f"{number}", tmp_path / f"{number}-shards"
        tiny_models.build(config, head).save_pretrained(source)
        run(plan_split(source, target, 2))
        report = verify(Request(target, level="layout", workers=1))
        assert report.verdict is Verdict.PASS, (head, report.checks[-1])


# ---------------------------------------------------------------------------------------------- every tensor counts


def one_of_each_kind(shards: Checkpoint) -> Iterator[str]:
    """A tensor of each name, of the last layer that has it."""
    yield from {re.sub(r"\d+", "#", name): name for name in shards.tensors}.values()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_tensor_dealt_wrongly_is_named(model_type: str) -> None:
    """What is cut in reverse rank order, and whole; what is whole cut along each axis."""
    shards = shards_of(model_type, 2, 2, tie_word_embeddings=False)
    for name in one_of_each_kind(shards):
        layout = shards.tensors[name].layout
        if layout.is_replicated:
            wrong = [along(axis, [0, n // 2, n]) for axis, n in enumerate(layout.shape) if n > 1]
        else:
            n, axis = max((size, axis) for axis, size in enumerate(layout.shape) if axis in layout.cut_axes)
            wrong = [reverse]
            if n > 2:
                wrong += [along(axis, [0, n // 2 - 1, n]), along(axis, [0, n // 2 - 1, n - 1])]
            wrong += [along(other, [0, m // 2, m]) for other, m in enumerate(layout.shape) if other != axis]
            alone = any(word in name for word in ("embed", "wte", "lm_head", "decoder", "predictions", "vocab_pro"))
            wrong += [] if alone else [whole]  # the embedding and the output head may each be whole
        # a gathered output may be cut in any way that follows the ranks
        role = Role("column") if shards.tensors[name].role.gather else None
        for number, change in enumerate(wrong):
            found = said(changed(shards, name, change, role))
            assert any(text.startswith(name) for text in found), (name, number, found)


# ---------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("model_type", "part", "change", "text"),
    [
        ("qwen2", "1.self_attn.o_proj", reverse, "rank 0: rank order [1, 0] differs from self_attn.q_proj: cell 0 of the rank's cut axis is query head 3 (cell 0 of 10), config.json asks for query head 0 (cell 0 of 10)"),
        ("qwen2", "1.mlp.down_proj", reverse, "rank 0: rank order [1, 0] differs from mlp.gate_proj: holds channels 26 to 51, must hold 0 to 25"),
        ("qwen2", "1.self_attn.q_proj.w", along(0, [0, 25, 60]), "rank 0: cut at row 25 is inside query head 2 (head size 10)"),
        ("qwen2", "1.self_attn.o_proj", along(1, [0, 25, 60]), "rank 0: cut at column 25 is inside query head 2 (head size 10)"),
        ("qwen2", "1.self_attn.q_proj.w", along(0, [0, 20, 60]), "rank 0: cell 20 of the rank's cut axis is nothing more, config.json asks for query head 2 (cell 0 of 10)"),
        ("qwen2", "1.self_attn.k_proj.w", whole, "is whole on every rank, but its block is cut: along axis 0 here"),
        ("qwen2", "1.self_attn.o_proj", along(0, [0, 22, 44]), "is cut along axis 0, config.json asks for axis 1"),
        ("qwen2", "1.mlp.up_proj", along(0, [0, 20, 52]), "rank 0: holds channels 0 to 19, must hold 0 to 25"),
        ("qwen2", "1.mlp.up_proj", overlapping_row, "rank 0: holds channels 0 to 26, must hold 0 to 25"),
        ("qwen2", "embed_tokens", last_rank_takes_more, "rank 0: holds words 0 to 500, must hold 0 to 501"),
        ("qwen2", "1.mlp.up_proj", along(0, [0, 26, 52], own=30), "the ranks' own tensors are [[30, 44], [30, 44]], along axis 0 they must be [26, 26] long"),
        ("qwen3", "1.self_attn.q_norm", like_a_column, "is cut along axis 0, must be whole on every rank"),
        ("phi3", "1.self_attn.qkv_proj", along(0, [0, 50, 100]), "rank 0: holds no key heads: cell 30 of the rank's cut axis is query head 3 (cell 0 of 10), config.json asks for key head 0 (cell 0 of 10)"),
        ("glm4", "1.mlp.gate_up_proj", along(0, [0, 52, 104]), "rank 0: holds no up channels: cell 26 of the rank's cut axis is gate channel 26, config.json asks for up channel 0"),
        ("cohere", "1.self_attn.q_norm", whole, "is whole on every rank, but its block is cut: it has 6 heads, rank 0 has 3"),
        ("cohere", "1.self_attn.k_norm", along(1, [0, 5, 10]), "is cut along axis 1, config.json asks for axis 0"),
        ("cohere", "1.self_attn.q_norm", reverse, "rank 0: rank order [1, 0] differs from self_attn.q_proj: holds query heads 3 to 5, must hold 0 to 2"),
        ("olmo2", "1.self_attn.q_norm", along(0, [0, 30, 60]), "is cut along axis 0, must be whole on every rank"),
    ],
)  # fmt: skip
def test_the_finding_says_what_is_wrong(model_type: str, part: str, change: Change, text: str) -> None:
    shards = shards_of(model_type)
    (name,) = [name for name in shards.tensors if part in name and not (part.endswith("_proj") and "bias" in name)]
    (finding,) = said(changed(shards, name, change))
    assert finding in (f"{name}, {text}", f"{name}: {text}")


def test_all_in_reverse_rank_order() -> None:
    found = said(changed(shards_of("llama"), "", reverse))
    assert len(found) == 2 + 3 * 7
    assert (
        found[0]
        == "lm_head.weight, rank 0: rank order [1, 0] must be [0, 1]: holds words 502 to 1002, must hold 0 to 501"
    )


def test_a_channel_that_nobody_holds() -> None:
    """Equal runs of 20 on two ranks: in order, balanced, alike in the whole block, and twelve of 52 are lost."""
    lost = changed(
        changed(shards_of("llama"), "1.mlp.up_proj", along(0, [0, 20, 40])), "1.mlp.gate", along(0, [0, 20, 40])
    )
    lost = changed(lost, "1.mlp.down_proj", along(1, [0, 20, 40]))
    assert [text.partition(":")[0] for text in said(lost)] == [
        f"{L1}.mlp.{name}.weight, rank 0" for name in ("down_proj", "gate_proj", "up_proj")
    ]


def test_a_rank_without_a_share() -> None:
    def gone(layout: Layout) -> Layout:
        held: list[Shard | None] = [layout.shards[0], None]
        return Layout(layout.shape, tuple(held))

    assert any(
        text.startswith(f"{L1}.mlp.up_proj.weight, rank 1")
        for text in said(changed(shards_of("llama"), "1.mlp.up", gone))
    )


@pytest.mark.parametrize(("tp", "runs"), [(4, [18, 18, 8, 8]), (3, [18, 16, 18])])
def test_channels_may_be_dealt_in_units_but_by_all_alike(tp: int, runs: list[int]) -> None:
    policy = "name: p\nextends: llama\nrules:\n  self_attn.*: replicate\n" + "".join(
        f"  mlp.{name}: {{rule: {rule}, unit: 2, uneven: true}}\n"
        for name, rule in (("{gate_proj,up_proj}", "column"), ("down_proj", "row"))
    )
    shards = shards_of("llama", tp, policy=policy)
    assert said(shards) == []
    (finding,) = said(changed(shards, "2.mlp.down_proj", along(1, [0, *(sum(runs[: r + 1]) for r in range(tp))])))
    assert finding.startswith("model.layers.2.mlp.down_proj.weight, rank")


# ---------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("model_type", "cross", "own"),
    [
        ("bert", "1.crossattention.output.dense.weight", "1.attention.output.dense.weight"),
        ("gpt2", "1.crossattention.c_proj.weight", "1.attn.c_proj.weight"),
    ],
)
def test_cross_attention_is_a_block_beside_the_layers_own(model_type: str, cross: str, own: str) -> None:
    decoder = {"is_decoder": True, "add_cross_attention": True}
    head = {"bert": "BertLMHeadModel", "gpt2": "GPT2LMHeadModel"}[model_type]
    shards = shards_of(model_type, head=head, **decoder)
    assert said(shards) == []
    for part in (cross, own):
        (finding,) = said(changed(shards, part, reverse))
        assert part in finding
        assert "rank order [1, 0] differs from " + ("crossatt" if part is cross else "att") in finding
    all_whole = changed(shards, "1.crossattention.", whole)
    assert said(all_whole) == []  # one block whole, the other cut
    assert said(changed(all_whole, own, whole)) != []


@pytest.mark.parametrize("model_type", ["olmo2", "olmo3"])
@pytest.mark.parametrize(("tp", "kv_heads", "own"), [(2, 2, 3), (6, 3, 1)])
def test_a_norm_over_all_heads_needs_them_all(model_type: str, tp: int, kv_heads: int, own: int) -> None:
    shards = shards_of(model_type, tp, kv_heads)
    assert said(shards) == []
    (finding,) = said(changed(shards, "1.self_attn.q_proj", same, Role("column")))
    assert finding == (
        f"{L1}.self_attn.q_norm.weight, rank 0: is over all 6 heads, the rank has {own}: q_proj must be gathered before it"
    )
    joined_there = changed(shards, "1.self_attn.q_proj", same, Role("column"))
    assert said(changed(joined_there, "1.self_attn.q_norm", same, Role("replicate", "input"))) == []
    assert said(changed(joined_there, "1.self_attn.", whole)) == []


def test_a_gathered_block_needs_no_partner() -> None:
    """No later layer can tell that up and gate were cut; but a layer's bias must be cut as its weight."""
    joined = Role("column", "output")
    shards = changed(shards_of("jais2"), "1.mlp.down_proj", whole, Role("replicate"))
    assert said(shards) != []
    shards = changed(shards, "1.mlp.up_proj", same, joined)
    assert said(shards) == []
    apart = changed(changed(shards, "1.mlp.up_proj.weight", along(0, [0, 17, 34, 52])), "1.mlp.up_proj.bias", same)
    assert any("1.mlp.up_proj.weight" in text for text in said(apart))


def test_the_bias_of_the_head_has_as_many_rows_as_its_weight() -> None:
    """1003 words on two ranks, padded to 512 or to one more than there are."""
    shards = shards_of("phi")
    assert said(changed(shards, "lm_head", along(0, [0, 512, 1003], own=512))) == []
    for padded in (along(0, [0, 512, 1003], own=512), along(0, [0, 502, 1003], own=502)):
        (finding,) = said(changed(shards, "lm_head.weight", padded))
        assert finding.startswith("lm_head.")


# ---------------------------------------------------------------------------------------------- ties


def test_a_tied_head_is_dealt_as_the_embedding() -> None:
    """Both on disk, one weight: the same words on the same ranks, in as many rows."""
    shards = shards_of("llama")
    tied = with_config(shards, tie_word_embeddings=True)
    assert said(tied) == []
    for change, told in (
        (along(0, [0, 512, 1003], own=512), "512 words in 512 rows from word 0, there 502 in 502 from 0"),
        (along(0, [0, 502, 1003], own=502), ""),
        (whole, "1003 words in 1003 rows from word 0, there 502 in 502 from 0"),
    ):
        apart = changed(tied, "lm_head", change)
        (finding,) = said(apart)
        assert "lm_head.weight, rank" in finding
        assert f"is tied to model.embed_tokens.weight but dealt otherwise: {told}" in finding
        assert said(with_config(apart, tie_word_embeddings=False)) == []
        assert said(with_config(apart, tie_word_embeddings=None)) == []  # llama's default
        both = changed(apart, "embed_tokens", change)
        assert said(both) == []


def test_a_tied_head_with_as_many_rows_of_other_words() -> None:
    padded = along(0, [0, 512, 1003], own=512)
    tied = changed(with_config(shards_of("llama"), tie_word_embeddings=True), "embed_tokens", padded)
    found = said(changed(tied, "lm_head", lambda layout: reverse(padded(layout))))
    told = "dealt otherwise: 491 words in 512 rows from word 512, there 512 in 512 from 0"
    assert found[-1] == f"lm_head.weight, rank 0: is tied to model.embed_tokens.weight but {told}"


def test_tied_by_default_counts_too() -> None:
    shards = shards_of("gemma", tie_word_embeddings=False)
    apart = changed(shards, "lm_head", whole)
    assert said(apart) == []
    (finding,) = said(with_config(apart, tie_word_embeddings=None))
    assert "lm_head.weight, rank 0: is tied to model.embed_tokens.weight" in finding


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_head_that_is_neither_there_nor_tied(model_type: str) -> None:
    heads = ("lm_head.weight", "decoder.weight", "generator_lm_head.weight", "vocab_projector.weight")
    shards = shards_of(model_type, tie_word_embeddings=False)
    assert said(shards) == []
    headless = without(shards, *heads)
    assert len(headless.tensors) == len(shards.tensors) - 1
    (finding,) = said(headless)
    assert re.fullmatch(
        r"config.json: (\S+ or )*(\S*decoder|\S*lm_head|\S+projector) missing and tie_word_embeddings false", finding
    )
    assert said(with_config(headless, tie_word_embeddings=True)) == []
    assert said(with_config(headless, architectures=["XModel"])) == []
    assert said(with_config(headless, architectures=["XForSequenceClassification"])) == []
    assert said(with_config(headless, architectures=None)) == []
    by_default = said(with_config(headless, tie_word_embeddings=None))
    assert by_default == ([] if model_type in TIED_BY_DEFAULT else [f"{finding}, by default of {model_type}"])


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("model_type", "fields", "name", "text"),
    [
        ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1}, "self_attn.q_proj.weight", "has 60 cells along axis 0, config.json says 3 query heads of 10: 30; is it one rank's config.json, already divided by 2?"),
        ("qwen2", {"head_dim": 5}, "self_attn.o_proj.weight", "has 60 cells along axis 1, config.json says 6 query heads of 5: 30; is it one rank's config.json, already divided by 2?"),
        ("qwen2", {"head_dim": 7}, "self_attn.k_proj.bias", "has 20 cells along axis 0, config.json says 2 key-value heads of 7: 14"),
        ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 5}, "self_attn.q_norm.weight", "has 10 cells along axis 0, config.json says 5 head cells: 5; is it one rank's config.json, already divided by 2?"),
        ("cohere", {"num_key_value_heads": 1}, "self_attn.k_norm.weight", "has 2 cells along axis 0, config.json says 1 key-value head: 1; is it one rank's config.json, already divided by 2?"),
        ("olmo2", {"num_key_value_heads": 3}, "self_attn.k_norm.weight", "has 20 cells along axis 0, config.json says 3 key-value heads of 10: 30"),
        ("phi3", {"num_key_value_heads": 1}, "self_attn.qkv_proj.weight", "has 100 cells along axis 0, config.json says 6 query heads of 10 and 1 key head of 10 and 1 value head of 10: 80"),
        ("glm", {"intermediate_size": 26}, "mlp.gate_up_proj.weight", "has 104 cells along axis 0, config.json says 26 gate channels and 26 up channels: 52; is it one rank's config.json, already divided by 2?"),
        ("bert", {"intermediate_size": 50}, "intermediate.dense.bias", "has 52 cells along axis 0, config.json says 50 channels: 50"),
        ("gpt2", {"n_head": 4}, "attn.c_attn.bias", None),  # 66 cells do not tell how many heads they are
    ],
)  # fmt: skip
def test_sizes_that_config_says_otherwise(model_type: str, fields: dict[str, int], name: str, text: str | None) -> None:
    found = [finding for finding in said(with_config(shards_of(model_type), **fields)) if f".1.{name}" in finding]
    if text is None:
        assert found != []
        return
    assert [finding.partition(": ")[2] for finding in found] == [text]


def test_words_that_config_says_otherwise() -> None:
    found = said(with_config(shards_of("llama"), vocab_size=502))
    assert found == [
        f"{name}: has 1003 cells along axis 0, config.json says 502 words: 502"
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    ]


def test_heads_that_cannot_share() -> None:
    assert said(with_config(shards_of("llama"), num_attention_heads=3)) == [
        "config.json: 3 query heads cannot share 2 key-value heads"
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "nobodys"}, "nothing is known apart from the policy about a model of model_type 'nobodys'"),
        ({"model_type": None}, "nothing is known apart from the policy about a model without config.json"),
        ({"num_attention_heads": None}, "config.json says nothing of attention heads"),
    ],
)
def test_what_is_not_known_is_not_passed(fields: dict[str, Any], reason: str) -> None:
    result = check_layout(with_config(shards_of("llama"), **fields))
    assert (result.verdict, result.reason) == (Verdict.INCONCLUSIVE, reason)


def test_head_size_where_config_is_silent() -> None:
    """Six heads do not divide a hidden size of 44: a head is what the axis has room for."""
    assert said(with_config(shards_of("qwen2"), head_dim=None)) == []
