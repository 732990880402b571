"""Whether this process is one of several that a launcher started, by the environment variables that it sets.

torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Open MPI's mpirun: OMPI_COMM_WORLD_RANK, _SIZE,
_LOCAL_RANK, _LOCAL_SIZE. Slurm's srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NUM_NODES.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tpshard.errors import UsageError

PORT = 29533  # where nothing says otherwise
HERE = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Launch:
    """This process's number among ``size``, its number on its machine, and where they meet."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """None where this process is on its own. Raises UsageError where the variables make no sense.

    >>> launched({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "5"})
    Launch(rank=1, size=2, local_rank=1, address='::1', port=5)
    """
    for rank, size, local_rank, one_machine in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", None),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        if rank in environment and size in environment:
            count = _number(environment, size)
            if count == 1:
                return None
            number = _number(environment, rank)
            if not 0 <= number < count:
                raise UsageError(f"{rank} is {number}, {size} is {count}: a process's number is below their count")
            alone = one_machine is not None and environment.get(one_machine) == environment[size]
            address = environment.get("MASTER_ADDR", HERE if alone else "")
            if not address:
                hint = "export the first machine's name"
                raise UsageError(f"{size} is {count}, but MASTER_ADDR does not say where to meet", hint=hint)
            port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else PORT
            return Launch(number, count, _number(environment, local_rank, number), address, port)
    return None


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{name} is '{text}', not a number", hint="it is set by torchrun, mpirun or srun")
    return int(text)
