"""Opening a full checkpoint: Hugging Face's, or an engine's."""

from __future__ import annotations

from dataclasses import replace

from tpshard.checkpoint import Checkpoint, open_full
from tpshard.engines.finding import recognised, source_called
from tpshard.engines.opening import Source
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.errors import UsageError
from tpshard.folder import CONFIG, config_bytes


def open_whole(source: Source, policy: str = "auto") -> Checkpoint:
    """A full checkpoint: Hugging Face's, or one of an engine that keeps tensors whole."""
    found = source_called(source.engine) if source.engine else recognised(source.folder)
    if isinstance(found, Reader) and found.whole:
        return found.open(Asked(source.folder, source.config, policy))
    if found is not None and (source.engine or isinstance(found, Reader)):
        what = f"{source.folder}: a folder of {found.title} is of ranks already"
        raise UsageError(what, hint="tpshard reshard cuts it for other ranks, tpshard merge joins it")
    checkpoint = open_full(source.folder)
    if source.config is None:
        return checkpoint
    beside = {CONFIG: config_bytes(source.config)}
    carried = tuple(name for name in checkpoint.carried if name != CONFIG)
    return replace(checkpoint, config=source.config, beside=beside, carried=carried)
