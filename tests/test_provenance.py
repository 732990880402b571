"""Signing a shard folder: the statement against hashlib, and by the tools of in-toto and model-signing where a Python has
them (``TPSHARD_SIGNING_PYTHON``, or this one)."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build import POLICY, policy_file, tiny_checkpoint
from tests.tampering import Folder
from tpshard import api
from tpshard.cli.main import _run
from tpshard.errors import InputError, UsageError
from tpshard.verify.report import Verdict

SIGNING = Path(__file__).parent / "signing.py"
PYTHON = os.environ.get("TPSHARD_SIGNING_PYTHON", sys.executable)


@functools.cache
def tools_are_there() -> bool:
    return subprocess.run([PYTHON, "-c", "import model_signing"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "source")
    policy = policy_file(tmp_path, POLICY)
    api.split(tmp_path / "source", tmp_path / "shards", tp=3, policy=policy, digest="sha256")
    return tmp_path / "shards"


def sums(folder: Path) -> dict[str, str]:
    """Every file's SHA-256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_statement_has_every_file(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["statement", str(shards)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == api.statement(shards)
    assert {subject["name"]: subject["digest"]["sha256"] for subject in said["subject"]} == sums(shards)
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicate"] == {"ranks": 3, "mesh": {"pp": 1, "ep": 1, "tp": 3}, "engine": "", "policy": "tiny"}
    api.reshard(shards, tmp_path / "six", tp=6)
    again = api.statement(tmp_path / "six")
    assert again["predicate"]["ranks"] == 6
    assert {subject["name"]: subject["digest"]["sha256"] for subject in again["subject"]} == sums(tmp_path / "six")


def test_what_cannot_be_stated(shards: Path, tmp_path: Path) -> None:
    api.split(tmp_path / "source", tmp_path / "fast", tp=3, policy=str(tmp_path / "tiny.yaml"))
    with pytest.raises(UsageError, match=r"digests are xxh3-128-tree, .* needs sha256 \(split with --digest sha256\)"):
        api.statement(tmp_path / "fast")
    Folder(shards).edit(lambda manifest: manifest.update(ranks=2))
    with pytest.raises(InputError, match="was changed after it was written"):
        api.statement(shards)


def by_tools(*words: str) -> int:
    done = subprocess.run([PYTHON, *words], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


def test_in_toto_reads_signs_and_checks_it(shards: Path, tmp_path: Path) -> None:
    if not tools_are_there():
        pytest.skip("model-signing is not installed")
    (tmp_path / "statement.json").write_text(json.dumps(api.statement(shards)))
    words = (str(SIGNING), "statement", str(tmp_path / "statement.json"), str(shards))
    assert by_tools(*words) == 0
    (shards / "config.json").write_text("{}")
    assert by_tools(*words) == 1


def test_model_signing_signs_and_checks_the_folder(shards: Path, tmp_path: Path) -> None:
    """As it is, the signature beside the manifest. What was then changed, both see."""
    if not tools_are_there():
        pytest.skip("model-signing is not installed")
    assert by_tools(str(SIGNING), "keys", str(tmp_path)) == 0
    signature = shards / "model.sig"
    common = (str(shards), "--signature", str(signature))
    sign = ("-m", "model_signing", "sign", "key", *common, "--private_key", str(tmp_path / "key"))
    check = ("-m", "model_signing", "verify", "key", *common, "--public_key", str(tmp_path / "key.pub"))
    before = sums(shards)
    assert by_tools(*sign) == 0
    payload = json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))
    assert {item["name"]: item["digest"] for item in payload["predicate"]["resources"]} == before
    assert (by_tools(*check), api.verify(shards, level="files").verdict) == (0, Verdict.PASS)
    for change in (
        lambda: (shards / "added.txt").write_text("x"),
        lambda: (shards / "added.txt").unlink() or (shards / "tokenizer.json").write_text("{ }"),
        lambda: (shards / "tokenizer.json").unlink(),
    ):
        change()
        assert (by_tools(*check), api.verify(shards, level="files").verdict) == (1, Verdict.FAIL)
