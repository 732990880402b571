"""Verify in several processes, for real: gloo, one process for each rank, as a launcher would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import a_model, some_models
from tests.tampering import Folder, write_file
from tests.test_verify import POLICY
from tests.tiny_models import save_model
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.errors import UsageError
from tpshard.launch import Launch, launched
from tpshard.verify.request import Request
from tpshard.verify.run import verify

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start(count: int, words: list[str], only: range | None = None, **extra: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tpshard", "verify", *words],
            cwd=ROOT,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in only or range(count)
    ]  # fmt: skip
    ended = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of tests.a_model, its shards at tp 2 and 4 beside it."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("net")
    state = {name: torch.randn_like(value) for name, value in a_model.build({})[0].state_dict().items()}
    (folder / "net").mkdir()
    tensors = {name: ("F32", list(value.shape), value.numpy().tobytes()) for name, value in state.items()}
    write_file(folder / "net/model.safetensors", {"format": "pt"}, tensors)
    (folder / "net.yaml").write_text(POLICY)
    for tp in (2, 4):
        run(plan_split(folder / "net", folder / f"tp{tp}", tp, str(folder / "net.yaml")))
    return folder


def words(net: Path, tp: int, factory: str = "build", against: bool = True) -> list[str]:
    source = ["--against", str(net / "net")] if against else []
    return [str(net / f"tp{tp}"), *source, "--model", f"tests.a_model:{factory}", "--json", "--timeout", "120"]


def comparable(report: Any) -> Any:
    """What must be the same in one process and in several: all but times, and sums in another order."""
    return [
        (check["check"], check["verdict"], check["covered"], [f["what"] for f in check["findings"]])
        for check in report["checks"]
    ]


@pytest.mark.parametrize("tp", [2, 4])
def test_several_processes_say_what_one_says(tp: int, net: Path) -> None:
    ended = start(tp, words(net, tp))
    assert [code for code, _, _ in ended] == [0] * tp, ended
    assert [(out, errors) for _, out, errors in ended[1:]] == [("", "")] * (tp - 1)  # one report, from the first
    alone = verify(Request(net / f"tp{tp}", against=net / "net", factory="tests.a_model:build", workers=1))
    assert comparable(json.loads(ended[0][1])) == comparable(alone.as_json())


def test_hidden_states_meet_after_every_step(tmp_path: Path) -> None:
    """13 hidden units on two ranks: seven and six. The reference runs torch's own LSTM and keeps step."""
    some_models.save("lstm both ways", tmp_path / "model")
    policy = some_models.save_policy("lstm both ways", tmp_path / "policy.yaml")
    run(plan_split(tmp_path / "model", tmp_path / "shards", 2, str(policy)))
    factory = "tests.some_models:build"
    given = [str(tmp_path / "shards"), "--against", str(tmp_path / "model"), "--model", factory, "--json"]
    ended = start(2, given)
    assert [code for code, _, _ in ended] == [0, 0], ended
    alone = verify(Request(tmp_path / "shards", against=tmp_path / "model", factory=factory, workers=1))
    assert comparable(json.loads(ended[0][1])) == comparable(alone.as_json())


def test_without_the_source_the_first_process_rebuilds_it(net: Path) -> None:
    ended = start(2, words(net, 2, against=False))
    assert [code for code, _, _ in ended] == [0, 0], ended
    weights = json.loads(ended[0][1])["checks"][1]
    assert "digests recorded of the source" in weights["notes"][0]


def test_the_shards_of_others_are_not_opened(net: Path, tmp_path: Path) -> None:
    """Process 1 passes where only its own file can be read (the first finds that the other is gone)."""
    folder = tmp_path / "shards"
    run(plan_split(net / "net", folder, 2, str(net / "net.yaml")))
    Folder(folder).remove(0)
    ended = start(2, [str(folder), *words(net, 2)[1:]])
    assert [code for code, _, _ in ended] == [1, 1]
    files = json.loads(ended[0][1])["checks"][0]
    assert [finding["rank"] for finding in files["findings"]] == [0]


