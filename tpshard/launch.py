"""Whether this process is one of several that a launcher started, by the environment variables that it sets.

torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. horovodrun: HOROVOD_RANK, _SIZE,
_LOCAL_RANK, _LOCAL_SIZE. Open MPI's mpirun: OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE. Slurm's srun:
SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tpshard.errors import UsageError

PORT = 29533  # where nothing says otherwise
HERE = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launcher:
    """The names of the variables that one launcher sets; ``job``: of those that together differ from launch to
    launch."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]


LAUNCHERS = (  # one that starts others comes after them: torchrun runs under srun, mpirun's own daemons, too
    Launcher(
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    ),
    Launcher(
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK",
        "HOROVOD_LOCAL_SIZE",
        ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
    ),
    Launcher(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE",),
    ),
    Launcher(
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's number among ``size``, its number among ``local_size`` on its machine, and where they can meet
    (``address`` is empty where nothing says it). ``job``: the same in all processes of a launch, and in no other that
    is known."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    local_size: int = 1
    job: str = ""

    @property
    def meeting(self) -> tuple[str, int]:
        """Address and port. Raises UsageError where no variable says them."""
        if not self.address:
            hint = "export the first machine's name"
            raise UsageError(f"there are {self.size} processes, but MASTER_ADDR does not say where to meet", hint=hint)
        return self.address, self.port


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """None where this process is on its own. Raises UsageError where the variables make no sense.

    >>> launched({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "5"})
    Launch(rank=1, size=2, local_rank=1, address='::1', port=5, local_size=1, job='::1 5')
    """
    for launcher in LAUNCHERS:
        if launcher.rank in environment and launcher.size in environment:
            return _launch(environment, launcher)
    return None


def _launch(environment: Mapping[str, str], launcher: Launcher) -> Launch | None:
    size = _number(environment, launcher.size)
    if size == 1:
        return None
    rank = _number(environment, launcher.rank)
    if not 0 <= rank < size:
        raise UsageError(
            f"{launcher.rank} is {rank}, {launcher.size} is {size}: a process's number is below their count"
        )
    said = environment.get(launcher.local_size, "1")  # Slurm's: 2(x3),1
    local_size = max((int(count) for count in re.findall(r"(?:^|,)(\d{1,9})", said)), default=1)
    alone = local_size == size and "MASTER_ADDR" not in environment
    return Launch(
        rank,
        size,
        _number(environment, launcher.local_rank, rank),
        HERE if alone else environment.get("MASTER_ADDR", ""),
        _number(environment, "MASTER_PORT", PORT),
        local_size,
        " ".join(environment[name] for name in launcher.job if name in environment),
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{name} is '{text}', not a number", hint="it is set by torchrun, mpirun or srun")
    return int(text)
