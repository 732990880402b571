"""Models on the Hub, by its own client, from a server on this machine; in a process of its own: the client asks the
environment when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.build import tiny_checkpoint
from tests.stores.folders import contents
from tests.stores.hub import hub
from tpshard import api


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "hub/org/model", files=2, dtype="BF16")
    return tmp_path / "hub"


@pytest.fixture
def endpoint(repositories: Path) -> Iterator[str]:
    with hub(repositories) as url:
        yield url


def tpshard(endpoint: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    left = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = left | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | more
    command = [sys.executable, "-W", "error", "-m", "tpshard", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_split_and_fetch(endpoint: str, repositories: Path, tmp_path: Path, policy: str) -> None:
    cut = ["--tp", "3", "--policy", policy]
    done = tpshard(endpoint, "split", "hf://org/model", str(tmp_path / "there"), *cut)
    assert done.returncode == 0, done.stderr
    api.split(repositories / "org/model", tmp_path / "here", tp=3, policy=policy)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    done = tpshard(endpoint, "fetch", "hf://org/model@main", str(tmp_path / "one"), "--rank", "1", *cut)
    assert done.returncode == 0, done.stderr
    name = "rank-00001-of-00003.safetensors"
    assert contents(tmp_path / "one")[name] == contents(tmp_path / "here")[name]


def test_what_is_not_there_or_not_for_everybody(endpoint: str, repositories: Path, tmp_path: Path, policy: str) -> None:
    cut = ["--tp", "3", "--policy", policy]
    done = tpshard(endpoint, "split", "hf://org/other", str(tmp_path / "out"), *cut)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
    assert "there is no such repository, or no access to it" in done.stderr
    done = tpshard(endpoint, "split", str(repositories / "org/model"), "hf://org/new", *cut)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "hf://org/new: the Hub is read, not written" in done.stderr
    with hub(repositories, token="hf_secret") as closed:
        done = tpshard(closed, "inspect", "hf://org/model")
        assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr
        assert "hf_secret" not in done.stderr
        assert tpshard(closed, "inspect", "hf://org/model", HF_TOKEN="hf_secret").returncode == 0
