"""Checkpoints in S3, Azure and Google's store, in real servers on this machine: the bytes are those of a local run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build import tiny_checkpoint
from tests.stores.folders import contents, upload
from tpshard import api
from tpshard.cli.main import _run
from tpshard.errors import InputError, UsageError
from tpshard.frames import Frame
from tpshard.outputs import Piece
from tpshard.stores.path import StorePath, place
from tpshard.stores.writing import MARK, StoreOutput, StoreStaging

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model", files=2, dtype="BF16")
    return tmp_path / "model"


def test_split_verify_reshard_and_merge_as_on_a_disk(root: str, model: Path, tmp_path: Path, policy: str) -> None:
    source = upload(model, f"{root}/model")
    api.split(model, tmp_path / "four", tp=3, policy=policy)
    api.split(source, tmp_path / "from", tp=3, policy=policy)
    assert contents(tmp_path / "from") == contents(tmp_path / "four")
    api.split(source, f"{root}/three", tp=3, policy=policy)
    assert contents(f"{root}/three") == contents(tmp_path / "four")
    report = api.verify(f"{root}/three", against=source, level="weights")
    assert report.verdict.name == "PASS"
    api.reshard(f"{root}/three", f"{root}/six", tp=6)
    api.reshard(tmp_path / "four", tmp_path / "two", tp=6)
    assert contents(f"{root}/six") == contents(tmp_path / "two")
    api.merge(f"{root}/six", f"{root}/again")
    assert contents(f"{root}/again") == contents(model)


def test_nothing_is_left_after_a_failure(root: str, model: Path, policy: str) -> None:
    def fail(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.split(model, f"{root}/shards", tp=3, policy=policy, progress=fail)
    assert contents(f"{root}/shards") == {}
    api.split(model, f"{root}/shards", tp=3, policy=policy)
    assert MARK not in contents(f"{root}/shards")


def test_a_failure_after_the_first_files_takes_them_back(
    root: str, model: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json is carried after all shards are there."""

    def cannot(*_: object) -> object:
        assert any(name.startswith("rank-") for name in contents(f"{root}/shards"))
        raise InputError("config.json cannot be read")

    monkeypatch.setattr("tpshard.carrying.carry", cannot)
    with pytest.raises(InputError):
        api.split(model, f"{root}/shards", tp=3, policy=policy)
    assert contents(f"{root}/shards") == {}


def test_a_folder_in_use_is_refused(root: str, model: Path, policy: str) -> None:
    upload(model, f"{root}/shards")
    before = contents(f"{root}/shards")
    with pytest.raises(UsageError, match="exists and is not empty"):
        api.split(model, f"{root}/shards", tp=3, policy=policy)
    assert contents(f"{root}/shards") == before


def test_two_runs_into_one_folder(in_s3: str, model: Path, policy: str) -> None:
    """The second comes while the first is at work."""
    seen: list[str] = []

    def second(count: int) -> None:
        if not seen:
            with pytest.raises(UsageError) as refused:
                api.split(model, f"{in_s3}/shards", tp=3, policy=policy)
            seen.append(str(refused.value))

    api.split(model, f"{in_s3}/shards", tp=3, policy=policy, progress=second)
    assert "not empty" in seen[0]
    assert api.verify(f"{in_s3}/shards", level="files").verdict.name == "PASS"


