"""PyTorch's distributed checkpoints as a source: whole tensors in chunks, whatever ranks wrote them."""

from __future__ import annotations

from dataclasses import replace

from tpshard.checkpoint import Checkpoint
from tpshard.dcp import is_dcp, open_dcp
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.engines.unrecorded import unrecorded, unrecorded_tensor
from tpshard.folder import CONFIG, config_bytes
from tpshard.library import choose_policy
from tpshard.manifest import FileRecord
from tpshard.mesh import Mesh
from tpshard.roles import Role
from tpshard.torch_dist import is_torch_dist


def open_chunks(asked: Asked) -> Checkpoint:
    """Every chunk as a rank's part: of no rank that computes, so there are no roles."""
    found = open_dcp(asked.folder)
    role = Role("replicate", pattern="chunks")
    tensors = sorted(found.tensors.values(), key=lambda tensor: tensor.name)
    records = [unrecorded_tensor(t.name, t.dtype, t.layout, role) for t in tensors]
    files = [FileRecord(file.name, 0, part, file.size, "") for part, file in enumerate(found.files)]
    config = dict(asked.config or found.config)
    policy = choose_policy(asked.policy, config) if config else None
    manifest = unrecorded(READER.name, Mesh(found.ranks), policy, records, files)
    beside = {CONFIG: config_bytes(config)} if asked.config else {}
    return replace(
        found,
        config=config,
        manifest=manifest,
        tensors={record.name: replace(found.tensors[record.name], record=record) for record in records},
        carried=tuple(name for name in found.carried if name not in beside),
        beside=beside,
    )


READER = Reader(
    name="dcp",
    title="PyTorch distributed checkpoint",
    files=".metadata and __<rank>_<n>.distcp, or safetensors with DCP_SHARDING_INFO",
    description="FSDP, DTensor, torchtitan; docs/dcp.md says which part of a nested state dict is taken.",
    recognises=lambda folder: is_dcp(folder) and not is_torch_dist(folder),  # those are Megatron's
    open=open_chunks,
    whole=True,
    by_header=True,
    written_as=("dcp", "dcp-hf"),
)
