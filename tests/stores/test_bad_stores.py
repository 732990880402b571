"""Stores that fail, refuse, forget or lie: one line, exit code 5, nothing half committed; or tried again, and right."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.build import tiny_checkpoint
from tests.stores import servers
from tests.stores.faulty import Answer, Proxy, proxy, refusal
from tests.stores.folders import contents, upload, use
from tpshard import api
from tpshard.cli.main import _run
from tpshard.errors import InputError, StorageError, TpshardError
from tpshard.stores import failures
from tpshard.stores import path as store_paths


@pytest.fixture
def between(running: dict[str, servers.Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, str]]:
    """S3 behind a proxy, and a new folder there."""
    monkeypatch.setattr(store_paths, "PAUSE", 0.0)
    with proxy(running["s3"].port) as told:
        server = servers.Server("s3", told.port, servers.s3_environment(told.port))
        for root in use(server, monkeypatch):
            yield told, root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model", dtype="BF16")
    return tmp_path / "model"


WEIGHTS = "model.safetensors"


def split(root: str, tmp_path: Path, policy: str) -> None:
    api.split(f"{root}/model", tmp_path / "shards", tp=3, policy=policy)


def expect_line(pattern: str, root: str, tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["split", f"{root}/model", str(tmp_path / "shards"), "--tp", "3", "--policy", policy]
    assert _run(words) == 5
    error = capsys.readouterr().err
    assert re.search(pattern, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "shards").exists()


def of_ranges(answer: Answer, path: str) -> bool:
    """Whether it is a part of the weights, after the header, which is the first."""
    first = next((v for name, v in answer.headers.items() if name.lower() == "content-range"), "bytes 0-")
    return WEIGHTS in path and answer.status == 206 and not first.startswith("bytes 0-")


def test_short_answers_are_asked_for_again(
    between: tuple[Proxy, str], model: Path, tmp_path: Path, policy: str
) -> None:
    told, root = between
    upload(model, f"{root}/model")
    turns = itertools.count()

    def short(method: str, path: str, answer: Answer) -> Answer | None:
        if of_ranges(answer, path) and next(turns) % 3 == 0:
            return Answer(206, answer.headers, answer.body[:-1])
        return None

    told.fault = short
    split(root, tmp_path, policy)
    api.split(model, tmp_path / "here", tp=3, policy=policy)
    assert contents(tmp_path / "shards") == contents(tmp_path / "here")
    assert next(turns) > 1


def test_a_server_that_fails_twice(between: tuple[Proxy, str], model: Path, tmp_path: Path, policy: str) -> None:
    told, root = between
    upload(model, f"{root}/model")
    turns = itertools.count()
    told.fault = lambda method, path, answer: refusal(500, "InternalError") if next(turns) < 2 else None
    split(root, tmp_path, policy)
    assert next(turns) > 3


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (refusal(403, "AccessDenied"), "the store denies access"),
        (refusal(403, "RequestTimeTooSkewed"), r"refuses this machine's clock \(set the clock"),
        (refusal(403, "InvalidAccessKeyId"), "refuses the credentials"),
        (refusal(400, "ExpiredToken"), "refuses the credentials"),
        (refusal(404, "NoSuchKey"), r"model\.safetensors: is not there any more"),
        (refusal(404, "NoSuchBucket"), "there is no such bucket"),
        (refusal(412, "PreconditionFailed"), r"model\.safetensors: was changed while it was being read"),
        (refusal(416, "InvalidRange"), r"model\.safetensors: the store refuses the range"),
        (refusal(301, "PermanentRedirect"), r"in another region \(set AWS_REGION"),
        (refusal(400, "Odd"), "the store failed: .*400"),
    ],
    ids=lambda value: value.body.decode().partition("<Code>")[2].partition("<")[0] if isinstance(value, Answer) else "",
)
def test_refusals_in_the_middle(
    between: tuple[Proxy, str],
    model: Path,
    tmp_path: Path,
    policy: str,
    capsys: pytest.CaptureFixture[str],
    answer: Answer,
    line: str,
) -> None:
    told, root = between
    upload(model, f"{root}/model")
    told.fault = lambda method, path, right: answer if of_ranges(right, path) else None
    expect_line(line, root, tmp_path, policy, capsys)


def test_ranges_that_stay_short(
    between: tuple[Proxy, str], model: Path, tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told, root = between
    upload(model, f"{root}/model")
    told.fault = lambda method, path, answer: (
        Answer(206, answer.headers, answer.body[:100]) if of_ranges(answer, path) else None
    )
    expect_line(
        r"model\.safetensors: the store gave 100 of \d+ bytes from \d+, 4 times", root, tmp_path, policy, capsys
    )


def test_an_object_that_is_replaced(
    between: tuple[Proxy, str],
    model: Path,
    tmp_path: Path,
    policy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After its header was read; the store itself notices, before anything is listed again."""
    monkeypatch.setattr("tpshard.checkpoint.Checkpoint.check_unchanged", lambda self: None)
    told, root = between
    upload(model, f"{root}/model")
    other = bytearray((model / WEIGHTS).read_bytes())
    other[-1] ^= 1
    path = store_paths.place(f"{root}/model/{WEIGHTS}")
    assert isinstance(path, store_paths.StorePath)
    done: list[bool] = []

    def replace(method: str, url: str, answer: Answer) -> Answer | None:
        if WEIGHTS in url and answer.status == 206 and not done:
            done.append(True)
            path.store.delete(path.key)
            path.store.create(path.key, bytes(other))
        return None

    told.fault = replace
    expect_line(r"model\.safetensors: was changed while it was being read", root, tmp_path, policy, capsys)


