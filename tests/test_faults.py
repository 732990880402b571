"""Every planted fault is caught by the checks that should, with the right place named; what is right passes.

The suite plants each fault into one model or two; ``python -m tests.faults`` plants it into all, for more ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import report_schema
from tests.fault_list import REFUSALS, Equivalent, Fault, Refusal, all_faults, clean, equivalents
from tests.faults import Models, alarms, failing, try_fault, was_caught, was_refused
from tpshard.verify.report import Verdict


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def place(case: Fault | Equivalent) -> str:
    return f"{case.model}@{case.tp}"


def words(case: Fault | Equivalent) -> str:
    return f"{case.id}-{place(case)}-{case.what}".replace(" ", "_")


@pytest.mark.parametrize("fault", [fault for fault in all_faults() if fault.usual], ids=words)
def test_fault_is_caught_and_named(fault: Fault, models: Models, tmp_path: Path) -> None:
    report = try_fault(fault, models(fault.model), tmp_path)
    report_schema.check(report)
    assert report.verdict is Verdict.FAIL
    assert was_caught(fault, report), [
        (check.name, check.verdict.value, [str(finding) for finding in check.findings[:3]]) for check in report.checks
    ]


@pytest.mark.parametrize("equivalent", list(equivalents()), ids=words)
def test_what_computes_the_same_is_no_fault_of_the_model(
    equivalent: Equivalent, models: Models, tmp_path: Path
) -> None:
    report = try_fault(equivalent, models(equivalent.model), tmp_path)
    report_schema.check(report)
    assert set(failing(report)) == equivalent.failing
    assert alarms(equivalent, report) == []


@pytest.mark.parametrize("case", [case for case, usual in clean() if usual], ids=place)
def test_what_is_right_passes(case: Equivalent, models: Models, tmp_path: Path) -> None:
    report = try_fault(case, models(case.model), tmp_path)
    report_schema.check(report)
    assert [(check.name, check.verdict) for check in report.checks] == [
        (name, Verdict.PASS) for name in ("files", "weights", "layout", "forward", "backward", "generic", "self-test")
    ], report
    (forward,) = [check for check in report.checks if check.name == "forward"]
    assert forward.figures["worst_relative_error"] <= 1e-12


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.id}-{refusal.what}".replace(" ", "_"))
def test_what_cannot_be_right_is_refused(refusal: Refusal, models: Models, tmp_path: Path) -> None:
    assert was_refused(refusal, models("qwen2"), tmp_path)
