"""Check 1 for an engine's folder: its files against its profile, and against the manifest where there is one."""

from __future__ import annotations

from collections.abc import Callable

from tpshard.checkpoint import Checkpoint
from tpshard.engines.opening import Source
from tpshard.errors import InputError
from tpshard.verify.files import digest_findings, extra_findings, signature_notes
from tpshard.verify.report import CheckResult, Finding


def check_engine_files(
    source: Source, workers: int, progress: Callable[[int], object]
) -> tuple[CheckResult, Checkpoint | None]:
    """The check's result, and the opened checkpoint where its headers are as the profile has them.

    Raises InputError where there is nothing to check, UsageError where it is not clear whose folder it is.
    """
    try:
        checkpoint = source.open()
    except InputError as error:
        return CheckResult("files", (Finding(error.message),)), None
    manifest = checkpoint.manifest
    assert manifest is not None
    findings: list[Finding] = []
    notes: tuple[str, ...] = ()
    if manifest.recorded:
        findings += extra_findings(source.folder, manifest)
        notes = signature_notes(source.folder)
        findings += digest_findings(
            source.folder, manifest.algorithm, [*manifest.files, *manifest.carried], workers, progress
        )
    else:
        notes = ("there is no manifest: headers were compared with the engine's profile, files with no digest",)
    covered = {
        "files": len(checkpoint.files) + len(manifest.carried),
        "tensors": len(checkpoint.tensors),
        "ranks": checkpoint.ranks,
    }
    return CheckResult("files", tuple(findings), covered, notes), checkpoint
