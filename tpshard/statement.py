"""An in-toto Statement of a shard folder, made of its manifest: what is signed to say who made these files.

https://github.com/in-toto/attestation, spec v1. No file but the manifest is read: split wrote down the digests while it
wrote the files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tpshard.errors import UsageError
from tpshard.folder import MANIFEST_NAME, read_bytes
from tpshard.manifest import VERSION
from tpshard.manifest_parsing import read_manifest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = f"urn:tpshard:shards:v{VERSION}"
ALGORITHM = "sha256"  # what in-toto's tools compare


def statement(folder: Path) -> dict[str, Any]:
    """The Statement: every file as a subject, the manifest too; as predicate what the files are. Raises InputError,
    UsageError where the files' digests are of another kind."""
    manifest = read_manifest(folder)
    if manifest.algorithm != ALGORITHM:
        what = f"{folder}: its digests are {manifest.algorithm}, a statement for signing needs {ALGORITHM}"
        raise UsageError(what, hint=f"split with --digest {ALGORITHM}")
    digests = {MANIFEST_NAME: hashlib.sha256(read_bytes(folder / MANIFEST_NAME)).hexdigest()}
    digests |= {file.name: file.digest for file in manifest.files}
    digests |= {file.name: file.digest for file in manifest.carried}
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {ALGORITHM: digest}} for name, digest in sorted(digests.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "ranks": manifest.ranks,
            "mesh": manifest.mesh.as_data(),
            "engine": manifest.engine,
            "policy": manifest.policy,
        },
    }
