"""One fuzzing process: ``python -m tests.fuzz.engine TARGET CORPUS [libFuzzer's options]``. Coverage of tpshard guides it;
JSON is also changed as a tree, so that what comes out is JSON still."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import atheris

with atheris.instrument_imports(include=["tpshard"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS, planted
    from tpshard.errors import TpshardError

VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 2**31, 2**48, 2**53, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, True, False, None, "", "a", "..", "\x00",
    "\ud800", "é", "F32", "column", "sha256", [], {}, [0, 1], [[0, 2]], {"": 0}, {"0": [[0, 1]]}, "x" * 2000,
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                pending.append(holder[key])
    return found


def changed_tree(text: bytes, seed: int) -> bytes:
    """A JSON object with some places changed; ValueError where it is none."""
    chance = random.Random(seed)
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError
    for _ in range(chance.randint(1, 3)):
        places = _places(table)
        if not places:
            break
        holder, key = chance.choice(places)
        other, its_key = chance.choice(places)
        match chance.randrange(6):
            case 0:
                holder[key] = json.loads(json.dumps(chance.choice(VALUES)))
            case 1:
                holder[key] = json.loads(json.dumps(other[its_key]))
            case 2:
                del holder[key]
            case 3 if isinstance(holder, list):
                holder.append(json.loads(json.dumps(holder[key])))
            case 4 if isinstance(holder, dict):
                holder[str(chance.choice(VALUES))] = holder.pop(key)
            case 5 if isinstance(holder[key], int):
                holder[key] += chance.choice((-1, 1, 4, 255))
            case _:
                holder[key] = [holder[key]]
    return json.dumps(table, separators=(",", ":"), ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def of_json(data: bytes, limit: int, seed: int) -> bytes:
    if seed % 3:
        try:
            return changed_tree(data, seed)[:limit]
        except (ValueError, RecursionError):
            pass
    return atheris.Mutate(data, limit)  # type: ignore[no-any-return]


def of_header(data: bytes, limit: int, seed: int) -> bytes:
    """A length that is true most of the time, and data that fits half of the time."""
    if seed % 4 == 0:
        return atheris.Mutate(data, limit)  # type: ignore[no-any-return]
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    text, rest = (data[8 : 8 + length], data[8 + length :]) if length < len(data) else (data[8:], b"")
    text = of_json(text, limit, seed)
    if seed % 2:
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            rest = bytes(min(4096, max((entry["data_offsets"][1] for entry in json.loads(text).values()), default=0)))
    return (struct.pack("<Q", len(text)) + text + rest)[:limit]


MUTATORS: dict[str, Callable[[bytes, int, int], bytes]] = {
    "header": of_header, "frame": of_header, "manifest": of_json, "index": of_json, "config": of_json,
}  # fmt: skip


def main() -> None:
    name, *words = sys.argv[1:]
    target = {**TARGETS, "planted": planted}[name]

    def run(data: bytes) -> None:
        try:
            target(data)
        except TpshardError as error:
            assert "\n" not in str(error), f"an error of several lines: {error}"

    mutator = {"custom_mutator": MUTATORS[name]} if name in MUTATORS else {}
    atheris.Setup([sys.argv[0], *words], run, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
