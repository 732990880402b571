"""Google Cloud Storage by gcsfs, the Hugging Face Hub by huggingface_hub: both are fsspec file systems."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from tpshard.errors import StorageError
from tpshard.stores.failures import ACCESS
from tpshard.stores.store import MOST_LISTED, Known, part_size

_UNIT = 2**18  # Google takes parts that are a multiple of it
_VERSIONS = ("generation", "etag", "blob_id", "oid")


def open_store(scheme: str, bucket: str) -> FileSystemStore:
    """The bucket, or the Hub, with what the environment says of credentials and endpoints."""
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return FileSystemStore(HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), skip_instance_cache=True), "")
    # A trial of that library: without it, a server that speaks no gRPC is asked for a minute before it is used.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from gcsfs import GCSFileSystem

    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    given: Any = {"token": "anon", "endpoint_url": emulator} if emulator else {}
    return FileSystemStore(GCSFileSystem(use_listings_cache=False, **given), bucket)


class FileSystemStore:
    def __init__(self, files: Any, bucket: str) -> None:
        self._files, self._bucket = files, bucket

    def list(self, prefix: str) -> Mapping[str, Known]:
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            found = {}
        if len(found) > MOST_LISTED:
            raise StorageError(f"{prefix}: has more than {MOST_LISTED} objects", hint="give the checkpoint's folder")
        if not found:
            self._require_root(prefix)
        return {self._key(name): _known(info) for name, info in found.items() if info["type"] == "file"}

    def _require_root(self, prefix: str) -> None:
        """Raises the library's error where there is no such bucket; StorageError where there is no such repository."""
        if self._bucket:
            self._files.ls(self._bucket)
            return
        name = "/".join(prefix.split("/")[:2])
        if not self._files.exists(name):
            raise StorageError(f"hf://{name}: there is no such repository, or no access to it", hint=ACCESS)

    def read(self, key: str, offset: int, into: memoryview, version: str) -> int:
        data = self._range(self._path(key), offset, len(into))[: len(into)]
        into[: len(data)] = data
        return len(data)

    def _range(self, path: str, offset: int, count: int) -> bytes:
        if self._bucket:
            return bytes(self._files.cat_file(path, start=offset, end=offset + count))
        with self._files.open(path, "rb", cache_type="none") as file:  # the Hub's cat_file reads 5 MB ahead
            file.seek(offset)
            return bytes(file.read(count))

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            return False
        return True

    def writer(self, key: str, size: int, at_once: int) -> FileSystemWriter:
        block = -(-part_size(size) // _UNIT) * _UNIT
        return FileSystemWriter(self._files.open(self._path(key), "wb", block_size=block))

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{key}" if self._bucket else key

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._bucket}/") if self._bucket else path


def _known(info: Mapping[str, Any]) -> Known:
    return Known(int(info["size"]), next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


class FileSystemWriter:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: memoryview | bytes) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.close()

    def abort(self) -> None:
        with contextlib.suppress(Exception):
            self._file.discard()
        self._file.closed = True  # else the library completes the object when this is collected
