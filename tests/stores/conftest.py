"""Each test in a folder of its own, in each of the stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.stores import servers
from tests.stores.folders import use

STARTS = {"s3": servers.s3, "az": servers.azure, "gs": servers.gcs}


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, servers.Server]]:
    """Servers that have been started, by scheme; they end with the tests."""
    with ExitStack() as stack:

        class Started(dict[str, servers.Server]):
            def __missing__(self, scheme: str) -> servers.Server:
                self[scheme] = stack.enter_context(STARTS[scheme]())
                return self[scheme]

        yield Started()


@pytest.fixture(params=list(STARTS))
def root(
    request: pytest.FixtureRequest, running: dict[str, servers.Server], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A new folder in a store."""
    scheme: str = request.param
    if scheme == "az" and servers.azurite() is None:
        pytest.skip("azurite is not installed")
    server = running[scheme]
    yield from use(server, monkeypatch)


@pytest.fixture
def in_s3(running: dict[str, servers.Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from use(running["s3"], monkeypatch)
