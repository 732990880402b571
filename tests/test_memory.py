"""Memory of the model checks: that of a layer and of what flows through it, not that of the model."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bench.measure import run as measured
from tests.bench.models import llama_of
from tpshard.conversion import run
from tpshard.convert import plan_split

BLOCKS_ONLY = """
import sys
from tpshard.cli.main import _run
from tpshard.verify import loss
loss.MOST = 0  # bytes: the loss through the whole model holds all activations, where they are few
sys.exit(_run(sys.argv[1:]))
"""


def peak(folder: Path, layers: int) -> int:
    """The largest anonymous memory of ``tpshard verify`` with all its checks, in bytes."""
    source, shards = folder / f"model-{layers}", folder / f"shards-{layers}"
    llama_of(source, hidden=448, inner=1504, vocabulary=2003, heads=14, key_value_heads=2, layers=layers)
    run(plan_split(source, shards, 2))
    words = ["verify", str(shards), "--against", str(source), "--level", "backward", "--json"]
    return measured([sys.executable, "-c", BLOCKS_ONLY, *words]).anonymous


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """24 layers more are 61 million numbers: 488 MB in float64, and as much again for the ranks."""
    few, many = peak(tmp_path, 2), peak(tmp_path, 26)
    assert many - few < 60e6, (few, many)
