"""Split, merge and reshard in several processes, for real: the same bytes as from one, and the same end for all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.build import POLICY, tiny_checkpoint, tree
from tests.tampering import Folder
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.demo import make_checkpoint
from tpshard.errors import StorageError, UsageError
from tpshard.journal import Portion
from tpshard.launch import Launch
from tpshard.manifest import FileRecord
from tpshard.meeting import LostError, gather, join
from tpshard.plan import Plan
from tpshard.share import Share
from tpshard.shares import deal, output_sizes
from tpshard.staging import Shared

SWEEP = pytest.mark.sweep
ROOT = Path(__file__).parent.parent
SPLIT = ["split", "source", "target", "--tp", "3", "--policy", "tiny.yaml"]
PARTS = ["--max-shard-size", "40000"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# A process that dies when it has recorded so many portions, or begun so many files.
DYING = """
import os, signal, sys
from tpshard.cli.main import main
from tpshard.staging import Shared
from tpshard import crew
rank, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
number = getattr(signal, sys.argv.pop(1))
if int(os.environ["RANK"]) == rank:
    def create(self, name, buffering=-1):
        global at
        at -= 1
        if at == 0:
            os.kill(os.getpid(), number)
        return original(self, name, buffering)
    original, Shared.create = Shared.create, create
    signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "source")
    (tmp_path / "tiny.yaml").write_text(POLICY)
    return tmp_path


def alone(folder: Path, words: Sequence[str]) -> dict[str, bytes]:
    """What one process writes."""
    command = [sys.executable, "-m", "tpshard", *words[:2], "alone", *words[3:]]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = tree(folder / "alone")
    shutil.rmtree(folder / "alone")
    return found


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(rank: int, size: int, **more: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), **more}


def start(
    folder: Path,
    words: Sequence[str],
    variables: Sequence[Mapping[str, str]],
    script: Sequence[str] = ("-m", "tpshard"),
) -> list[tuple[int, str, str]]:
    """A process for each set of variables: exit code, output and errors."""
    processes = [
        subprocess.Popen(
            [sys.executable, *script, *words],
            cwd=folder,
            env=environment(**own),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in variables
    ]
    ended = [process.communicate(timeout=100) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def nothing_left(folder: Path) -> bool:
    return not list(folder.glob(".*"))


# ---------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("parts", [pytest.param([], marks=SWEEP), PARTS], ids=["one part", "parts"])
def test_torchrun(parts: list[str], folder: Path) -> None:
    """4 processes with 3 files, where one has nothing to do, or 12."""
    wanted = alone(folder, SPLIT + parts)
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "4", "-m", "tpshard", *SPLIT, *parts, "--json"]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["written"]["files"]) == (12 if parts else 3)  # one process speaks, for all
    assert tree(folder / "target") == wanted
    assert nothing_left(folder)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_mpirun(folder: Path) -> None:
    wanted = alone(folder, SPLIT + PARTS)
    options = ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    command = ["mpirun", *options, "-np", "2", sys.executable, "-m", "tpshard", *SPLIT, *PARTS]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("split source -> target") == 1
    assert tree(folder / "target") == wanted