def test_two_runs_that_begin_together(in_s3: str, model: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has seen the other when it looked into the folder: the mark decides."""
    mark = place(f"{in_s3}/shards/{MARK}")
    assert isinstance(mark, StorePath)
    monkeypatch.setattr("tpshard.conversion.check_target", lambda *_: mark.store.create(mark.key, b"another"))
    with pytest.raises(UsageError, match=r"another run is writing there \(if none is running, delete s3://"):
        api.split(model, f"{in_s3}/shards", tp=3, policy=policy)
    assert contents(f"{in_s3}/shards") == {MARK: b"another"}


def test_who_comes_first_keeps_the_folder(in_s3: str, model: Path, policy: str) -> None:
    """Somebody puts a manifest there who knows nothing of marks."""
    mine = place(f"{in_s3}/shards/tpshard.json")
    assert isinstance(mine, StorePath)

    def other(count: int) -> None:
        mine.store.create(mine.key, b"another's")

    with pytest.raises(UsageError, match="came into use while this ran"):
        api.split(model, f"{in_s3}/shards", tp=3, policy=policy, progress=other)
    assert contents(f"{in_s3}/shards") == {"tpshard.json": b"another's"}


def test_an_independent_client_reads_what_was_written(in_s3: str, model: Path, tmp_path: Path, policy: str) -> None:
    import boto3

    api.split(model, tmp_path / "here", tp=3, policy=policy)
    api.split(model, f"{in_s3}/there", tp=3, policy=policy)
    bucket, _, prefix = in_s3.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/there/")["Contents"]
    found = {o["Key"]: client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in listed}
    client.close()
    assert found == {f"{prefix}/there/{name}": data for name, data in contents(tmp_path / "here").items()}


def test_an_object_of_many_parts(in_s3: str, model: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are 8 MiB; with those of 5 MiB, the least that S3 takes, 6 MiB are two."""
    from tpshard.stores import objects

    monkeypatch.setattr(objects, "part_size", lambda size: 5 * 2**20)
    whole = os.urandom(6 * 2**20)
    path = place(f"{in_s3}/large")
    assert isinstance(path, StorePath)
    writer = path.store.writer(path.key, len(whole), 2)
    room = bytearray(100_000)
    for begin in range(0, len(whole), len(room)):
        part = whole[begin : begin + len(room)]
        room[: len(part)] = part
        writer.write(memoryview(room)[: len(part)])  # the same room each time: it has to be copied
    writer.finish()
    assert path.read_bytes() == whole
    known = path.known()
    assert known is not None
    assert known.version.rstrip('"').endswith("-2")


def test_pieces_that_come_in_any_order(in_s3: str) -> None:
    """Head, ten bytes, three zeros and five bytes; a tensor without cells at their end; two zeros."""
    target = place(f"{in_s3}/ordered")
    assert isinstance(target, StorePath)
    want = b"head" + b"0123456789" + bytes(3) + b"abcde" + bytes(2)
    pieces = [Piece(24, b"", 2), Piece(17, b"abcde", 3), Piece(22, b""), Piece(9, b"56789"), Piece(4, b"01234")]
    with StoreStaging(target, 1) as staging:
        output = StoreOutput(staging, "file", hashlib.sha256())
        output.begin(Frame(((0, b"head"),), (4,), 24))
        for piece in pieces:
            output.write([piece])
        assert output.finish() == (24, hashlib.sha256(want).hexdigest())
        staging.commit()
    assert (target / "file").read_bytes() == want


def test_other_files_than_safetensors(in_s3: str, tmp_path: Path, source: Path, policy: str) -> None:
    """What cannot be written front to back waits in a local file; PyTorch's own are not read from a store."""
    api.split(source, tmp_path / "here", tp=3, policy=policy, engine="dcp")
    api.split(source, f"{in_s3}/there", tp=3, policy=policy, engine="dcp")
    assert contents(f"{in_s3}/there") == contents(tmp_path / "here")


def test_words_on_the_command_line(
    in_s3: str, model: Path, policy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = upload(model, f"{in_s3}/model")
    assert _run(["inspect", source]) == 0
    assert "full checkpoint" in capsys.readouterr().out
    assert _run(["policy", "check", policy, source, "--tp", "3"]) == 0
    capsys.readouterr()
    cases = [
        (["split", f"{in_s3}/none", "out", "--tp", "2"], 3, f"{in_s3}/none: is not there"),
        (["split", "s3a://x/y", "out", "--tp", "2"], 2, "no store is called 's3a' (stores: s3, az, gs, hf)"),
        (["split", "s3://", "out", "--tp", "2"], 2, "is no place in a store (give s3://bucket/folder)"),
        (["split", "s3://none/model", "out", "--tp", "2"], 5, "there is no such bucket"),
        (["split", source, f"{source}/inside", "--tp", "2", "--policy", policy], 2, "lies inside the source"),
        (["join", source], 2, "is in a store"),
    ]
    for words, code, line in cases:
        assert _run(words) == code, words
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1


def test_a_checkpoint_in_the_bucket_itself(in_s3: str, model: Path, tmp_path: Path, policy: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="one-model")
    client.close()
    upload(model, "s3://one-model")
    api.split("s3://one-model", tmp_path / "there", tp=3, policy=policy)
    api.split(model, tmp_path / "here", tp=3, policy=policy)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_named_file_and_what_is_beside_it(in_s3: str, model: Path) -> None:
    path = place(upload(model, f"{in_s3}/model") + "/config.json")
    assert (path.is_file(), path.is_dir(), path.exists()) == (True, False, True)
    assert (path.parent / "tokenizer.json").is_file()
    assert [p.name for p in path.parent.iterdir()] == sorted(p.name for p in model.iterdir())
    assert [p.name for p in path.parent.glob("*.json")] == sorted(p.name for p in model.glob("*.json"))
    assert {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*.json")} == {
        p.relative_to(model).as_posix() for p in model.rglob("*.json")
    }
    assert path.stat().st_size == (model / "config.json").stat().st_size
    with path.open("rb") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == (model / "config.json").read_bytes()[-3:]
    with pytest.raises(UsageError, match="copy it here first"):
        os.stat(path)
    with pytest.raises(FileNotFoundError):
        (path.parent / "none").stat()


def test_nothing_of_stores_is_imported_for_local_paths(model: Path, tmp_path: Path, policy: str) -> None:
    script = (
        "import sys; from tpshard import api; api.split(*sys.argv[1:3], tp=3, policy=sys.argv[3]); "
        "sys.exit(str({'obstore', 'fsspec', 'gcsfs', 'huggingface_hub', 'aiohttp'} & set(sys.modules) or ''))"
    )
    command = [sys.executable, "-c", script, str(model), str(tmp_path / "shards"), policy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
@pytest.mark.parametrize("kind", ["tensorflow/ckpt", "tensorflow/saved", "model.keras", "model.weights.h5"])
def test_keras_and_tensorflow_are_read(in_s3: str, tmp_path: Path, kind: str) -> None:
    here = DATA / kind
    if "keras" in kind or "h5" in kind:
        here = tmp_path / "here"
        here.mkdir()
        save_keras(here / kind)
    there = upload(here, f"{in_s3}/there")
    own, theirs = api.inspect(here), api.inspect(there)
    assert {name: (t.dtype, t.shape, t.places) for name, t in theirs.tensors.items()} == {
        name: (t.dtype, t.shape, t.places) for name, t in own.tensors.items()
    }


def save_keras(path: Path) -> None:
    from tests.keras_models import two_lstms

    model = two_lstms(8, 12)
    if path.suffix == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
