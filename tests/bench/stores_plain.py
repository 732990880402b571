"""What obstore does by itself: ``python -m tests.bench.stores_plain up|down SRC DST`` copies a folder or an object."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.store import S3Store

AT_ONCE = 4  # objects


def main(direction: str, source: str, target: str) -> None:
    url = target if direction == "up" else source
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = S3Store(bucket, client_options={"allow_http": True, "timeout": "5 minutes"})
    if direction == "up":
        folder = Path(source)
        work = [(path, f"{prefix}/{path.name}") for path in sorted(folder.iterdir())]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda pair: obstore.put(store, pair[1], pair[0], chunk_size=8 * 2**20), work))
        return
    Path(target).mkdir()
    keys = [meta["path"] for meta in obstore.list(store, prefix).collect()] or [prefix]

    def download(key: str) -> None:
        with (Path(target) / key.rpartition("/")[2]).open("wb") as file:
            for chunk in obstore.get(store, key).stream(min_chunk_size=8 * 2**20):
                file.write(chunk)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(download, keys))


if __name__ == "__main__":
    main(*sys.argv[1:])