def test_an_object_that_is_replaced_where_ranges_do_not_tell(
    between: tuple[Proxy, str], model: Path, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, root = between
    upload(model, f"{root}/model")
    listed = itertools.count()

    def changed(method: str, url: str, answer: Answer) -> Answer | None:
        if "list-type=2" in url and next(listed):
            return Answer(answer.status, answer.headers, re.sub(rb"<ETag>.{9}", b"<ETag>&quot;000", answer.body))
        return None

    told.fault = changed
    with pytest.raises(StorageError, match="was changed while it was being read"):
        split(root, tmp_path, policy)


def test_bytes_that_are_not_those_that_were_cut(
    between: tuple[Proxy, str], model: Path, tmp_path: Path, policy: str
) -> None:
    """A full checkpoint has no digests; what split has written has."""
    told, root = between
    api.split(model, f"{root}/shards", tp=3, policy=policy)

    def damaged(method: str, path: str, answer: Answer) -> Answer | None:
        if "rank-00001" in path and answer.status == 206 and "bytes 0-" not in answer.headers.get("Content-Range", ""):
            return Answer(206, answer.headers, answer.body[:-1] + bytes([answer.body[-1] ^ 1]))
        return None

    told.fault = damaged
    with pytest.raises(InputError, match="a shard was changed or damaged"):
        api.merge(f"{root}/shards", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_write_that_fails_leaves_nothing(
    between: tuple[Proxy, str], model: Path, policy: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third object, whichever it is; and a list in parts that is not taken."""
    told, root = between
    turns = itertools.count()
    if method == "POST":
        monkeypatch.setattr("tpshard.stores.objects.part_size", lambda size: 1000)

    def fault(asked: str, path: str, answer: Answer) -> Answer | None:
        return refusal(403, "AccessDenied") if asked == method and next(turns) == 2 else None

    told.fault = fault
    with pytest.raises(StorageError, match="denies access"):
        api.split(model, f"{root}/shards", tp=3, policy=policy)
    told.fault = lambda *_: None
    assert contents(f"{root}/shards") == {}


def test_no_credentials(
    between: tuple[Proxy, str],
    tmp_path: Path,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor a server that hands them out on this machine."""
    told, root = between
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{told.port}/none")
    told.fault = lambda method, path, answer: refusal(404, "None") if "latest" in path else None
    expect_line("no credentials were found", root, tmp_path, policy, capsys)


def test_a_server_that_is_not_there(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = servers.Server("s3", 0, servers.s3_environment(servers.free_port()))
    monkeypatch.setattr("tpshard.stores.objects._RETRIES", {"max_retries": 0})
    for root in use(nobody, monkeypatch):
        expect_line("the store cannot be reached", root, tmp_path, policy, capsys)


def test_what_libraries_say_of_other_stores() -> None:
    """Words of Azure's and Google's, as their servers send them."""
    said = {
        "<Code>ContainerNotFound</Code>": "no such bucket",
        "<Code>AuthenticationFailed</Code>": "refuses the credentials",
        "<Code>AuthorizationPermissionMismatch</Code>": "denies access",
        "<Code>ServerBusy</Code>": "too busy",
        "The specified bucket does not exist.": "no such bucket",
        "Anonymous caller does not have storage.objects.list access, 401": "wants credentials",
        "Your default credentials were not found.": "no credentials",
        "Account must be specified": "no credentials",
    }
    for text, line in said.items():
        error = failures.failure("az://c/x", Exception(text))
        assert line in str(error), text
        assert isinstance(error, TpshardError)


def test_only_what_is_needed_is_read(between: tuple[Proxy, str], model: Path, tmp_path: Path, policy: str) -> None:
    told, root = between
    upload(model, f"{root}/model")
    size = (model / WEIGHTS).stat().st_size
    told.seen.clear()
    api.split(f"{root}/model", tmp_path / "shards", tp=3, policy=policy)
    assert size <= told.bytes_of(WEIGHTS) <= size + store_paths.AHEAD
    told.seen.clear()
    api.inspect(f"{root}/model")
    assert told.bytes_of(WEIGHTS) <= store_paths.AHEAD
