"""The sessions in the docs are run, and what they print is what the docs show.

A fenced block marked ``console`` is a session: lines that begin with ``$ `` are commands, the lines after each what it
prints. All sessions of a page run in one scratch folder, in order; blocks marked with a language and a file's name are
files in it. ``python -m tests.sessions`` runs the sessions and writes what they print into the pages.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "tutorial",
            "verify",
            "any-model",
            "grid",
            "quantised",
            "lora",
            "megatron-to-vllm",
            "keras",
            "many",
            "stores",
            "reliability",
        )
    ),
]
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```\w+ ([\w.-]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What differs from run to run and from machine to machine: times, rates, rounding errors and which layer has the
# largest, scratch folders.
VARYING = [
    (re.compile(r"^    .* relative error$", re.MULTILINE), "    # head"),
    (re.compile(r"^    .*  \d\.\de-\d+, tolerance 1e-10$", re.MULTILINE), "    # row"),
    (re.compile(r"^    .*  0\.0e\+00, tolerance 1e-10$", re.MULTILINE), "    # row"),
    (re.compile(r" \([\d,]+\.\d s\)$", re.MULTILINE), ""),  # of a slow check
    (re.compile(r"\d+\.\d+ s\b"), "# s"),
    (re.compile(r"\(\d+\.\d [kMG]B/s\)"), "(# MB/s)"),
    (re.compile(r"\d(\.\d+)?e[+-]\d+"), "#e#"),
    (re.compile(r"/tmp/[A-Za-z0-9_/.-]*"), "/tmp/#"),
]


@dataclass(frozen=True)
class Step:
    command: str
    output: str


def steps(block: str) -> list[Step]:
    found: list[Step] = []
    for chunk in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = chunk.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command += "\n" + more
        found.append(Step(command, output.rstrip("\n")))
    return found


@contextlib.contextmanager
def surroundings(page: Path) -> Iterator[dict[str, str]]:
    """What a page takes for granted, as environment: stores with the demo's checkpoint in them."""
    if page.name != "stores.md":
        yield {}
        return
    from tests.stores.for_docs import stores

    with stores() as environment:
        yield environment


def run(step: Step, folder: Path, more: Mapping[str, str] = {}) -> str:
    """What a command prints, both streams, and its exit code where it is not 0."""
    here = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{here}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "COLUMNS": "110", **more}
    done = subprocess.run(
        ["bash", "-c", step.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    code = f"\n(exit code {done.returncode})" if done.returncode else ""
    return done.stdout.rstrip("\n") + code


def normal(text: str) -> str:
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    return text


def blocks(page: Path) -> Iterator[re.Match[str]]:
    yield from BLOCK.finditer(page.read_text("utf-8"))


def write_files(page: Path, folder: Path) -> None:
    for name, text in FILE.findall(page.read_text("utf-8")):
        (folder / name).write_text(text, "utf-8")


def refresh(page: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tpshard-docs-") as scratch, surroundings(page) as more:
        write_files(page, Path(scratch))

        def again(match: re.Match[str]) -> str:
            lines = []
            for step in steps(match[0]):
                output = run(step, Path(scratch), more)
                lines.append(f"$ {step.command}\n" + (f"{output}\n" if output else ""))
            return "".join(lines)

        page.write_text(BLOCK.sub(again, page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    for page in PAGES:
        refresh(page)
