"""Every planted fault is caught by the checks that should, with the right place named; what is right passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import report_schema
from tests.faults import CLEAN, KEY_VALUE_HEADS, Fault, all_faults, try_fault, was_caught
from tests.tiny_models import save_model
from tpshard.convert import plan_split, run
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

Model = Callable[[str], Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A function from a model type to the folder of its tiny model, made once."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("models") / model_type
            save_model(model_type, made[model_type], KEY_VALUE_HEADS)
        return made[model_type]

    return folder


@pytest.mark.parametrize("fault", all_faults(), ids=lambda f: f"{f.id}-{f.model}-{f.what}".replace(" ", "_"))
def test_fault_is_caught_and_named(fault: Fault, model: Model, tmp_path: Path) -> None:
    report = try_fault(fault, model(fault.model), tmp_path)
    report_schema.check(report)
    assert report.verdict is Verdict.FAIL
    assert was_caught(fault, report), [
        (check.name, check.verdict.value, [str(finding) for finding in check.findings[:3]]) for check in report.checks
    ]


@pytest.mark.parametrize(("model_type", "tp"), CLEAN)
def test_what_is_right_passes(model_type: str, tp: int, model: Model, tmp_path: Path) -> None:
    run(plan_split(model(model_type), tmp_path / "shards", tp))
    report = verify(Request(tmp_path / "shards", against=model(model_type), workers=1))
    report_schema.check(report)
    assert [(check.name, check.verdict) for check in report.checks] == [
        (name, Verdict.PASS) for name in ("files", "weights", "layout", "forward", "backward", "generic", "self-test")
    ], report
    (forward,) = [check for check in report.checks if check.name == "forward"]
    assert forward.figures["worst_relative_error"] <= 1e-12
