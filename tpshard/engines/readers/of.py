"""The readers by name, and which of them a folder is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tpshard.engines.readers import dcp, deepspeed, deepspeed_inference, deepspeed_universal, nanotron
from tpshard.engines.readers.kind import Reader

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        dcp.READER,
        deepspeed.READER,
        deepspeed_inference.READER,
        deepspeed_universal.READER,
        nanotron.READER,
    )
}


def readers_for(folder: Path) -> list[Reader]:
    """Those that find their files in a folder."""
    return [reader for reader in READERS.values() if reader.recognises(folder)]
