"""S3 and Azure by obstore, the Python face of the object_store library: ranges without a copy, parts sent as they fill.

The library tries again by itself where a store fails or cannot be reached.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, S3Store

from tpshard.errors import StorageError
from tpshard.stores.store import MOST_LISTED, Known, part_size

_CLIENT = {"timeout": timedelta(minutes=5), "connect_timeout": timedelta(seconds=20)}
_RETRIES = {
    "max_retries": 6,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "az": ("AZURE_ENDPOINT",)}


def open_store(scheme: str, bucket: str) -> ObjectStore:
    """The bucket or container, with what the environment says of credentials and endpoints."""
    endpoint = next((os.environ[name] for name in _ENDPOINTS[scheme] if os.environ.get(name)), None)
    client: Any = {**_CLIENT, "allow_http": True} if endpoint and endpoint.startswith("http://") else _CLIENT
    given: Any = {"endpoint": endpoint} if endpoint else {}
    kind: Any = S3Store if scheme == "s3" else AzureStore
    return ObjectStore(kind(bucket, client_options=client, retry_config=_RETRIES, **given))


class ObjectStore:
    def __init__(self, store: Any) -> None:
        self._store = store

    def list(self, prefix: str) -> Mapping[str, Known]:
        found: dict[str, Known] = {}
        for page in obstore.list(self._store, prefix or None, chunk_size=1000):
            for meta in page:
                found[meta["path"]] = Known(meta["size"], meta["e_tag"] or "")
            if len(found) > MOST_LISTED:
                raise StorageError(
                    f"{prefix or 'the bucket'}: has more than {MOST_LISTED} objects",
                    hint="give the checkpoint's folder",
                )
        if not found and prefix:
            try:
                meta = obstore.head(self._store, prefix)
            except FileNotFoundError:
                return {}
            found[prefix] = Known(meta["size"], meta["e_tag"] or "")
        return found

    def read(self, key: str, offset: int, into: memoryview, version: str) -> int:
        options: Any = {"range": (offset, offset + len(into))}
        if version:
            options["if_match"] = version
        done = 0
        for chunk in obstore.get(self._store, key, options=options).stream(min_chunk_size=0):
            part = memoryview(chunk)[: len(into) - done]
            into[done : done + len(part)] = part
            done += len(part)
        return done

    def create(self, key: str, data: bytes) -> bool:
        try:
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def writer(self, key: str, size: int, at_once: int) -> ObjectWriter:
        return ObjectWriter(obstore.open_writer(self._store, key, buffer_size=part_size(size), max_concurrency=at_once))

    def delete(self, key: str) -> None:
        obstore.delete(self._store, key)


class ObjectWriter:
    def __init__(self, writer: Any) -> None:
        self._writer = writer.__enter__()

    def write(self, data: memoryview | bytes) -> None:
        self._writer.write(bytes(data))  # it is kept until it is sent

    def finish(self) -> None:
        self._leave(None, None, None)

    def abort(self) -> None:
        error = InterruptedError()
        self._leave(type(error), error, None)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
