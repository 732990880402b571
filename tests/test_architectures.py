"""Every built-in policy on every architecture that it is for: cut, verified forward and backward, merged bit for bit.

One architecture of some policies runs always, at its last rank count; the others behind the marker ``sweep``, and all
at the other rank counts behind ``full``. The table in docs/architectures.md has them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture_table import row, shown
from tests.architectures import ALWAYS, Architecture, architectures
from tests.proof import prove, save
from tpshard.library import builtin_policies

ALL = architectures()
FIRST = {found.policy: found for found in reversed(ALL)}


def _marks(found: Architecture, tp: int) -> pytest.MarkDecorator | tuple[()]:
    if tp != found.tp[-1]:
        return pytest.mark.full
    return () if found.policy in ALWAYS and FIRST[found.policy] is found else pytest.mark.sweep


EVERY_SIZE = [
    pytest.param(found, tp, id=f"{found.name}-{tp}", marks=_marks(found, tp)) for found in ALL for tp in found.tp
]


def test_each_model_type_of_a_policy_is_here() -> None:
    """But for those that transformers does not have; see test_remote_code.py."""
    accepted = {
        (str(kind), name)
        for name, policy in builtin_policies().items()
        if policy.mark.file != "remote_code.yaml"
        for kind in policy.applies_to["model_type"]
    }
    assert {(kind, found.policy) for found in ALL for kind in (found.model_type, *found.also)} == accepted


def test_the_page_has_a_row_for_each_with_its_rank_counts() -> None:
    assert {name: line.split(" | ")[2] for name, line in shown().items()} == {
        found.name: ", ".join(map(str, found.tp)) for found in ALL
    }


def test_names_are_unique() -> None:
    assert len({found.name for found in ALL}) == len(ALL)


@pytest.mark.parametrize(("architecture", "tp"), EVERY_SIZE)
def test_split_verify_merge(architecture: Architecture, tp: int, tmp_path: Path) -> None:
    """By the policy that auto picks: every check passes that knows the architecture, and every byte comes back."""
    save(architecture, tmp_path / "source")
    proof = prove(architecture, tmp_path / "source", tmp_path, tp)
    if tp == architecture.tp[-1]:
        gathers_and_replicated = row(architecture, [proof]).split(" | ")[6:]
        assert shown()[architecture.name].split(" | ")[6:] == gathers_and_replicated, (
            "python -m tests.architecture_table"
        )
