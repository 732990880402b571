"""Faults in the verifier itself turn a test red. The quick ones are planted here; ``python -m tests.mutants`` has all,
and so has ``python -m pytest -m slow tests/test_mutants.py``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, ROOT

QUICK = ("V01", "V02", "V03", "V04", "V07", "V13", "V20", "V21", "V22", "V23")  # their tests run no model


def plant(ids: Sequence[str]) -> None:
    command = [sys.executable, "-m", "tests.mutants", *ids]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quick_mutants_turn_a_test_red() -> None:
    plant(QUICK)


@pytest.mark.slow
def test_all_mutants_turn_a_test_red(request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.option.markexpr:
        pytest.skip("two minutes: python -m pytest -m slow")
    plant([])


def test_every_mutant_fits_the_code() -> None:
    """What it replaces stands there once, and the tests that must turn red are there."""
    for mutant in MUTANTS:
        assert (ROOT / "tpshard/verify" / mutant.file).read_text("utf-8").count(mutant.old) == 1, mutant
        for test in mutant.tests:
            file, _, function = test.partition("::")
            assert f"def {function.partition('[')[0]}(" in (ROOT / Path(file)).read_text("utf-8"), test


def test_all_of_the_list_are_planted() -> None:
    assert {mutant.id for mutant in MUTANTS if mutant.id.startswith("V")} == {f"V{n:02}" for n in range(1, 26)}
