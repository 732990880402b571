"""One rank alone: the files that split writes for it, without the bytes of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.build import tiny_checkpoint
from tests.stores.faulty import Proxy
from tests.stores.folders import contents, upload
from tests.stores.test_bad_stores import between
from tpshard import api
from tpshard.cli.main import _run
from tpshard.demo import make_checkpoint
from tpshard.errors import InputError, UsageError
from tpshard.header import read_header
from tpshard.stores import path as store_paths
from tpshard.stores import ranges

__all__ = ["between"]
RANKS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 MB: padded vocabulary, key-value heads that two ranks share, two files."""
    make_checkpoint(tmp_path_factory.mktemp("fetch") / "model")
    return tmp_path_factory.getbasetemp() / "fetch0/model"


def fetched(source: Path | str, folder: Path, ranks: int, **how: object) -> Path:
    """All ranks, each by itself, copied into one folder."""
    for rank in range(ranks):
        api.fetch(source, folder / f"rank{rank}", rank=rank, **({"tp": ranks} | how))  # type: ignore[arg-type]
        shutil.copytree(folder / f"rank{rank}", folder / "all", dirs_exist_ok=True)
    return folder / "all"


@pytest.mark.parametrize("digest", ["xxh3-128", "blake3"])
def test_all_ranks_together_are_what_split_writes(llama: Path, tmp_path: Path, digest: str) -> None:
    api.split(llama, tmp_path / "shards", tp=RANKS, digest=digest, max_shard_size=2_000_000)
    folder = fetched(llama, tmp_path, RANKS, digest=digest, max_shard_size=2_000_000)
    for name, data in contents(tmp_path / "shards").items():
        assert name == "tpshard.json" or contents(folder)[name] == data
    assert len(list(folder.glob("tpshard-rank-*.json"))) == RANKS
    api.join(folder)
    assert contents(folder) == contents(tmp_path / "shards")
    assert api.verify(folder, against=llama, level="weights").verdict.name == "PASS"


def test_a_grid_of_stages(llama: Path, tmp_path: Path) -> None:
    api.split(llama, tmp_path / "shards", tp=2, pp=2)
    assert contents(fetched(llama, tmp_path, 4, pp=2, tp=2)) != {}
    api.join(tmp_path / "all")
    assert contents(tmp_path / "all") == contents(tmp_path / "shards")


def test_from_a_store_no_more_than_the_rank_holds(
    between: tuple[Proxy, str], tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header and the rank's own bytes, padding apart; none of what lies between strips, where a request is to cost nothing."""
    told, root = between
    tiny_checkpoint(tmp_path / "model")
    source = upload(tmp_path / "model", f"{root}/model")
    api.split(tmp_path / "model", tmp_path / "shards", tp=3, policy=policy)
    monkeypatch.setattr(ranges, "GAP", -1)
    monkeypatch.setattr("tpshard.sources.GAP", -1)
    monkeypatch.setattr(store_paths, "AHEAD", 512)
    header = read_header(tmp_path / "model/model.safetensors").data_start
    for rank in (0, 2):
        told.seen.clear()
        api.fetch(source, tmp_path / f"r{rank}", rank=rank, tp=3, policy=policy)
        name = f"rank-{rank:05d}-of-00003.safetensors"
        assert contents(tmp_path / f"r{rank}")[name] == contents(tmp_path / "shards")[name]
        file = tmp_path / "shards" / name
        held = file.stat().st_size - read_header(file).data_start
        assert 0.99 * held <= told.bytes_of("model.safetensors") <= held + header + 512


def test_strips_are_read_with_what_is_between_them(between: tuple[Proxy, str], llama: Path, tmp_path: Path) -> None:
    told, root = between
    source = upload(llama, f"{root}/model")
    api.fetch(llama, tmp_path / "here", rank=1, tp=RANKS)
    told.seen.clear()
    api.fetch(source, tmp_path / "there", rank=1, tp=RANKS)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len([path for method, path, _ in told.seen if method == "GET" and ".safetensors" in path]) < 80


def test_into_a_store(in_s3: str, llama: Path, tmp_path: Path) -> None:
    api.fetch(llama, tmp_path / "here", rank=2, tp=RANKS)
    api.fetch(llama, f"{in_s3}/rank2", rank=2, tp=RANKS)
    assert contents(f"{in_s3}/rank2") == contents(tmp_path / "here")


def test_what_is_not_one_run_of_all_ranks_is_refused(tmp_path: Path, policy: str) -> None:
    model = tmp_path / "model"
    tiny_checkpoint(model)
    folder = fetched(model, tmp_path, 3, policy=policy)
    with pytest.raises(UsageError, match="--rank 3: the ranks are 0 to 2"):
        api.fetch(model, tmp_path / "more", rank=3, tp=3, policy=policy)

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            api.join(folder)
        assert not (folder / "tpshard.json").exists()

    record = folder / "tpshard-rank-00001-of-00003.json"
    kept = record.read_bytes()
    record.write_bytes(kept.replace(b'"rank": 1', b'"rank": 2'))
    refused("was changed after it was written")
    record.unlink()
    refused("of 3 ranks these have no record: 1 .fetch them, too")
    api.fetch(model, tmp_path / "other", rank=1, tp=3, policy=policy, digest="sha256")
    shutil.copy(tmp_path / "other" / record.name, folder)
    refused("is not of the same run as")
    record.write_bytes(kept)
    shard = folder / "rank-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused("its record says .* .copy or fetch it again")
    shard.unlink()
    refused("is not there .copy all that tpshard fetch wrote")
    data[-1] ^= 1
    shard.write_bytes(data)
    api.join(folder)
    with pytest.raises(UsageError, match="has its manifest already"):
        api.join(folder)


def test_on_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fetch", str(llama), str(tmp_path / "one"), "--tp", "2"]
    assert _run([*words, "--rank", "0"]) == 0
    out = capsys.readouterr().out
    assert "rank 0 of 2: 57 tensors, 11.2 MB of 22.4 MB taken; 1 file, 11.2 MB written, policy llama" in out
    assert _run(["join", str(tmp_path / "one")]) == 3
    assert "of 2 ranks these have no record: 1" in capsys.readouterr().err
    assert _run([*words, "--rank", "1"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
