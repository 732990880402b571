"""Arithmetic over config.json: worked examples, every refusal, and Python's own arithmetic as the oracle."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.errors import PolicyError
from tpshard.expressions import MissingKeyError, evaluate

CONFIG: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": None,
    "hidden_size": 44,
    "text_config": {"hidden_size": 88, "rope": {"dim": 10}},
    "sizes": [3, 5, 7],
    "eps": 1e-5,
    "tied": True,
    "name": "llama",
    "huge": 10**30,
    "zero": 0,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("num_attention_heads", 6),
        ("num_key_value_heads | num_attention_heads", 6),
        ("absent | num_key_value_heads | 9", 9),
        ("hidden_size / 4", 11),
        ("hidden_size // 6", 7),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("7 - 9", -2),
        ("-3 + 5", 2),
        ("text_config.hidden_size", 88),
        ("text_config.rope.dim", 10),
        ("sizes[1]", 5),
        ("sizes[-1]", 7),
        ("sizes[num_attention_heads - 5]", 5),
        ("text_config.absent | hidden_size", 44),
        ("absent.deeper | 1", 1),
        ("(absent * 2) | 5", 5),
        ("sizes[9] | 4", 4),
        ("hidden_size.odd | 2", 2),
        ("zero | 5", 0),
        ("-" * 200 + "1", 1),
        ("(" * 30 + "1" + ")" * 30, 1),
        (f"{2**53}", 2**53),
    ],
)
def test_values(text: str, expected: int) -> None:
    assert evaluate(text, CONFIG) == expected


def test_variables_come_before_the_config() -> None:
    assert evaluate("H * 2", CONFIG, {"H": "num_attention_heads"}) == 12
    assert evaluate("H", CONFIG, {"H": 5}) == 5
    assert evaluate("hidden_size", CONFIG, {"hidden_size": "hidden_size | 1"}) == 44, "a variable may bear a key's name"
    assert evaluate("K | 3", CONFIG, {"K": "absent"}) == 3
    assert evaluate("a", CONFIG, {"a": "b + 1", "b": "c + 1", "c": "hidden_size"}) == 46


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent", "'absent' is not in the config"),
        ("num_key_value_heads", "'num_key_value_heads' is not in the config"),
        ("absent + 1", "'absent + 1' is not in the config (no 'absent')"),
        ("text_config.absent", "'text_config.absent' is not in the config"),
        ("sizes[3]", "'sizes[3]' is not in the config"),
    ],
)
def test_missing(text: str, message: str) -> None:
    with pytest.raises(MissingKeyError) as caught:
        evaluate(text, CONFIG)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an expression over config keys"),
        ("2 +", "'2 +' is not an expression"),
        ("heads of model", "is not an expression"),
        ("010", "is not an expression"),
        ("a\nb", "'a\\nb' is not an expression"),
        ("a\0b", "is not an expression"),
        ("1 " * 129, "an expression of 258 characters, at most 256 are read"),
        ("hidden_size / 3", "'hidden_size / 3': 44 / 3 is not whole (// rounds down)"),
        ("hidden_size / zero", "'hidden_size / zero' divides by zero"),
        ("hidden_size // 0", "'hidden_size // 0' divides by zero"),
        ("eps", "'eps' is 1e-05 in the config, not a whole number"),
        ("eps * 2", "is 1e-05 in the config, not a whole number"),
        ("tied", "'tied' is True in the config, not a whole number"),
        ("name", "'name' is 'llama' in the config, not a whole number"),
        ("sizes", "'sizes' is [3, 5, 7] in the config, not a whole number"),
        ("text_config", "in the config, not a whole number"),
        ("huge", "'huge' is beyond 2^53"),
        ("9007199254740992 * 9007199254740992", "is beyond 2^53"),
        ("9" * 200, "is beyond 2^53"),
        ("2 ** 9999999999", "only + - * / // and | are allowed"),
        ("2 % 3", "only + - * / // and | are allowed"),
        ("1 << 60", "only + - * / // and | are allowed"),
        ("2.5", "'2.5' is not allowed in an expression"),
        ("'text'", "''text'' is not allowed"),
        ("True", "'True' is not allowed in an expression"),
        ("~5", "'~5' is not allowed in an expression"),
        ("not 5", "is not allowed in an expression"),
        ("print(1)", "'print(1)' is not allowed in an expression"),
        ("__import__('os').system('true')", "is not allowed in an expression"),
        ("[1, 2][0]", "'[1, 2]' is not allowed in an expression"),
        ("sizes[0:1]", "is not allowed in an expression"),
        ("1 if 2 else 3", "is not allowed in an expression"),
        ("lambda: 1", "is not allowed in an expression"),
        ("(x := 3)", "is not allowed in an expression"),
        ("1 < 2", "is not allowed in an expression"),
        ("f'{1}'", "is not allowed in an expression"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        evaluate(text, CONFIG)
    assert not isinstance(caught.value, MissingKeyError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_attributes_are_out_of_reach() -> None:
    with pytest.raises(MissingKeyError):
        evaluate("name.__class__", CONFIG)
    with pytest.raises(MissingKeyError):
        evaluate("text_config.items", CONFIG)


def test_a_circle_of_variables_ends() -> None:
    with pytest.raises(MissingKeyError):
        evaluate("a", {}, {"a": "b", "b": "a"})


TWICE = {f"v{n}": f"v{n + 1} + v{n + 1}" for n in range(60)} | {"v60": "1"}
MESH = {f"v{n}": "+".join(f"v{n}" for n in range(12)) for n in range(12)}
LONG = {f"v{n}": f"v{n + 1} + 1" for n in range(2000)}


@pytest.mark.parametrize(
    ("variables", "message"),
    [(TWICE, "takes more than 10000 steps"), (MESH, "takes more than 10000 steps"), (LONG, "too many variables")],
    ids=["2^60 steps", "12! steps", "2000 deep"],
)
def test_variables_that_multiply_are_refused_in_time(variables: dict[str, str], message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(PolicyError, match=message):
        evaluate("v0", {}, variables)
    assert time.monotonic() - begin < 5


# ---------------------------------------------------------------------------------------------- Python as the oracle

leaves = st.sampled_from(["a", "b", "c", "1", "2", "13"])
sums = st.recursive(
    leaves,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=8,
)


@given(sums, st.integers(-9, 9), st.integers(1, 9), st.integers(1, 9))
def test_arithmetic_is_pythons(text: str, a: int, b: int, c: int) -> None:
    assert evaluate(text, {"a": a, "b": b, "c": c}) == eval(text, {"a": a, "b": b, "c": c})


@given(st.integers(-99, 99), st.integers(-9, 9).filter(bool))
def test_division_is_exact_or_refused(a: int, b: int) -> None:
    assert evaluate("a // b", {"a": a, "b": b}) == a // b
    if a % b:
        with pytest.raises(PolicyError, match="is not whole"):
            evaluate("a / b", {"a": a, "b": b})
    else:
        assert evaluate("a / b", {"a": a, "b": b}) == a // b
