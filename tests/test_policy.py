"""From YAML to rules, from rules to layouts: worked examples, every refusal, and how a policy is picked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.build import HEAD_DIM, HEADS, HIDDEN, POLICY, VOCAB, config, tiny_shapes
from tpshard.assignment import MAX_RANKS, assign
from tpshard.document import parse_documents
from tpshard.errors import PolicyError, UsageError
from tpshard.layout import Layout
from tpshard.library import builtin_policies, choose_policy, policy_as_data, policy_from_data, read_policies
from tpshard.policy import Policy, rule_layout
from tpshard.policy_parsing import parse_policy
from tpshard.roles import Role

CONFIG = config(3, d_state=7, groups=2)


def policy(text: str) -> Policy:
    """The one policy of a YAML text."""
    (document,) = parse_documents(text, "p.yaml")
    return parse_policy(document)


def of_rule(rule: str, more: str = "") -> Policy:
    """A policy of one rule, for the layer ``fc``."""
    return policy(f"name: x\nvars: {{H: num_attention_heads, K: num_key_value_heads}}\n{more}rules:\n  fc: {rule}\n")


def layout(rule: str, shape: tuple[int, ...], ranks: int) -> Layout:
    found = of_rule(rule)
    return rule_layout(found.rules[0], found, CONFIG, shape, ranks)


# ---------------------------------------------------------------------------------------------- what a rule does


@pytest.mark.parametrize(
    ("rule", "shape", "axis"),
    [
        ("column", (12, 44), 0),
        ("column", (12,), 0),
        ("row", (12, 44), 1),
        ("row", (12,), None),
        ("row", (12, 44, 3, 3), 1),
        ("column", (12, 44, 3), 0),
        ("column", (), None),
        ("replicate", (12, 44), None),
        ("{rule: column, dims: io}", (44, 12), 1),
        ("{rule: row, dims: io}", (44, 12), 0),
        ("{rule: column, dims: io}", (12,), 0),
        ("{rule: row, dims: io}", (12,), None),
        ("{rule: column, dims: eoi}", (5, 12, 44), 1),
        ("{rule: row, dims: eoi}", (5, 12, 44), 2),
        ("{rule: column, dims: eio}", (5, 44, 12), 2),
        ("{rule: column, dims: eio}", (5, 12), 1),
        ("{rule: row, dims: eio}", (5, 12), None),
        ("{rule: column, dims: .o}", (1003, 6), 1),
    ],
)
def test_which_axis_is_cut(rule: str, shape: tuple[int, ...], axis: int | None) -> None:
    assert of_rule(rule).rules[0].axis(shape) == axis
    assert layout(rule, shape, 2).cut_axes == (() if axis is None else (axis,))


@pytest.mark.parametrize(
    ("rule", "size", "ranks", "held"),
    [
        ("column", 7, 2, [[(0, 4)], [(4, 7)]]),
        ("{rule: column, heads: H}", 60, 3, [[(0, 20)], [(20, 40)], [(40, 60)]]),
        ("{rule: column, heads: K}", 30, 6, [[(0, 10)]] * 2 + [[(10, 20)]] * 2 + [[(20, 30)]] * 2),
        ("{rule: column, heads: 2}", 10, 2, [[(0, 5)], [(5, 10)]]),
        ("{rule: column, unit: 4}", 24, 2, [[(0, 12)], [(12, 24)]]),
        ("{rule: column, unit: head_dim}", 30, 3, [[(0, 10)], [(10, 20)], [(20, 30)]]),
        ("{rule: column, parts: 2}", 12, 2, [[(0, 3), (6, 9)], [(3, 6), (9, 12)]]),
        ("{rule: column, stacked: 2}", 10, 2, [[(0, 3), (5, 8)], [(3, 5), (8, 10)]]),
        ("{rule: column, stacked: 2, parts: 2}", 12, 3, [[(0, 1), (3, 4), (6, 7), (9, 10)], [(1, 2), (4, 5), (7, 8), (10, 11)],
                                                        [(2, 3), (5, 6), (8, 9), (11, 12)]]),
        ("{rule: column, parts: [H, K, K]}", 120, 3, [[(0, 20), (60, 70), (90, 100)],
                                                      [(20, 40), (70, 80), (100, 110)],
                                                      [(40, 60), (80, 90), (110, 120)]]),
        ("{rule: column, parts: [[4, 3], [groups, d_state]]}", 26, 2, [[(0, 6), (12, 19)], [(6, 12), (19, 26)]]),
        ("{rule: column, heads: H, uneven: true}", 60, 4, [[(0, 20)], [(20, 40)], [(40, 50)], [(50, 60)]]),
        ("{rule: column, pad: 4}", 10, 2, [[(0, 8)], [(8, 10)]]),
        ("{rule: column, pad: head_dim - 6}", 10, 2, [[(0, 8)], [(8, 10)]]),
    ],
)  # fmt: skip
def test_how_the_axis_is_dealt(rule: str, size: int, ranks: int, held: list[list[tuple[int, int]]]) -> None:
    found = layout(rule, (size, 3), ranks)
    assert [[tuple(run) for run in shard.spans[0]] for shard in found.shards if shard] == held


def test_the_role_is_recorded() -> None:
    assert of_rule("{rule: column, gather: true}").rules[0].role == Role("column", "output", "fc")
    assert of_rule("{rule: replicate, gather: input}").rules[0].role == Role("replicate", "input", "fc")
    assert of_rule("{rule: column, gather: false}").rules[0].role == Role("column", "", "fc")


@pytest.mark.parametrize(
    ("rule", "shape", "ranks", "message"),
    [
        ("{rule: column, heads: H}", (60, 4), 4, "p.yaml:4:3: fc: 6 units cannot be dealt to 4 ranks"),
        ("{rule: row, heads: K}", (4, 30), 6, "3 units cannot be dealt to 6 ranks: a row rule may not replicate"),
        ("{rule: column, heads: H}", (61, 4), 2, "p.yaml:4:3: fc: 6 heads do not divide an axis of 61"),
        ("{rule: column, unit: 8}", (61, 4), 2, "fc: units of 8 do not divide an axis of 61"),
        ("{rule: column, stacked: 3}", (61, 4), 2, "fc: 3 stacked do not divide an axis of 61"),
        ("{rule: column, parts: 3}", (61, 4), 2, "fc: 3 parts do not divide an axis of 61"),
        ("{rule: column, parts: [H, K, K]}", (61, 4), 3, "fc: parts of 6+3+3 heads do not divide an axis of 61"),
        ("{rule: column, parts: [[2, 3], [4, 5]]}", (61, 4), 2, "fc: parts 2x3 + 4x5 do not add up to an axis of 61"),
        ("{rule: column, heads: absent}", (61, 4), 2, "fc: heads: 'absent' is not in the config"),
        ("{rule: column, heads: H - 6}", (60, 4), 2, "fc: heads: H - 6 is 0, must be at least 1"),
        ("{rule: column, heads: 0}", (60, 4), 2, "fc: heads: 0 is 0, must be at least 1"),
        ("{rule: column, unit: -4}", (60, 4), 2, "fc: unit: -4 is -4, must be at least 1"),
        ("{rule: column, pad: 0}", (60, 4), 2, "fc: pad: 0 is 0, must be at least 1"),
        ("{rule: column, parts: [H, 0]}", (60, 4), 2, "fc: parts: 0 is 0, must be at least 1"),
        ("{rule: column, heads: model_type}", (60, 4), 2, "'model_type' is 'tiny' in the config, not a whole number"),
        ("{rule: column, heads: H / 4}", (60, 4), 2, "'H / 4': 6 / 4 is not whole"),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_fit(rule: str, shape: tuple[int, ...], ranks: int, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        layout(rule, shape, ranks)
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["{rule: column, heads: H}", "{rule: column, parts: [H, K]}", "{rule: column, unit: 4}",
                                  "{rule: column, parts: 2}", "{rule: row, dims: io}", "{rule: column, pad: 8}"])  # fmt: skip
def test_a_tensor_of_no_cells_can_be_dealt(rule: str) -> None:
    assert all(shard is not None and shard.covered == 0 for shard in layout(rule, (0, 4), 3).shards)


# ---------------------------------------------------------------------------------------------- refusals of the text

RULES = "name: x\nrules:\n"

REFUSED = {
    "a list": ("- a\n", "p.yaml:1:1: must be a mapping, is a list"),
    "a word": ("policy", "p.yaml:1:1: must be a mapping, is the text 'policy'"),
    "unknown key": ("name: x\nruels: {}\n", "p.yaml:2:1: ruels: is not a known key (did you mean 'rules'?)"),
    "newer version": ("version: 2\nname: x\n", "p.yaml:1:10: version: is not a known key"),
    "no name": ("rules: {}", "p.yaml:1:1: a policy needs a name (name: my-model)"),
    "no rules": ("name: x", "p.yaml:1:1: a policy needs rules, or extends another"),
    "name is a number": ("name: 3\nrules: {}", "p.yaml:1:7: name: must be text, is the number 3"),
    "name is empty": ("name: ''\nrules: {}", "p.yaml:1:7: name: must be one word"),
    "name with an escape": ('name: "a\\e[31m"\nrules: {}', "p.yaml:1:7: name: must be one word"),
    "name of two lines": ('name: "a\\nb"\nrules: {}', "p.yaml:1:7: name: must be one word"),
    "rules is a list": (RULES + "  - column\n", "p.yaml:3:3: rules: must be a mapping, is a list"),
    "unknown rule": (RULES + "  fc: colum\n", "p.yaml:3:7: rules.fc: must be one of column, row, replicate; is 'colum' (did you mean 'column'?)"),
    "empty rule": (RULES + "  fc:\n", "rules.fc: must be one of column, row, replicate; is ''"),
    "rule is a list": (RULES + "  fc: [column]\n", "rules.fc: must be one of column, row, replicate; is a list"),
    "rule without rule": (RULES + "  fc: {heads: 2}\n", "p.yaml:3:3: rules.fc: needs a rule: column, row, replicate"),
    "unknown key of a rule": (RULES + "  fc: {rule: row, head: 2}\n", "p.yaml:3:25: rules.fc.head: is not a known key (did you mean 'heads'?)"),
    "heads is true": (RULES + "  fc: {rule: row, heads: true}\n", "rules.fc.heads: must be a number or an expression over config keys, is true"),
    "heads is empty": (RULES + "  fc: {rule: row, heads: }\n", "rules.fc.heads: must be a number or an expression over config keys, is empty"),
    "heads is a list": (RULES + "  fc: {rule: row, heads: [1]}\n", "rules.fc.heads: must be a number or an expression over config keys, is a list"),
    "heads and unit": (RULES + "  fc: {rule: row, heads: 2, unit: 3}\n", "rules.fc: heads and unit exclude one another (keep one)"),
    "heads and parts": (RULES + "  fc: {rule: row, heads: 2, parts: 3}\n", "rules.fc: heads and parts exclude one another"),
    "heads and pad": (RULES + "  fc: {rule: row, heads: 2, pad: 3}\n", "rules.fc: heads and pad exclude one another"),
    "pad and stacked": (RULES + "  fc: {rule: row, pad: 2, stacked: 2}\n", "rules.fc: stacked and pad exclude one another (padding would lie between"),
    "replicate stacked": (RULES + "  fc: {rule: replicate, stacked: 2}\n", "rules.fc: stacked without effect: a replicated layer is not cut"),
    "pad and uneven": (RULES + "  fc: {rule: row, pad: 2, uneven: true}\n", "rules.fc: pad and uneven exclude one another (pad makes the ranks equal)"),
    "row gathers": (RULES + "  fc: {rule: row, gather: true}\n", "rules.fc: gather: true needs rule: column, is row (a row layer ends in a sum by itself)"),
    "replicate gathers": (RULES + "  fc: {rule: replicate, gather: true}\n", "rules.fc: gather: true needs rule: column, is replicate"),
    "replicate heads": (RULES + "  fc: {rule: replicate, heads: 2}\n", "rules.fc: heads without effect: a replicated layer is not cut"),
    "replicate uneven": (RULES + "  fc: {rule: replicate, uneven: true}\n", "rules.fc: uneven without effect"),
    "gather is a word": (RULES + "  fc: {rule: column, gather: output}\n", "rules.fc.gather: must be true, false or input, is the text 'output'"),
    "uneven is a word": (RULES + "  fc: {rule: column, uneven: 'true'}\n", "rules.fc.uneven: must be true or false, is the text 'true'"),
    "dims of other letters": (RULES + "  fc: {rule: column, dims: ab}\n", "p.yaml:3:28: rules.fc.dims: 'ab' must have one letter for each axis"),
    "dims twice": (RULES + "  fc: {rule: column, dims: oo}\n", "rules.fc.dims: 'oo' must have one letter for each axis"),
    "dims empty": (RULES + "  fc: {rule: column, dims: ''}\n", "rules.fc.dims: '' must have one letter for each axis"),
    "dims a number": (RULES + "  fc: {rule: column, dims: 1}\n", "rules.fc.dims: must be text, is the number 1"),
    "parts zero": (RULES + "  fc: {rule: column, parts: 0}\n", "rules.fc.parts: must be at least 1, is 0"),
    "parts empty": (RULES + "  fc: {rule: column, parts: []}\n", "rules.fc.parts: must be a number, a list of heads or a list of [count, width], is a list"),
    "parts a word": (RULES + "  fc: {rule: column, parts: H}\n", "rules.fc.parts: must be a number, a list of heads"),
    "parts of three": (RULES + "  fc: {rule: column, parts: [[1, 2, 3]]}\n", "rules.fc.parts: each part must be [count, width]"),
    "parts mixed": (RULES + "  fc: {rule: column, parts: [1, [2, 3]]}\n", "rules.fc.parts: mixes heads and [count, width]"),
    "bad key": (RULES + "  a..b: column\n", "p.yaml:3:9: rules.a..b: the key has an empty segment"),
    "key as a regular expression": (RULES + "  '(a+)+$|[0-9]': column\n", "the key uses a character that is not part of a name; only * ** and {a,b} are special"),
    "bracket in key": (RULES + "  'a.{b': column\n", "the key has a '{' without its '}'"),
    "too many names": (RULES + f"  '{'{a,b}' * 12}': column\n", "the key stands for more than 256 alternatives"),
    "key with an escape": (RULES + '  "a\\e[31mb": column\n', "is special"),
    "default": ("name: x\ndefault: row\nrules: {}", "p.yaml:2:10: default: must be one of replicate, error; is 'row'"),
    "vars is a list": ("name: x\nvars: [a]\nrules: {}", "p.yaml:2:7: vars: must be a mapping, is a list"),
    "vars of true": ("name: x\nvars: {H: true}\nrules: {}", "p.yaml:2:11: vars.H: must be a number or an expression"),
    "for is a word": ("name: x\nfor: llama\nrules: {}", "p.yaml:2:6: for: must be a mapping, is the text 'llama'"),
    "for of mappings": ("name: x\nfor: {model_type: {a: b}}\nrules: {}", "for.model_type: must be a value to compare config.json with, is a mapping"),
    "for of lists": ("name: x\nfor: {model_type: [[a]]}\nrules: {}", "for.model_type[0]: must be a value to compare config.json with, is a list"),
    "extends a list": ("name: x\nextends: [a]", "p.yaml:2:10: extends: must be text, is a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED.keys())
def test_refused(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(PolicyError) as caught:
        policy(text)
    assert message in str(caught.value).replace(
        "is not part of a name; only * ** and {a,b} are special", "is special"
    ) or message in str(caught.value)
    assert str(caught.value).startswith("p.yaml:")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- matching


def two_levels(tmp_path: Path, own: str, base: str) -> Policy:
    (tmp_path / "p.yaml").write_text(f"name: mine\nextends: base\n{own}---\nname: base\n{base}")
    return read_policies(tmp_path / "p.yaml")[0]


def test_a_rule_matches_a_layer_or_a_tensor() -> None:
    found = policy("name: x\nrules:\n  attn: column\n  attn.sinks: row\n  bias: replicate\n")
    for name, key in (("h.0.attn.weight", "attn"), ("h.0.mlp.bias", "bias"), ("h.0.attn.sinks.weight", "attn.sinks")):
        rule = found.match(name)
        assert rule is not None
        assert rule.key == key
    assert found.match("h.0.other.weight") is None
    assert found.match("attn") is not None, "a tensor without a layer"


def test_two_rules_of_one_document_for_a_tensor() -> None:
    found = policy("name: x\nrules:\n  attn.fc: column\n  fc: row\n")
    with pytest.raises(PolicyError) as caught:
        found.match("h.0.attn.fc.weight")
    assert str(caught.value) == (
        "h.0.attn.fc.weight: 2 rules match: 'attn.fc' at p.yaml:3:3 and 'fc' at p.yaml:4:3 (make one more specific)"
    )


def test_the_first_level_that_matches_decides(tmp_path: Path) -> None:
    found = two_levels(tmp_path, "rules:\n  fc: replicate\n", "rules:\n  fc: row\n  proj: column\n")
    assert [(found.match(f"h.{name}.weight") or found.rules[0]).kind for name in ("fc", "proj")] == [
        "replicate",
        "column",
    ]


def test_variables_of_the_nearest_level(tmp_path: Path) -> None:
    found = two_levels(tmp_path, "vars: {H: 2}\n", "vars: {H: 3, K: 5}\nrules: {}\n")
    assert found.variables == {"H": 2, "K": 5}


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [
        ("", "", None),
        ("default: replicate\n", "", "replicate"),
        ("", "default: replicate\n", "replicate"),
        ("default: error\n", "default: replicate\n", None),
        ("default: replicate\n", "default: error\n", "replicate"),
    ],
)
def test_the_nearest_default_decides(tmp_path: Path, own: str, base: str, expected: str | None) -> None:
    assert two_levels(tmp_path, own, f"{base}rules: {{}}\n").default == expected


# ---------------------------------------------------------------------------------------------- assignment


def assigned(text: str, ranks: int, kv_heads: int = 3, **more: Any) -> dict[str, Layout]:
    found = assign(policy(text), config(kv_heads, **more), tiny_shapes(kv_heads), ranks)
    return {name: assignment.layout for name, assignment in found.tensors.items()}


@pytest.mark.parametrize(("kv_heads", "ranks"), [(3, 1), (3, 3), (3, 6), (2, 2), (2, 6), (1, 2), (1, 3), (1, 6)])
def test_the_tiny_model(kv_heads: int, ranks: int) -> None:
    """Every tensor, against index arrays written out by hand."""
    from tests.build import expected_shards, tensor

    shapes = tiny_shapes(kv_heads)
    tensors = {name: tensor("F32", shape, 1) for name, shape in shapes.items()}
    layouts = assigned(POLICY, ranks, kv_heads)
    assert set(layouts) == set(shapes)
    for rank, expected in enumerate(expected_shards(tensors, kv_heads, ranks)):
        for name, layout in layouts.items():
            shard = layout.shards[rank]
            assert shard is not None
            own = np.zeros(shard.shape, np.float32)
            for piece in shard.pieces():
                own[piece.local.slices()] = tensors[name].array()[piece.box.slices()]
            assert np.array_equal(own, expected[name]), name


@pytest.mark.parametrize(
    ("ranks", "what"), [(4, "6 units cannot be dealt to 4 ranks"), (2, "3 units cannot be dealt to 2 ranks")]
)
def test_ranks_that_do_not_go_name_those_that_do(ranks: int, what: str) -> None:
    with pytest.raises(PolicyError) as caught:
        assigned(POLICY, ranks)
    assert what in str(caught.value)
    assert caught.value.message.startswith("model.layers.0.self_attn.")
    assert "p.yaml:" in caught.value.message
    assert caught.value.hint == "--tp that works for this checkpoint: 1, 3, 6; or set uneven: true in the rule"


@pytest.mark.parametrize("ranks", [0, -1, MAX_RANKS + 1, 10**9])
def test_ranks_out_of_bounds(ranks: int) -> None:
    with pytest.raises(UsageError, match=f"--tp must be from 1 to {MAX_RANKS}, is {ranks}"):
        assigned(POLICY, ranks)


def test_tensors_without_a_rule_are_listed() -> None:
    text = POLICY.replace("  mlp.down_proj: row\n", "").replace("  mlp.{gate_proj,up_proj}: column\n", "")
    with pytest.raises(PolicyError) as caught:
        assigned(text, 3)
    assert caught.value.message == (
        "policy tiny has no rule for 18 tensors: model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.gate_proj.bias, model.layers.0.mlp.up_proj.weight, model.layers.0.mlp.up_proj.bias, "
        "model.layers.0.mlp.down_proj.weight, …"
    )
    assert caught.value.hint == "add rules, or default: replicate"


def test_a_tensor_without_a_rule_suggests_the_nearest() -> None:
    with pytest.raises(PolicyError) as caught:
        assigned(POLICY.replace("  lm_head: ", "  lmhead: "), 3)
    assert caught.value.message == "policy tiny has no rule for 1 tensor: lm_head.weight"
    assert caught.value.hint == "did you mean 'lmhead'?"


def test_default_replicate_takes_the_rest() -> None:
    text = POLICY.replace("  mlp.down_proj: row\n", "").replace("vars:", "default: replicate\nvars:")
    assert assigned(text, 3)["model.layers.0.mlp.down_proj.weight"].is_replicated


def test_rules_that_match_nothing_are_told() -> None:
    found = assign(policy(POLICY + "  mpl.gate_proj: column\n"), config(), tiny_shapes(), 3)
    assert [rule.key for rule in found.unused] == ["mpl.gate_proj"]


def test_replicated_units_hold_every_cell() -> None:
    layouts = assigned(POLICY, 6)
    for name, layout in layouts.items():
        assert sum(piece.box.volume for _, piece in layout.tiles()) == math.prod(layout.shape), name


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (0, "heads: H is 0, must be at least 1"),
        (-2, "heads: H is -2, must be at least 1"),
        (2.5, "is 2.5 in the config, not a whole number"),
        ("six", "is 'six' in the config, not a whole number"),
        (True, "is True in the config, not a whole number"),
        ([6], "is [6] in the config, not a whole number"),
        (None, "is not in the config"),
        (float("nan"), "is nan in the config, not a whole number"),
        (10**40, "is beyond 2^53"),
        (7, "7 heads do not divide an axis of 60"),
        (2**50, f"{2**50} heads do not divide an axis of 60"),
    ],
)
def test_heads_in_config_json_that_make_no_sense(heads: object, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        assigned(POLICY, 3, num_attention_heads=heads)
    assert message in str(caught.value)
    assert "self_attn.q_proj" in str(caught.value), "names tensor or rule"


# ---------------------------------------------------------------------------------------------- which policy


def test_a_file_of_several_policies_is_told_apart_by_for(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "name: a\nfor: {model_type: falcon, new_decoder: true}\nrules: {}\n"
        "---\nname: b\nfor: {model_type: [falcon, mini], new_decoder: false}\nrules: {}\n"
    )
    assert choose_policy(str(path), {"model_type": "falcon", "new_decoder": True}).name == "a"
    assert choose_policy(str(path), {"model_type": "mini", "new_decoder": False}).name == "b"
    with pytest.raises(PolicyError, match=f"none of the {path} applies to model_type 'llama'"):
        choose_policy(str(path), {"model_type": "llama"})
    with pytest.raises(PolicyError, match="none of the"):
        choose_policy(str(path), {"model_type": "falcon", "new_decoder": 1})  # 1 is not true


def test_two_policies_of_a_file_that_both_apply(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("name: a\nfor: {model_type: m}\nrules: {}\n---\nname: b\nfor: {model_type: m}\nrules: {}\n")
    with pytest.raises(PolicyError, match="apply to model_type 'm': a, b"):
        choose_policy(str(path), {"model_type": "m"})


def test_for_looks_into_nested_keys(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: a\nfor: {text_config.kind: m}\nrules: {}\n---\nname: b\nrules: {}\n")
    assert choose_policy(str(path), {"text_config": {"kind": "m"}}).name == "a"
    with pytest.raises(PolicyError, match="none of the"):
        choose_policy(str(path), {"text_config": ["kind"]})


def test_one_policy_in_a_file_needs_no_for(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(POLICY)
    assert choose_policy(str(tmp_path / "p.yaml"), {"model_type": "other"}).name == "tiny"


def test_a_file_without_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    assert choose_policy("mine", {}).name == "tiny"


@pytest.mark.parametrize("wanted", ["", "nonsense", "x" * 5000, "a\nb", "auto "])
def test_names_that_are_no_policy(wanted: str) -> None:
    with pytest.raises(PolicyError, match="no built-in policy is called"):
        choose_policy(wanted, {})


def test_a_name_nearly_right() -> None:
    with pytest.raises(PolicyError) as caught:
        choose_policy("lama", {})
    assert caught.value.hint == "did you mean 'llama'?"


def test_auto_without_a_config() -> None:
    with pytest.raises(PolicyError) as caught:
        choose_policy("auto", {})
    assert str(caught.value) == "there is no config.json to pick a policy by (name one with --policy)"


@pytest.mark.parametrize("model_type", ["no-such-model", None, 3, ["llama"], {"a": 1}, "x" * 10_000, "a\nb\x1b[31m"])
def test_auto_for_an_unknown_architecture(model_type: object) -> None:
    with pytest.raises(PolicyError, match="none of the built-in policies applies to model_type") as caught:
        choose_policy("auto", {"model_type": model_type})
    assert "--policy" in (caught.value.hint or "")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_extends_that_go_nowhere_or_round(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: a\nextends: lama\n")
    with pytest.raises(
        PolicyError, match=r"p.yaml:1:1: extends 'lama', which does not exist \(did you mean 'llama'\?\)"
    ):
        read_policies(path)
    path.write_text("name: a\nextends: b\n---\nname: b\nextends: a\n")
    with pytest.raises(PolicyError, match="policies extend one another in a circle: a → b"):
        read_policies(path)
    path.write_text("name: a\nextends: a\n")
    with pytest.raises(PolicyError, match="in a circle: a"):
        read_policies(path)
    path.write_text("name: a\nrules: {}\n---\nname: a\nrules: {}\n")
    with pytest.raises(PolicyError, match=r"p.yaml:4:1: a second policy called 'a' \(rename one\)"):
        read_policies(path)


def test_a_long_chain_of_extends(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "---\n".join(f"name: a{n}\nextends: a{n + 1}\n" for n in range(3000)) + "---\nname: a3000\nrules: {}\n"
    )
    with pytest.raises(PolicyError, match="extend one another more than"):
        read_policies(path)


def test_builtin_policies_extend_too(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: mine\nextends: llama\nrules: {lm_head: replicate}\n")
    (mine,) = read_policies(path)
    rule = mine.match("lm_head.weight")
    assert rule is not None
    assert rule.kind == "replicate"
    assert mine.match("model.layers.0.self_attn.q_proj.weight") is not None


def test_a_policy_survives_the_manifest(tmp_path: Path) -> None:
    """What the manifest records gives the same layouts again, extended policies included."""
    path = tmp_path / "p.yaml"
    path.write_text(f"name: mine\nextends: tiny\nvars: {{K: 1}}\nrules: {{lm_head: replicate}}\n---\n{POLICY}")
    mine = read_policies(path)[0]
    again = policy_from_data(json.loads(json.dumps(policy_as_data(mine))), "tpshard.json")
    assert policy_as_data(again) == policy_as_data(mine)
    layouts = assign(mine, config(), tiny_shapes(), 3)
    assert assign(again, config(), tiny_shapes(), 3).tensors == layouts.tensors
    assert layouts.tensors["lm_head.weight"].layout.is_replicated


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "m.json: no policy is recorded (give one with --policy)"),
        ([3], "m.json:1:1: policy: must be a mapping, is the number 3"),
        ([{"name": "x", "rules": {"fc": 1.5}}], "m.json: policy.rules.fc: 1.5 has no place in a policy"),
        ([{"name": "x", "rules": {"fc": None}}], "m.json: policy.rules.fc: None has no place in a policy"),
        ([{"name": "x", "rules": {"fc": "colum"}}], "m.json:1:1: policy.rules.fc: must be one of"),
    ],
)
def test_a_recorded_policy_that_is_none(documents: list[object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy_from_data(documents, "m.json")
    assert message in str(caught.value)


def test_every_builtin_policy_is_complete() -> None:
    for name, found in builtin_policies().items():
        assert name == found.name
        assert found.description
        assert found.rules


def test_sizes_of_the_tiny_model_differ() -> None:
    """Coincident sizes hide faults."""
    for kv_heads in (1, 2, 3):
        sizes = [HEADS * HEAD_DIM, kv_heads * HEAD_DIM, HIDDEN, 52, VOCAB, HEADS, kv_heads]
        assert len(set(sizes)) == len(sizes)