def test_what_is_wrong_on_another_rank_is_found_and_named(net: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    run(plan_split(net / "net", folder, 2, str(net / "net.yaml")))
    shards = Folder(folder)
    shards.set_bytes("up.weight", 1, 0, b"\x00\x00\x80\x3f")
    shards.reseal()
    ended = start(2, [str(folder), *words(net, 2)[1:]])
    assert [code for code, _, _ in ended] == [1, 1], ended
    found = {check["check"]: check["findings"] for check in json.loads(ended[0][1])["checks"]}
    assert (found["weights"][0]["tensor"], found["weights"][0]["rank"]) == ("up.weight", 1)
    assert (found["forward"][0]["layer"], found["forward"][0]["rank"]) == ("up", 1)
    assert not found["generic"]


def test_a_rank_whose_model_breaks_down_ends_all(net: Path) -> None:
    ended = start(2, words(net, 2, "build_breaking"))
    assert [code for code, _, _ in ended] == [1, 1], ended
    (finding, *_) = [f for f in json.loads(ended[0][1])["checks"][3]["findings"] if "broke down" in f["what"]]
    assert "not on this rank" in finding["what"]


def test_a_process_that_dies_is_noticed(net: Path) -> None:
    (code, out, errors), (died, *_) = start(2, words(net, 2, "build_dying"))
    assert (code, died) == (5, 9), errors
    assert len(errors.splitlines()) == 1
    said = json.loads(out)["error"]
    assert "process 0 of 2 waited for" in said["message"]
    assert "one of them has died" in said["hint"]


def test_a_process_that_never_comes_is_noticed(net: Path) -> None:
    given = [*words(net, 2)[:-1], "2"]
    ((code, out, _),) = start(2, given, only=range(1))
    assert code == 5
    assert "waited for the others at 127.0.0.1" in json.loads(out)["error"]["message"]


def test_another_number_of_processes_than_ranks(net: Path) -> None:
    ended = start(2, words(net, 4))
    assert [code for code, _, _ in ended] == [2, 2]
    assert json.loads(ended[0][1])["error"]["message"] == "2 processes for 4 ranks"
    assert ended[1][1:] == ("", "")


def test_torchrun_starts_it(tmp_path: Path) -> None:
    """A transformers model whose key-value heads are dealt, started as the page says."""
    save_model("qwen2", tmp_path / "model", kv_heads=2)
    run(plan_split(tmp_path / "model", tmp_path / "shards", 2))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    words = ["-m", "tpshard", "verify", str(tmp_path / "shards"), "--against", str(tmp_path / "model"), "--json"]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "PASS"
    assert [check["check"] for check in report["checks"]][3:] == ["forward", "backward", "generic", "self-test"]


# ------------------------------------------------------------------------------------------ who has started us


def test_launchers_and_their_variables() -> None:
    assert launched({}) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    assert launched(torchrun) == Launch(3, 4, 1, "node0", 1234, 1, "node0 1234")
    mpirun = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    found = launched(mpirun | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert found is not None
    assert (found.rank, found.size, found.address) == (1, 2, "127.0.0.1")
    assert (found.local_size, found.job) == (2, "")
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "MASTER_ADDR": "node0"}
    found = launched(srun | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size, found.job) == (1, 4, 0, 3, "7 0")
    horovodrun = {f"HOROVOD_{name}": str(value) for name, value in (("RANK", 2), ("SIZE", 4), ("LOCAL_SIZE", 2))}
    horovodrun |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4242"}
    found = launched(horovodrun | {"HOROVOD_LOCAL_RANK": "0"} | mpirun)  # which may have started it
    assert found is not None
    assert (found.rank, found.size, found.local_size, found.job) == (2, 4, 2, "10.0.0.1 4242")
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script, not srun


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "RANK is 4, WORLD_SIZE is 4"),
        ({"RANK": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "RANK is 'x', not a number"),
        ({"RANK": "1", "WORLD_SIZE": "-4"}, "WORLD_SIZE is '-4'"),
    ],
)
def test_variables_that_make_no_sense(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        launched(environment)


def test_verify_has_to_be_told_where_to_meet() -> None:
    several = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    launch = launched(several)
    assert launch is not None
    with pytest.raises(UsageError, match="MASTER_ADDR does not say where to meet"):
        _ = launch.meeting
