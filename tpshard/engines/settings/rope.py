"""How config.json says that positions turn: as transformers 5 writes it, and as 4 did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Rope(NamedTuple):
    """``scaling``: None where positions turn at plain speeds."""

    theta: float
    scaling: Mapping[str, Any] | None


def rope_of(config: Mapping[str, Any]) -> Rope:
    """What a config.json says.

    >>> rope_of({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}).theta
    500000.0
    """
    table = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = table.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = table.pop("type", None)
    kind = table.pop("rope_type", kind) or "default"
    return Rope(theta, None if kind == "default" else {"rope_type": kind, **table})


def rope_keys(rope: Rope) -> dict[str, Any]:
    """As either of transformers' versions reads it."""
    scaling = {"rope_scaling": dict(rope.scaling)} if rope.scaling else {}
    return {"rope_theta": rope.theta, **scaling}
