"""Where the report of verify goes beside the terminal: a JUnit file, and the step summary of GitHub Actions."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tpshard.cli.junit import error_xml, report_xml
from tpshard.cli.markdown import report_markdown
from tpshard.errors import StorageError, UsageError
from tpshard.staging import storage_errors
from tpshard.verify.report import Report

SUMMARY = "GITHUB_STEP_SUMMARY"


@contextlib.contextmanager
def junit_file(path: Path | None, folder: Path) -> Iterator[Callable[[Report], object]]:
    """A function that writes the report on ``folder`` to ``path``, whole or not at all; None: nowhere.

    Raises at once where the file cannot be written, since the checks may take hours. Where they raise, the file says
    so: one of an earlier run must not pass for this one's.
    """
    if path is None:
        yield lambda report: None
        return
    place = _place(path, folder)
    staged = place.with_name(f".{place.name[:40]}.tpshard-{secrets.token_hex(4)}")
    with storage_errors(path):
        staged.touch(exist_ok=False)
    try:
        yield lambda report: _publish(report_xml(folder, report), staged, path, place)
    except BaseException as error:
        with contextlib.suppress(StorageError):
            _publish(error_xml(folder, error), staged, path, place)
        raise
    finally:
        staged.unlink(missing_ok=True)


def _place(path: Path, folder: Path) -> Path:
    """The file itself, links followed. Raises UsageError, StorageError."""
    with storage_errors(path):
        place = Path(os.path.realpath(path))
        if Path(os.path.realpath(folder)) in place.parents:
            raise UsageError(f"{path}: lies inside {folder}", hint="give a file elsewhere: DST has to stay as it is")
        if not place.parent.is_dir():
            raise StorageError(f"{path}: {path.parent} is not a folder", hint="make it first")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(place.lstat().st_mode):  # a circle of links is still a link
                raise StorageError(f"{path}: is not a regular file", hint="give the name of a file")
    return place


def _publish(text: str, staged: Path, path: Path, place: Path) -> None:
    with storage_errors(path):
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(place)


def append_summary(folder: Path, report: Report) -> list[str]:
    """Append the report to the step summary where there is one. What prevents that is a warning: the verdict stands."""
    name = os.environ.get(SUMMARY)
    if not name:
        return []
    try:
        with open(name, "a", encoding="utf-8") as file:
            file.write(f"\n{report_markdown(folder, report)}")
    except OSError as error:
        return [f"{name}: {error.strerror or error}; the step summary ({SUMMARY}) was not written"]
    return []
