"""What an adapter's tensors are, and how their layouts follow from the base's: answers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.adapter import Adapter, parse_adapter, parse_config
from tpshard.adapter_layout import Names, assign_adapter, carried_over
from tpshard.document import parse_documents
from tpshard.errors import InputError, PolicyError
from tpshard.layout import Layout, Shape, Span
from tpshard.policy import Policy
from tpshard.policy_parsing import parse_policy

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
PRE = "base_model.model."
RULES = """\
name: by-hand
vars: {H: heads, K: kv_heads}
rules:
  qkv: {rule: column, parts: [H, K, K]}
  o: {rule: row, heads: H}
  words: {rule: row, dims: io}
  padded: {rule: column, pad: 4}
  groups: {rule: row, heads: K, uneven: true}
  few: {rule: column, heads: 2}
  turned: {rule: column, dims: io}
  turned_back: {rule: row, dims: io}
  norm: replicate
"""


def policy() -> Policy:
    (document,) = parse_documents(RULES, "by-hand.yaml")
    return parse_policy(document)


def pair(layer: str, out: int, into: int, rank: int = 4) -> dict[str, Shape]:
    return {f"{PRE}{layer}.lora_A.weight": (rank, into), f"{PRE}{layer}.lora_B.weight": (out, rank)}


def layouts(
    shapes: dict[str, Shape], ranks: int, base: dict[str, Shape] | None = None, **config: Any
) -> dict[str, Layout]:
    adapter = parse_adapter(PLAIN | config, shapes)
    sizes = {"heads": 6, "kv_heads": 3}
    found = assign_adapter(policy(), sizes, adapter, shapes, ranks, base, Names(base or ())).tensors
    return {name.removeprefix(PRE): assignment.layout for name, assignment in found.items()}


def held(layout: Layout, axis: int) -> list[list[tuple[int, int]]]:
    return [[tuple(run) for run in shard.spans[axis]] if shard else [] for shard in layout.shards]


def test_a_fused_column_cuts_b_by_its_parts() -> None:
    """Six query heads and three of key and value, of five cells: 60 rows."""
    found = layouts(pair("0.qkv", 60, 7), 3)
    assert found["0.qkv.lora_A.weight"].is_replicated
    assert held(found["0.qkv.lora_B.weight"], 0) == [
        [(0, 10), (30, 35), (45, 50)], [(10, 20), (35, 40), (50, 55)], [(20, 30), (40, 45), (55, 60)],
    ]  # fmt: skip
    assert found["0.qkv.lora_B.weight"].cut_axes == (0,)


def test_a_row_cuts_a() -> None:
    found = layouts(pair("0.o", 7, 18), 2)
    assert held(found["0.o.lora_A.weight"], 1) == [[(0, 9)], [(9, 18)]]
    assert found["0.o.lora_A.weight"].cut_axes == (1,)
    assert found["0.o.lora_B.weight"].is_replicated


def test_an_embedding_by_words() -> None:
    shapes = {PRE + "words.lora_embedding_A": (4, 11), PRE + "words.lora_embedding_B": (6, 4)}
    found = layouts(shapes, 2)
    assert held(found["words.lora_embedding_A"], 1) == [[(0, 6)], [(6, 11)]]
    assert found["words.lora_embedding_B"].is_replicated


def test_padding_goes_along() -> None:
    found = layouts(pair("padded", 13, 7), 2)["padded.lora_B.weight"]
    assert [shard.shape for shard in found.shards if shard] == [(8, 4), (8, 4)]
    assert held(found, 0) == [[(0, 8)], [(8, 13)]]


def test_uneven_groups_and_shared_heads() -> None:
    assert held(layouts(pair("groups", 5, 12), 2)["groups.lora_A.weight"], 1) == [[(0, 8)], [(8, 12)]]
    assert held(layouts(pair("few", 8, 5), 4)["few.lora_B.weight"], 0) == [[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]]


@pytest.mark.parametrize(("layer", "part", "axis"), [("turned", "lora_B", 0), ("turned_back", "lora_A", 1)])
def test_conv1d_keeps_its_weight_the_other_way_round(layer: str, part: str, axis: int) -> None:
    """A and B do not."""
    found = layouts(pair(layer, 10, 6), 2, {f"{layer}.weight": (6, 10)})
    size = 10 if axis == 0 else 6
    assert held(found[f"{layer}.{part}.weight"], axis) == [[(0, size // 2)], [(size // 2, size)]]
    assert [name for name, layout in found.items() if layout.cut_axes] == [f"{layer}.{part}.weight"]
    with pytest.raises(InputError, match=r"A and B make \[6, 10\], the base's .* is \[10, 6\]"):
        layouts(pair(layer, 10, 6), 2, {f"{layer}.weight": (10, 6)})


def test_what_has_a_number_for_each_output_is_cut_with_b() -> None:
    more = {PRE + "0.qkv.lora_magnitude_vector": (60,), PRE + "0.qkv.lora_B.bias": (60,)}
    found = layouts(pair("0.qkv", 60, 7) | more, 3, use_dora=True)
    for name in ("lora_magnitude_vector", "lora_B.bias"):
        assert held(found[f"0.qkv.{name}"], 0) == held(found["0.qkv.lora_B.weight"], 0)
    of_row = pair("o", 7, 18) | {PRE + "o.lora_magnitude_vector": (7,)}
    assert layouts(of_row, 2, use_dora=True)["o.lora_magnitude_vector"].is_replicated


def test_whole_tensors_follow_their_own_rule() -> None:
    more: dict[str, Shape] = {
        PRE + "qkv.base_layer.bias": (60,), PRE + "o.base_layer.bias": (7,), PRE + "norm.modules_to_save.weight": (7,),
    }  # fmt: skip
    found = layouts(pair("o", 7, 18) | more, 3)
    assert found["qkv.base_layer.bias"].cut_axes == (0,)
    assert found["o.base_layer.bias"].is_replicated
    assert found["norm.modules_to_save.weight"].is_replicated


def test_a_convolution_keeps_its_kernel_whole() -> None:
    shapes: dict[str, Shape] = {PRE + "few.lora_A.weight": (4, 3, 2, 5), PRE + "few.lora_B.weight": (8, 4, 1, 1)}
    found = layouts(shapes, 2, {"few.weight": (8, 3, 2, 5)})
    assert found["few.lora_A.weight"].is_replicated
    assert found["few.lora_B.weight"].cut_axes == (0,)


def test_the_error_names_the_layer_and_what_works() -> None:
    with pytest.raises(PolicyError, match=r"0\.o\.weight: .*6 units cannot be dealt to 4 ranks") as caught:
        layouts(pair("0.o", 7, 18), 4)
    assert "1, 2, 3, 6" in str(caught.value.hint)


BAD: list[tuple[dict[str, Shape], dict[str, Any], str]] = [
    ({PRE + "o.lora_A.weight": (4, 18)}, {}, "o: lora_B is missing"),
    ({"o.lora_A.weight": (4, 18)}, {}, "does not begin with base_model.model."),
    (pair("o", 7, 18) | {PRE + "o.lora_diag": (4,)}, {}, "no part of LoRA that is known"),
    ({PRE + "norm.weight": (7,)}, {}, "holds no tensors of LoRA"),
    ({PRE + "o.lora_A.weight": (4, 18), PRE + "o.lora_B.weight": (4, 7)}, {}, r"A is \[4, 18\] and B \[4, 7\]"),
    ({PRE + "o.lora_A.weight": (4, 18), PRE + "o.lora_B.weight": (7, 4, 1)}, {}, r"want \[rank, in\] and \[out, rank\]"),
    (pair("o", 7, 18) | {PRE + "o.lora_magnitude_vector": (7,)}, {}, "has a lora_magnitude_vector, use_dora is False"),
    (pair("o", 7, 18) | {PRE + "o.lora_B.bias": (6,)}, {}, r"is \[6\], B has 7 outputs"),
    (pair("o", 7, 18) | {PRE + "a.bias": (7,), PRE + "a.base_layer.bias": (7,)}, {}, "are both the same part"),
    (pair("o", 7, 18), {"peft_type": "ADALORA"}, "peft_type is ADALORA"),
    (pair("o", 7, 18), {"use_rslora": 1}, "use_rslora is 1, not true or false"),
    (pair("o", 7, 18), {"alpha_pattern": [1]}, r"alpha_pattern is \[1\], not an object"),
    (pair("o", 7, 18), {"rank_pattern": {"o": True}}, "rank_pattern is True, not a whole number"),
    (pair("o", 7, 18), {"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "config", "said"), BAD, ids=[row[2] for row in BAD])
def test_what_is_no_adapter_that_is_cut(shapes: dict[str, Shape], config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_adapter(PLAIN | config, shapes)


@pytest.mark.parametrize(
    "layer", ["model.layers.1.self_attn.q_proj", "model.layers.11.mlp.q_proj", "q_proj", "xq_proj"]
)
@pytest.mark.parametrize("key", ["q_proj", r"layers\.1\..*", "self_attn.q_proj", ".*1.*proj", "proj"])
def test_patterns_are_peft_s(layer: str, key: str) -> None:
    from peft.utils.other import get_pattern_key

    config = parse_config(PLAIN | {"rank_pattern": {key: 9}, "alpha_pattern": {key: 5}})
    taken = get_pattern_key([key], layer) == key
    assert config.rank_of(layer) == (9 if taken else 4)
    assert config.scaling_of(layer) == pytest.approx(5 / 9 if taken else 6 / 4)


def test_scaling() -> None:
    assert parse_config(PLAIN).scaling_of("q") == 1.5
    assert parse_config(PLAIN | {"use_rslora": True}).scaling_of("q") == 6 / math.sqrt(4)


def test_names_on_disk() -> None:
    disk = Names(["h.0.c.weight", "model.a.weight", "x.b.weight", "y.b.weight", "a.b.c.weight"], {"m.q.weight": "d.q"})
    assert disk.find("transformer.h.0.c.weight") == "h.0.c.weight"  # less deep
    assert disk.find("a.weight") == "model.a.weight"  # deeper
    assert disk.find("model.a.weight") == "model.a.weight"
    assert disk.find("b.weight") is None  # two of them
    assert disk.find("c.weight") is None  # two deeper
    assert disk.find("m.q.weight") == "d.q"


@given(st.integers(1, 5), st.integers(1, 9), st.data())
def test_an_axis_is_carried_over_whatever_its_runs(ranks: int, size: int, data: st.DataObject) -> None:
    runs = []
    for _ in range(ranks):
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        runs.append((Span(start, stop),) if stop > start else ())
    base = Layout.along((3, size), 1, runs, [sum(run.size for run in own) for own in runs])
    made = carried_over(base, 1, (size, 2), 0)
    assert held(made, 0) == held(base, 1)
    assert [shard.shape[0] for shard in made.shards if shard] == [shard.shape[1] for shard in base.shards if shard]


def test_adapter_is_a_value() -> None:
    assert parse_adapter(PLAIN, pair("o", 7, 18)) == parse_adapter(PLAIN, pair("o", 7, 18))
    assert isinstance(parse_adapter(PLAIN, pair("o", 7, 18)), Adapter)
