"""Check 1, files: the folder against its manifest, every file, header and digest, and nothing extra."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from tpshard.checkpoint import Checkpoint, Opening
from tpshard.errors import InputError, StorageError
from tpshard.file_digest import file_digest
from tpshard.folder import MANIFEST_NAME, is_signature, read_bytes
from tpshard.manifest import CarriedRecord, FileRecord, Manifest, manifest_bytes
from tpshard.manifest_parsing import read_manifest
from tpshard.stores.path import StorePath
from tpshard.verify.report import CheckResult, Finding

MISSING = "is missing"
UNREADABLE = "its header cannot be read"
NOT_REGULAR = "is not a regular file"


def check_files(
    folder: Path, workers: int, progress: Callable[[int], object], only: Collection[int] | None = None
) -> tuple[CheckResult, Checkpoint | None]:
    """The check's result, and the opened checkpoint where its headers are as they should be.

    ``only``: the ranks whose files are looked at; who has rank 0 looks at all that belongs to no rank, too.
    Raises InputError where the folder has no manifest at all.
    """
    if not (folder / MANIFEST_NAME).exists():
        read_manifest(folder)  # says what is wrong
    try:
        opening = Opening(folder, read_manifest(folder), only)
    except InputError as error:
        return CheckResult("files", (Finding(str(error), file=MANIFEST_NAME),)), None
    findings = [*_header_findings(opening), *(extra_findings(folder, opening.manifest) if 0 in opening.only else [])]
    checkpoint = None
    if not findings:
        try:
            checkpoint = opening.checkpoint()
        except InputError as error:
            findings.append(Finding(error.message, file="config.json"))
    known = {finding.file for finding in findings}
    manifest = opening.manifest
    listed: list[FileRecord | CarriedRecord] = [*opening.records]
    listed += manifest.carried if 0 in opening.only else ()
    digests = digest_findings(folder, manifest.algorithm, listed, workers, progress)
    findings += [f for f in digests if not f.what.startswith((MISSING, UNREADABLE, NOT_REGULAR)) or f.file not in known]
    covered = {
        "files": len(opening.records) + (len(manifest.carried) if 0 in opening.only else 0),
        "tensors": len(manifest.tensors),
        "ranks": len(opening.only),
    }
    notes = signature_notes(folder) if 0 in opening.only else ()
    return CheckResult("files", tuple(findings), covered, notes), checkpoint


def _header_findings(opening: Opening) -> Iterator[Finding]:
    """Every file, then, where all could be read, every tensor of every rank."""
    sound = True
    for record in opening.records:
        try:
            opening.add_file(record)
        except InputError as error:
            sound = False
            yield Finding(error.message, file=record.name, rank=record.rank)
    if not sound:
        return
    for tensor in opening.manifest.tensors:
        for rank in opening.only:
            try:
                opening.add_tensor(tensor, rank)
            except InputError as error:
                yield Finding(error.message, tensor=tensor.name, rank=rank)
    for index, record in enumerate(opening.records):
        try:
            opening.nothing_extra(index)
        except InputError as error:
            yield Finding(error.message, file=record.name, rank=record.rank)


def extra_findings(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """What the manifest does not list, and the manifest itself where its file is not as it was written."""
    if read_bytes(folder / MANIFEST_NAME) != manifest_bytes(manifest):
        yield Finding("says the same, but not in the bytes in which it was written", file=MANIFEST_NAME)
    listed = {record.name for record in manifest.files} | {record.name for record in manifest.carried}
    for name, is_folder in _found(folder):
        if is_folder:
            yield Finding("is a link to a folder, which nobody looks into", file=name)
        elif name not in listed and name != MANIFEST_NAME and not is_signature(name):
            yield Finding("is not in the manifest", file=name)


def signature_notes(folder: Path) -> tuple[str, ...]:
    """Signatures lie beside what they sign, so no manifest can list them."""
    names = [name for name, _ in _found(folder) if is_signature(name)]
    return (f"signatures are not looked into: {', '.join(names)}",) if names else ()


def _found(folder: Path) -> Iterator[tuple[str, bool]]:
    """Everything in a folder but its subfolders, hidden files too; True where it is a link to a folder."""

    def failed(error: OSError) -> NoReturn:
        raise StorageError(f"{error.filename}: {error.strerror}") from None

    if isinstance(folder, StorePath):
        yield from ((path.relative_to(folder).as_posix(), False) for path in folder.rglob("*"))
        return
    for place, folders, files in os.walk(folder, onerror=failed):
        here = Path(place).relative_to(folder)
        yield from (((here / name).as_posix(), False) for name in sorted(files))
        folders.sort()
        yield from (((here / name).as_posix(), True) for name in folders if (Path(place) / name).is_symlink())


def digest_findings(
    folder: Path,
    algorithm: str,
    listed: Sequence[FileRecord | CarriedRecord],
    workers: int,
    progress: Callable[[int], object],
) -> list[Finding]:
    """Files that are missing or not as they were. Files are read whole, several at a time."""

    def wrong(record: FileRecord | CarriedRecord) -> str:
        try:
            if not (folder / record.name).is_file():  # a pipe would wait, a device never end
                return NOT_REGULAR if (folder / record.name).exists() else MISSING
            have = file_digest(folder / record.name, algorithm, isinstance(record, FileRecord), progress)
        except FileNotFoundError:
            return MISSING
        except InputError as error:
            return f"{UNREADABLE}: {error.message}"
        return "" if have == record.digest else f"digest is {have}, the manifest says {record.digest}"

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(wrong, listed))
    return [Finding(what, file=record.name) for record, what in zip(listed, found, strict=True) if what]


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)
