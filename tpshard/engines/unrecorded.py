"""What a manifest would say of a folder that has none: everything but digests."""

from __future__ import annotations

from collections.abc import Iterable

from tpshard.layout import Layout
from tpshard.library import policy_as_data
from tpshard.manifest import FileRecord, Manifest, TensorRecord
from tpshard.mesh import Mesh
from tpshard.policy import Policy
from tpshard.roles import Role

ALGORITHM = "xxh3-128"  # of no digest here; there has to be one


def unrecorded_tensor(name: str, dtype: str, layout: Layout, role: Role) -> TensorRecord:
    return TensorRecord(name, dtype, layout, role, 0, 0, "", (None,) * layout.ranks)


def unrecorded(
    engine: str, mesh: Mesh, policy: Policy | None, tensors: Iterable[TensorRecord], files: Iterable[FileRecord]
) -> Manifest:
    """``policy``: None where no policy is known for the model."""
    return Manifest(
        mesh=mesh,
        algorithm=ALGORITHM,
        policy=policy.name if policy else "",
        policy_documents=policy_as_data(policy) if policy else (),
        sources=(),
        tensors=tuple(tensors),
        files=tuple(files),
        carried=(),
        engine=engine,
        recorded=False,
    )
