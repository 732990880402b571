"""The stores of docs/stores.md: servers on this machine, each with the demo's checkpoint as ``models/llama``, and the
Hub with it as ``org/llama``."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.stores import servers
from tests.stores.hub import hub
from tpshard.demo import make_checkpoint

PUT = "import sys; from tests.stores.folders import upload; from pathlib import Path; upload(Path(sys.argv[1]), sys.argv[2])"


@contextlib.contextmanager
def stores() -> Iterator[dict[str, str]]:
    """The environment in which they are found."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_checkpoint(scratch / "org/llama")
        started = [stack.enter_context(start()) for start in (servers.s3, servers.azure, servers.gcs)]
        environment = {name: value for server in started for name, value in server.environment.items()}
        environment |= {"HF_ENDPOINT": stack.enter_context(hub(scratch)), "HF_HUB_OFFLINE": "0"}
        for server in started:
            command = [sys.executable, "-c", PUT, str(scratch / "org/llama"), f"{server.root}/llama"]
            subprocess.run(command, env=os.environ | environment, check=True)
        yield environment
