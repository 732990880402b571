"""Which names a policy's key stands for."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.patterns import MAX_ALTERNATIVES, Pattern, PatternError, parse_patterns


def meets(key: str, name: str) -> bool:
    return any(pattern.matches(name) for pattern in parse_patterns(key))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("mlp.c_fc", "h.0.mlp.c_fc"),
        ("c_fc", "c_fc"),
        ("h.*.mlp", "transformer.h.11.mlp"),
        ("q_*", "self_attn.q_proj"),
        ("*_proj", "self_attn.q_proj"),
        ("*", "anything"),
        ("a*b*c", "aXbYc"),
        ("a*b*c", "abc"),
        ("**.dense", "dense"),
        ("**.dense", "a.b.c.dense"),
        ("encoder.**.dense", "model.encoder.layer.3.output.dense"),
        ("encoder.**.dense", "encoder.dense"),
        ("encoder.**", "encoder"),
        ("experts.**", "mlp.experts.7.w1"),
        ("**.a.**.b", "x.a.y.a.z.b"),
        ("{q,k,v}_proj", "attn.v_proj"),
        ("{a.b,c}.d", "x.a.b.d"),
        ("{a,b}.{c,d}", "b.c"),
        ("{ q , k }_proj", "k_proj"),
        ("ünïcode", "x.ünïcode"),
    ],
)
def test_matches(key: str, name: str) -> None:
    assert meets(key, name)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("c_fc", "h.0.mlp.xc_fc"),
        ("mlp.c_fc", "mlp.c_fc.weight"),
        ("mlp.c_fc", "c_fc"),
        ("h.*.mlp", "h.0.attn.mlp"),
        ("q*", "x.kq"),
        ("a*a", "a"),
        ("a*b*c", "aXcYb"),
        ("encoder.**.dense", "decoder.layer.dense"),
        ("encoder.**.dense", "encoder.layer.dense.weight"),
        ("layer.*.dense", "layer.dense"),
        ("Q_proj", "q_proj"),
        ("{a,b}.c", "c"),
    ],
)
def test_does_not_match(key: str, name: str) -> None:
    assert not meets(key, name)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "has an empty segment"),
        ("a..b", "has an empty segment"),
        (".a", "has an empty segment"),
        ("a.", "has an empty segment"),
        ("{a,}", "has an empty segment"),
        ("a.{b", "has a '{' without its '}', or one inside another"),
        ("a}b", "has a '}' without its '{'"),
        ("{a,{b,c}}", "one inside another"),
        ("a[0-9]", "only * ** and {a,b} are special"),
        ("(a|b) c", "only * ** and {a,b} are special"),
        ("a?", "only * ** and {a,b} are special"),
        (r"layers\.0", "only * ** and {a,b} are special"),
        ("a\nb", "only * ** and {a,b} are special"),
        ("a\x1b[31mb", "only * ** and {a,b} are special"),
        ("a\u202eb", "only * ** and {a,b} are special"),
        ("{a,b}" * 9, f"stands for more than {MAX_ALTERNATIVES} alternatives"),
        ("{a,b}" * 2000, "characters"),
        ("a" * 5000, "characters"),
    ],
)
def test_refused(key: str, message: str) -> None:
    with pytest.raises(PatternError, match=re.escape(message)):
        parse_patterns(key)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("*a" * 100 + "b", "a" * 100_000),
        ("a*" * 100 + "b", "a" * 100_000),
        (".".join(["**", "a"] * 50 + ["b"]), ".".join("a" * 2_000)),
        (".".join(["**"] * 100 + ["b"]), ".".join("a" * 2_000)),
        ("{a,b}" * 8, "a" * 100_000),
        ("(a+)+$", "a" * 30 + "!"),
    ],
)
def test_no_pattern_takes_long(key: str, name: str) -> None:
    """Where a backtracking matcher would take years."""
    begin = time.monotonic()
    assert not meets(key, name)
    assert time.monotonic() - begin < 2


# ---------------------------------------------------------------------------------------------- against an oracle


def as_regex(segments: tuple[str, ...]) -> str:
    """The meaning of a pattern over segments that each end in a dot, as a regular expression."""
    text = "".join(
        r"(?:[^.]*\.)*" if segment == "**" else re.escape(segment).replace(r"\*", "[^.]*") + r"\."
        for segment in segments
    )
    return rf"(?:[^.]*\.)*{text}"


names = st.lists(st.text("ab0", max_size=3), min_size=1, max_size=5).map(".".join)
keys = st.lists(
    st.one_of(st.just("**"), st.text("ab*", min_size=1, max_size=4).filter(lambda t: "**" not in t)),
    min_size=1,
    max_size=4,
)


@given(keys, names)
def test_matching_is_the_regular_expression(key: list[str], name: str) -> None:
    pattern = Pattern(tuple(key))
    assert pattern.matches(name) == bool(re.fullmatch(as_regex(pattern.segments), name + ".")), key