def test_srun_and_horovodrun(folder: Path) -> None:
    """By the variables that they set; neither says where to meet, and it is not needed."""
    run(plan_split(folder / "source", folder / "shards", 3, str(folder / "tiny.yaml")))
    srun = [
        {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
         "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0"}
        for rank in range(2)
    ]  # fmt: skip
    horovod = [
        {"HOROVOD_RANK": str(rank), "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": str(rank), "HOROVOD_LOCAL_SIZE": "2",
         "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "1"}
        for rank in range(2)
    ]  # fmt: skip
    for variables, words in (
        (srun, ["merge", "shards", "merged", "--max-shard-size", "100000"]),
        (horovod, ["reshard", "shards", "one", "--tp", "1"]),
    ):
        wanted = alone(folder, words)
        ended = start(folder, words, variables)
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert ended[1][1:] == ("", "")
        assert tree(folder / words[2]) == wanted


@pytest.mark.parametrize("engine", ["dcp", pytest.param("megatron", marks=SWEEP), pytest.param("vllm", marks=SWEEP)])
def test_engines_files(engine: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    words = ["split", "model", engine, "--tp", "2", "--engine", engine]
    wanted = alone(tmp_path, words)
    ended = start(tmp_path, words, [torchrun(rank, 2) for rank in range(2)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert tree(tmp_path / engine) == wanted


# ---------------------------------------------------------------------------------------------- who writes what


def plan_of(folder: Path, **options: Any) -> Plan:
    from tpshard.conversion import Options

    return plan_split(folder / "source", folder / "target", 3, str(folder / "tiny.yaml"), Options(**options)).plan


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("limit", [20_000, 40_000, None])
def test_every_file_and_every_whole_has_one_process(count: int, limit: int | None, folder: Path) -> None:
    plan = plan_of(folder, max_shard_size=limit)
    lots = deal(plan, [], count)
    assert sorted(name for names, _ in lots for name in names) == sorted(output.name for output in plan.outputs)
    assert sorted(item for _, wholes in lots for item in wholes) == list(range(len(plan.items)))
    place = {output.name: number for number, output in enumerate(plan.outputs)}
    order = [place[name] for names, _ in lots for name in sorted(names, key=place.__getitem__)]
    assert order == sorted(order)  # each has files that follow one another
    sizes = output_sizes(plan)
    loads = [sum(sizes[name] for name in names) for names, _ in lots]
    assert max(loads) <= sum(sizes.values()) / count + max(sizes.values())


def test_what_is_done_is_not_dealt_again(folder: Path) -> None:
    """Two files of one part, which know the digests of some of its items; the others are still wanted."""
    plan = plan_of(folder, max_shard_size=40_000)
    first = list(max(plan.parts(), key=lambda outputs: outputs[0].last - outputs[0].first))
    digests = tuple("d" if number % 2 else "" for number in range(first[0].first, first[0].last))
    files = tuple(FileRecord(output.name, output.rank, output.part, 1, "x") for output in first[:2])
    done = Portion(files, first[0].first, digests, ((None,) * 3,) * len(digests))
    lots = deal(plan, [done], 2)
    left = {output.name for output in plan.outputs} - {file.name for file in files}
    assert sorted(name for names, _ in lots for name in names) == sorted(left)
    known = {first[0].first + number for number, digest in enumerate(digests) if digest}
    assert known
    assert sorted(item for _, wholes in lots for item in wholes) == sorted(set(range(len(plan.items))) - known)


def test_what_ends_another_process_ends_the_copying(folder: Path) -> None:
    from tpshard.journal import Head
    from tpshard.running import Task, _carried_out

    plan = plan_of(folder, max_shard_size=40_000)
    names = tuple(output.name for output in plan.outputs)
    task = Task(plan, Head({}, names), "xxh3-128-tree", 1, lambda count: None)
    staging = Shared(folder / "x", names)
    staging.folder.mkdir()

    def check() -> None:
        raise StorageError("another one is gone")

    share = Share(names, range(len(plan.items)))
    with pytest.raises(StorageError, match="another one is gone"), _carried_out(task, share, staging, print, check):
        pass
    assert len(list(staging.folder.iterdir())) < len(names)


def test_sizes_are_those_of_the_files(folder: Path) -> None:
    plan = plan_of(folder, max_shard_size=40_000)
    run(plan_split(folder / "source", folder / "target", 3, str(folder / "tiny.yaml")))
    for name, size in output_sizes(plan).items():
        path = folder / "target" / name
        if path.exists():
            assert size < path.stat().st_size <= size + 8 + int.from_bytes(path.read_bytes()[:8], "little")


# ---------------------------------------------------------------------------------------------- the same end


def test_a_process_that_dies_ends_all(folder: Path) -> None:
    (code, out, errors), (died, *_) = start(
        folder, SPLIT + PARTS, [torchrun(rank, 2) for rank in range(2)], ("-c", DYING, "1", "3", "SIGKILL")
    )
    assert (code, died, out) == (5, -signal.SIGKILL, "")
    host = socket.gethostname()
    assert errors == f"tpshard: error: process 1 of 2 (on {host}) has died (start all of them again)\n"
    assert sorted(path.name for path in folder.iterdir()) == ["source", "tiny.yaml"]


def test_the_first_that_dies_ends_all_and_blocks_nothing(folder: Path) -> None:
    (died, *_), (code, _, errors) = start(
        folder, SPLIT + PARTS, [torchrun(rank, 2) for rank in range(2)], ("-c", DYING, "0", "3", "SIGKILL")
    )
    assert (code, died) == (5, -signal.SIGKILL)
    assert "process 0 of 2" in errors
    assert len(errors.splitlines()) == 1
    assert not (folder / "target").exists()
    wanted = alone(folder, SPLIT)
    ended = start(folder, SPLIT, [torchrun(rank, 2) for rank in range(2)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert tree(folder / "target") == wanted
    assert nothing_left(folder)


@pytest.mark.parametrize("size", [pytest.param(1, marks=SWEEP), pytest.param(2, marks=SWEEP), 4])
def test_what_is_finished_is_taken_over(size: int, folder: Path) -> None:
    """By as many processes, or more, or one."""
    words = [*SPLIT, *PARTS, "--resume"]
    wanted = alone(folder, words)
    variables = [torchrun(rank, 2) for rank in range(2)]
    (code, _, errors), _ = start(folder, words, variables, ("-c", DYING, "1", "6", "SIGKILL"))
    assert code == 5
    assert "what is finished was kept: run again with --resume" in errors
    ended = start(folder, words, [torchrun(rank, size) for rank in range(size)])
    assert [code for code, _, _ in ended] == [0] * size, ended
    assert "of the files were finished before" in ended[0][1]
    assert tree(folder / "target") == wanted
    assert nothing_left(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_ends_all(rank: int, folder: Path) -> None:
    variables = [torchrun(number, 2) for number in range(2)]
    ended = start(folder, SPLIT + PARTS, variables, ("-c", DYING, str(rank), "3", "SIGINT"))
    assert [code for code, _, _ in ended] == ([130, 130] if rank == 0 else [5, 130]), ended
    said = "interrupted; nothing was left behind" if rank == 0 else "was interrupted (start all of them again)"
    assert said in ended[0][2]
    assert ended[1][1:] == ("", "")
    assert sorted(path.name for path in folder.iterdir()) == ["source", "tiny.yaml"]


def test_a_shard_that_is_damaged_ends_all_alike(folder: Path) -> None:
    """Whoever finds it: the first says it, once."""
    run(plan_split(folder / "source", folder / "shards", 3, str(folder / "tiny.yaml")))
    Folder(folder / "shards").set_bytes("model.layers.2.self_attn.v_proj.weight", 1, 0, b"\x7f")  # in the last file
    words = ["merge", "shards", "target", "--max-shard-size", "100000"]
    ended = start(folder, words, [torchrun(rank, 2) for rank in range(2)])
    assert [code for code, _, _ in ended] == [3, 3], ended
    assert "the rebuilt bytes have digest" in ended[0][2]
    assert ended[0][2].startswith("tpshard: error: process 1 of 2 (on ")
    assert len(ended[0][2].splitlines()) == 1
    assert ended[1][1:] == ("", "")
    assert not (folder / "target").exists()


def test_processes_that_plan_differently(folder: Path) -> None:
    other = folder / "other.yaml"
    other.write_text(POLICY.replace("mlp.down_proj: row", "mlp.down_proj: {rule: row, uneven: true}"))
    script = (
        "import os, sys\nfrom tpshard.cli.main import main\n"
        "if os.environ['RANK'] == '1': sys.argv[sys.argv.index('tiny.yaml')] = 'other.yaml'\nmain()\n"
    )
    ended = start(folder, SPLIT, [torchrun(rank, 2) for rank in range(2)], ("-c", script))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "process 1 of 2" in ended[0][2]
    assert "has another policy than the first" in ended[0][2]
    assert nothing_left(folder)


def test_a_process_that_does_not_come(folder: Path) -> None:
    ((code, _, errors),) = start(folder, [*SPLIT, "--timeout", "1"], [torchrun(0, 2)])
    assert code == 5
    assert "of 2 processes 1 did not come in 1 s" in errors
    assert sorted(path.name for path in folder.iterdir()) == ["source", "tiny.yaml"]
    ((code, _, errors),) = start(folder, [*SPLIT, "--timeout", "1"], [torchrun(1, 2)])
    assert code == 5
    assert "process 1 of 2 did not find the first in 1 s" in errors
    assert sorted(path.name for path in folder.iterdir()) == ["source", "tiny.yaml"]


# ---------------------------------------------------------------------------------------------- finding each other


def launch(rank: int, job: str = "a") -> Launch:
    return Launch(rank, 2, rank, "", 0, 2, job)


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[list[Any]]:
    """The first process, waiting for another in a thread."""
    import threading

    found: list[Any] = []

    def wait() -> None:
        try:
            found.append(gather(launch(0), path, {"host": "here"}, 30))
        except StorageError as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield found
    finally:
        thread.join()


def test_strangers_are_sent_away(tmp_path: Path) -> None:
    """Someone who does not know the secret, someone who says nothing sensible, and another launch."""
    path = tmp_path / "address"
    with waiting(path) as found:
        while not path.exists():
            pass
        assert path.stat().st_mode & 0o077 == 0
        data = json.loads(path.read_text())
        with socket.create_connection(("127.0.0.1", data["port"])) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        wrong = tmp_path / "wrong"
        wrong.write_text(json.dumps({**data, "secret": "guessed"}))
        with pytest.raises(StorageError, match="did not find the first"):
            join(launch(1), wrong, {}, 0.3)
        with pytest.raises(UsageError, match="another run is writing the same folder"):
            join(launch(1, "b"), path, {}, 30)
        line, said = join(launch(1), path, {"fingerprint": {}}, 30)
    ((_, word),) = found[0].values()
    assert (word["rank"], word["job"], said["host"]) == (1, "a", "here")
    assert not path.exists()
    theirs = found[0][1][0]
    theirs.say({"hello": 1})
    assert line.hear() == {"hello": 1}
    theirs.close()
    with pytest.raises(LostError):
        line.hear()
    line.close()


def test_a_stale_address_is_waited_out(tmp_path: Path) -> None:
    """Of a run that was killed: nobody is there, or somebody else is."""
    path = tmp_path / "address"
    with socket.create_server(("127.0.0.1", 0)) as other:
        path.write_text(json.dumps({"addresses": ["127.0.0.1"], "port": other.getsockname()[1], "secret": "x"}))
        path.write_text("{")  # torn
        with waiting(path) as found:
            line, _ = join(launch(1), path, {}, 30)
    found[0][1][0].close()
    line.close()


# ---------------------------------------------------------------------------------------------- two machines


def namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "tpshard-try"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", "tpshard-try"], capture_output=True, check=False)
    return made


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: neither can reach the other's loopback."""
    if not namespaces():
        pytest.skip("network namespaces cannot be had here")
    names = [f"tpshard-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"tps{os.getpid() % 10**6}{letter}" for letter in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
            for words in (
                ["addr", "add", f"10.77.0.{number + 1}/24", "dev", end],
                ["link", "set", end, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", name, *words], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=SWEEP)])
def test_two_machines(resume: bool, two_hosts: list[str], folder: Path) -> None:
    """Two processes on each; the second machine is told nothing but the folder."""
    words = [*SPLIT, *PARTS, *(["--resume"] if resume else [])]
    wanted = alone(folder, words)
    srun = [
        {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": str(rank % 2), "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
        for rank in range(4)
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", two_hosts[rank // 2], sys.executable, "-m", "tpshard", *words],
            cwd=folder,
            env=environment(**srun[rank]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    ended = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ended
    assert tree(folder / "target") == wanted


# ---------------------------------------------------------------------------------------------- the model on paper


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_model_counts_what_is_read(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import model
    from tpshard.digest import TREE
    from tpshard.execute import execute

    plan = plan_of(folder, max_shard_size=100_000)
    transfers = [transfer for _, transfer in plan.transfers()]
    names, original, read = [output.name for output in plan.outputs], os.preadv, [0]

    def counted(*words: Any) -> int:
        found: int = original(*words)
        read[0] += found
        return found

    monkeypatch.setattr(os, "preadv", counted)
    for number, lot in enumerate(deal(plan, [], count)):
        read[0] = 0
        staging = Shared(folder / f"share-{number}", names)
        staging.folder.mkdir()
        written = execute(plan, staging, TREE, 1, share=Share(*lot))
        most, own = model._load(plan, transfers, lot)
        assert read[0] == most
        heads = [int.from_bytes((staging.folder / file.name).read_bytes()[:8], "little") for file in written.files]
        assert sum(file.size for file in written.files) == own + sum(heads) + 8 * len(heads)


@pytest.mark.sweep
def test_the_page_has_the_model_s_tables(tmp_path: Path) -> None:
    from tests.bench import model

    page = (ROOT / "docs/many.md").read_text("utf-8")
    for limit in (None, 10**9):
        assert model.report(model.planned(tmp_path, limit)) in page
