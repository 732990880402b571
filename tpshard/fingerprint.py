"""What a run's result depends on, as one digest for each thing that may differ from another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from tpshard import __version__
from tpshard.layout import Layout
from tpshard.library import policy_as_data
from tpshard.manifest import layout_as_data
from tpshard.mesh import Mesh
from tpshard.plan import Plan
from tpshard.policy import Policy
from tpshard.roles import Role


def fingerprint(
    plan: Plan,
    policy: Policy | None,
    roles: Mapping[str, Role],
    mesh: Mesh | None,
    beside: Mapping[str, bytes],
    engine: str,
    algorithm: str,
) -> dict[str, str]:
    """Two runs with the same write the same bytes. The source's files count by size and time, not by what is in
    them."""
    layouts: dict[int, str] = {}

    def mark(layout: Layout) -> str:
        key = id(layout)  # alive as long as the plan is
        if key not in layouts:
            layouts[key] = _digest(layout_as_data(layout))
        return layouts[key]

    source, items = plan.source, plan.items
    return {
        "version": __version__,
        "source": _digest(
            [[file.name, file.size, file.identity[1]] for file in source.files],
            [[item.stored.name, item.stored.dtype, mark(item.stored.layout)] for item in items],
            list(source.carried),
        ),
        "policy": _digest(
            policy_as_data(policy) if policy else None,
            [[name, role.rule, role.gather, role.pattern] for name, role in roles.items()],
        ),
        "ranks": _digest(mesh.as_data() if mesh else None, [mark(item.want) for item in items]),
        "files": _digest(
            engine,
            [[output.name, output.rank, output.part, output.first, output.last] for output in plan.outputs],
            [[name, hashlib.sha256(content).hexdigest()] for name, content in beside.items()],
        ),
        "digest": algorithm,
    }


def _digest(*data: object) -> str:
    return hashlib.sha256(json.dumps(data, separators=(",", ":")).encode("utf-8")).hexdigest()
