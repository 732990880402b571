"""``verify --level files``: whatever is added, removed or changed in a shard folder, it is seen, and nothing else is.

The judge is a walk through the folder that knows nothing of manifests.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.build import POLICY, policy_file, save, tensor, tiny_checkpoint
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.verify.report import CheckResult, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

SIGNATURES = ("model.sig", "release.sigstore.json", "build.intoto.jsonl")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, config, tokenizer, a file in a folder in a folder."""
    scratch = tmp_path_factory.mktemp("tampered")
    source = scratch / "source"
    (source / "a/b").mkdir(parents=True)
    save(source / "model.safetensors", {"up.weight": tensor("F32", (4, 6)), "norm.weight": tensor("F32", (6,))})
    (source / "config.json").write_text('{"model_type": "x"}')
    (source / "tokenizer.json").write_text("{}")
    (source / "a/b/deep.txt").write_text("deep")
    policy = policy_file(scratch, "name: x\nrules: {up: column, norm: replicate}\n")
    run(plan_split(source, scratch / "shards", 2, policy))
    return scratch / "shards"


def files_check(folder: Path) -> CheckResult:
    return verify(Request(folder, level="files", workers=1)).checks[0]


def state(folder: Path) -> dict[str, object]:
    """Every name below a folder but plain subfolders, with what it is and holds."""
    found: dict[str, object] = {}
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            found.update({f"{entry.name}/{name}": what for name, what in state(Path(entry.path)).items()})
        elif entry.is_file():
            found[entry.name] = Path(entry.path).read_bytes()
        else:
            found[entry.name] = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    return found


# ---------------------------------------------------------------------------------------------- tampering


def a_file(folder: Path, chance: random.Random) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return chance.choice(files) if files else folder / "none"


def a_new_name(folder: Path, chance: random.Random) -> Path:
    place = chance.choice(["", "a/", "a/b/", "new/", ".hidden/"])
    name = chance.choice(["x", ".x", "rank-00002-of-00003.safetensors", "model.safetensors", "CONFIG.JSON", "x\n\x1b[1m",
                          os.fsdecode(b"\xff"), "a/model.sig", "tpshard.json.bak", ".gitattributes", "x.sig.txt"])  # fmt: skip
    path = folder / (place + name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def flip(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    raw = bytearray(path.read_bytes() if path.is_file() else b"")
    if raw:
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)


def append(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.write_bytes((path.read_bytes() if path.is_file() else b"") + chance.choice([b"\n", b" ", b"\0", b"x"]))


def truncate(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    if path.is_file():
        path.write_bytes(path.read_bytes()[: -chance.randint(1, 9)])


def remove(folder: Path, chance: random.Random) -> None:
    a_file(folder, chance).unlink(missing_ok=True)


def add(folder: Path, chance: random.Random) -> None:
    path = a_new_name(folder, chance)
    if not path.exists():
        path.write_bytes(b"" if chance.random() < 0.5 else b"new")


def rename(folder: Path, chance: random.Random) -> None:
    path, target = a_file(folder, chance), a_new_name(folder, chance)
    if path.is_file() and not target.exists():
        path.rename(target)


def swap(folder: Path, chance: random.Random) -> None:
    one, other = a_file(folder, chance), a_file(folder, chance)
    if one.is_file() and other.is_file():
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


def link(folder: Path, chance: random.Random) -> None:
    """To a folder, to a file, to nothing."""
    path = a_new_name(folder, chance)
    if not os.path.lexists(path):
        path.symlink_to(chance.choice([folder / "a", folder / "config.json", folder / "nothing"]))


def pipe(folder: Path, chance: random.Random) -> None:
    """In place of a file, or as a new one: whoever opens it waits for ever."""
    path = a_file(folder, chance) if chance.random() < 0.5 else a_new_name(folder, chance)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def turn_into_folder(folder: Path, chance: random.Random) -> None:
    path = a_file(folder, chance)
    path.unlink(missing_ok=True)
    path.mkdir()


def move_folder(folder: Path, chance: random.Random) -> None:
    """Out of the way, and a link to it in its place."""
    if (folder / "a").is_dir() and not (folder / "a").is_symlink():
        target = Path(tempfile.mkdtemp(dir=folder.parent)) / "a"
        (folder / "a").rename(target)
        (folder / "a").symlink_to(target)


def empty_folder(folder: Path, chance: random.Random) -> None:
    (folder / "a" / "empty").mkdir(exist_ok=True, parents=True)


def sign(folder: Path, chance: random.Random) -> None:
    (folder / chance.choice(SIGNATURES)).write_text("signature")


TAMPERING: list[Callable[[Path, random.Random], None]] = [
    flip, append, truncate, remove, add, rename, swap, link, pipe, turn_into_folder, move_folder, empty_folder, sign,
]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(TAMPERING), st.integers(0, 2**32)), min_size=1, max_size=3))
def test_any_change_is_seen(shards: Path, changes: list[tuple[Callable[[Path, random.Random], None], int]]) -> None:
    folder = shards.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shards, folder)
    before = state(folder)
    for change, seed in changes:
        try:
            change(folder, random.Random(seed))
        except (FileExistsError, NotADirectoryError, FileNotFoundError):
            continue  # an earlier change was in the way
    after = {name: what for name, what in state(folder).items() if name not in SIGNATURES}
    if not os.path.lexists(folder / "tpshard.json"):
        return  # no shard folder any more: an error, tested elsewhere
    assert (files_check(folder).verdict is Verdict.PASS) == (after == before)


@pytest.mark.parametrize("change", TAMPERING, ids=lambda change: change.__name__)
def test_each_change_alone(change: Callable[[Path, random.Random], None], shards: Path) -> None:
    """So that the property above does not rest on luck: what is found names the place."""
    folder = shards.parent / f"alone-{change.__name__}"
    shutil.copytree(shards, folder)
    before, chance = state(folder), random.Random(3)
    change(folder, chance)
    found = files_check(folder)
    changed = {name for name in before.keys() | state(folder) if before.get(name) != state(folder).get(name)}
    if change in (empty_folder, sign):
        assert found.verdict is Verdict.PASS
        return
    assert found.verdict is Verdict.FAIL
    assert any(str(finding.file) in name for name in changed for finding in found.findings)


def test_signatures_are_told_and_not_carried(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source")
    (tmp_path / "source/model.sig").write_text("of the source")
    run(plan_split(tmp_path / "source", tmp_path / "shards", 3, policy_file(tmp_path, POLICY)))
    assert not (tmp_path / "shards/model.sig").exists()
    for name in SIGNATURES:
        (tmp_path / "shards" / name).write_text("of the shards")
    check = files_check(tmp_path / "shards")
    assert check.verdict is Verdict.PASS
    assert check.notes == ("signatures are not looked into: build.intoto.jsonl, model.sig, release.sigstore.json",)
    run(plan_merge(tmp_path / "shards", tmp_path / "merged"))
    assert not any((tmp_path / "merged" / name).exists() for name in SIGNATURES)
