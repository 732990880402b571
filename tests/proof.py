"""An architecture proven from end to end: made by transformers, split by the policy that auto picks, verified against
its source, merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from tests import tiny_models
from tests.architectures import Architecture
from tests.build import load
from tpshard.conversion import Conversion, run
from tpshard.convert import plan_merge, plan_split
from tpshard.header import byte_count
from tpshard.verify.report import Report, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

CHECKS = ("files", "weights", "forward", "backward", "generic", "self-test")


@dataclass(frozen=True)
class Proof:
    """What came of one architecture at one rank count. ``size``: bytes of the whole model. Errors are relative; ``replicated`` maps the pattern of a rule
    (or of rows of biases) to the bytes that all ranks together hold of its tensors beyond one copy."""

    tp: int
    size: int
    forward: float
    backward: float
    gathers: int
    layout: str
    replicated: Mapping[str, int]


def config_of(architecture: Architecture, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(architecture.model_type, **{**architecture.sizes, **changes})


def save(architecture: Architecture, folder: Path) -> None:
    config = config_of(architecture)
    tiny_models.build(config, architecture.head or tiny_models.word_head(config)).save_pretrained(folder)


Arrays = Mapping[str, Any]


def cut_arrays(folder: Path, tp: int) -> tuple[Arrays, list[Arrays]]:
    """The checkpoint at ``source`` in a folder is split into ``shards``: its arrays and each rank's, by name."""
    run(plan_split(folder / "source", folder / "shards", tp))
    files = [folder / "source/model.safetensors", *sorted((folder / "shards").glob("rank-*.safetensors"))]
    whole, *ranks = ({name: tensor.array() for name, tensor in load(file).items()} for file in files)
    return whole, ranks


def prove(architecture: Architecture, source: Path, scratch: Path, tp: int) -> Proof:
    """Raises AssertionError where anything is not as it should be; ``source``: what ``save`` wrote."""
    conversion = plan_split(source, scratch / "shards", tp)
    assert conversion.warnings == ()
    assert conversion.policy is not None
    assert conversion.policy.name == architecture.policy
    run(conversion)
    report = verify(Request(scratch / "shards", against=source, workers=1))
    verdicts = {check.name: check.verdict for check in report.checks}
    layout = verdicts.pop("layout")
    assert layout in (Verdict.PASS, Verdict.INCONCLUSIVE), report
    assert verdicts == dict.fromkeys(CHECKS, Verdict.PASS), report
    assert report.verdict is Verdict.PASS, report
    idle = [_unreached(report, name) for name in ("forward", "generic")]
    assert not idle[0] & idle[1], "experts that no token reached"
    run(plan_merge(scratch / "shards", scratch / "merged"))
    for file in sorted(source.glob("*.safetensors")):
        assert load(scratch / "merged" / file.name) == load(file)
    forward = figures(report, "forward")
    return Proof(
        tp,
        sum(byte_count(item.stored.dtype, item.want.shape) for item in conversion.plan.items),
        forward["worst_relative_error"],
        figures(report, "backward")["worst_relative_error"],
        forward["gathers"],
        layout.name,
        replicated(conversion),
    )


def _unreached(report: Report, name: str) -> set[str]:
    """Parameters whose experts were not all reached in a check."""
    (notes,) = (check.notes for check in report.checks if check.name == name)
    return {note.partition(":")[0] for note in notes if "experts were not reached" in note}


def figures(report: Report, name: str) -> Mapping[str, Any]:
    return next(check.figures for check in report.checks if check.name == name)


def replicated(conversion: Conversion) -> dict[str, int]:
    """Bytes beyond one copy, by the rule's pattern, the largest first."""
    found: dict[str, int] = {}
    for item in conversion.plan.items:
        held = sum(shard.covered for shard in item.want.shards if shard)
        whole = byte_count(item.stored.dtype, item.want.shape)
        cells = max(1, byte_count("U8", item.want.shape))
        extra = (held - cells) * whole // cells
        if extra:
            pattern = conversion.roles[item.stored.name].pattern
            found[pattern] = found.get(pattern, 0) + extra
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))
