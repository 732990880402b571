"""DeepSpeed's universal checkpoints: for each parameter a folder ``zero/<name>`` with the whole of it in FP32.

A full checkpoint of as many files as parameters. The optimizer's states beside them are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpshard.checkpoint import Checkpoint
from tpshard.engines.readers.deepspeed_steps import INERT, is_own, step_of
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.engines.readers.reading import Held, Own, Reading
from tpshard.errors import InputError, printable
from tpshard.folder import natural_order
from tpshard.header import MAX_TENSORS, Entry, check_names
from tpshard.layout import Layout
from tpshard.torch_files import read_torch_tree

WEIGHT = "fp32.pt"
STATES = "*_model_states.pt"


def recognises(folder: Path) -> bool:
    if (folder / "latest_universal").is_file():
        return True
    return (folder / "zero").is_dir() and any((folder / "zero").glob(f"*/{WEIGHT}"))


def open_universal(asked: Asked) -> Checkpoint:
    step = step_of(asked.folder, "latest_universal")
    place = asked.folder / step
    if not (place / "zero").is_dir():
        raise InputError(f"{place}: has no folder 'zero'", hint="is it the folder with 'latest_universal'?")
    names = sorted((path.name for path in (place / "zero").iterdir() if path.is_dir()), key=natural_order)
    if len(names) > MAX_TENSORS:
        raise InputError(f"{place / 'zero'}: has {len(names)} parameters, at most {MAX_TENSORS} are read")
    check_names(names, str(place / "zero"))
    reading = Reading(asked)
    left: dict[str, int] = {}
    held = {}
    for name in names:
        own = _weight(reading, f"{step}zero/{name}/{WEIGHT}")
        held[name] = Held(own.entry.dtype, Layout.replicated(own.entry.shape, 1), (own.place,))
        for path in (place / "zero" / name).iterdir():
            if path.name != WEIGHT:
                left[path.stem] = left.get(path.stem, 0) + 1
    if left:
        shown = ", ".join(printable(name, 40) for name in sorted(left)[:6])
        reading.warn(f"optimizer states of {max(left.values())} parameters ({shown}): left out")
    _check_complete(reading, place, held)
    own_files = f"{step}" if step else "zero/"
    return reading.checkpoint(
        READER.name,
        1,
        held,
        reading.policy(needed=False),
        lambda name: is_own(name, own_files) or name.endswith(STATES[1:]),
    )


def _weight(reading: Reading, name: str) -> Own:
    """A parameter's file: {"param": tensor} and notes on how it was joined, which it is already."""
    file, tree = reading.torch(name, 0, INERT)
    found = tree.value.get("param") if isinstance(tree.value, dict) else None
    if not isinstance(found, Entry):
        raise InputError(f"{reading.folder / name}: holds no tensor 'param'", hint="was it written completely?")
    return Own(file, found)


def _check_complete(reading: Reading, place: Path, held: Mapping[str, Held]) -> None:
    """Copies of the model states list what was trained, and the names of all weights. Raises InputError where one is
    not here."""
    files = sorted(place.glob(STATES))
    if not files:
        reading.warn(f"{place.name}: has no model states, so nothing says whether all parameters are there")
    for path in files:
        state = read_torch_tree(path, INERT).value
        if not isinstance(state, dict):
            raise InputError(f"{path}: holds no table of model states")
        trained = {name for group in _list(state.get("param_shapes")) for name in _names(group)}
        for name in sorted(trained - held.keys()):
            what = f"{place / 'zero'}: has nothing of {printable(name)}, which {path.name} says was trained"
            raise InputError(what, hint="is the folder complete?")
        second, buffers = _names(state.get("shared_params")), set(_list(state.get("buffer_names")))
        for name in sorted(_names(state.get("module")) - trained - held.keys()):
            if name in second or name in buffers:
                kind = "a second name of another tensor" if name in second else "a buffer"
                reading.warn(f"{printable(name)} is {kind}: left out")
                continue
            what = f"{place}: {printable(name)} was not trained, and is not in a universal checkpoint"
            raise InputError(what, hint="read the training checkpoint instead: --from deepspeed")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(table: object) -> set[str]:
    return {name for name in table if isinstance(name, str)} if isinstance(table, dict) else set()


READER = Reader(
    name="deepspeed-universal",
    title="DeepSpeed universal checkpoint",
    files="<step>_universal/zero/<parameter>/fp32.pt",
    description="A full checkpoint in F32: tpshard split cuts it, tpshard merge makes safetensors of it. Optimizer "
    "states are left out.",
    recognises=recognises,
    open=open_universal,
    whole=True,
)
