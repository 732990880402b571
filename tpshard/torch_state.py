"""Which tensors of a PyTorch file are the weights, under which names: the state dict in whatever it was saved with.

A tensor is never dropped silently: what is left out is told, and what could be weights too is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, printable
from tpshard.header import DTYPE_ORDER, MAX_TENSORS, Entry, Header, check_names
from tpshard.pickle_machine import Call, Global
from tpshard.torch_files import read_torch_tree
from tpshard.torch_tensors import FROM_TYPE, UNREAD_TENSORS, Storage

# Where trainers put the weights, in the order in which they are looked for: Lightning and timm; Megatron, Meta and
# most scripts; DeepSpeed; many tutorials; restoration models; timm's and others' older ones.
KEYS = ("state_dict", "model", "module", "model_state_dict", "model_state", "params", "weights", "net", "network")
# What stands beside the weights and holds tensors: left out, with a warning.
BESIDE = (
    "optimizer", "optimizers", "optim", "opt", "scheduler", "schedulers", "lr_sched", "rng", "random", "scaler", "grad",
    "ema", "callbacks", "loops", "dataloader", "sampler", "train_state", "teacher", "swa",
)  # fmt: skip
DEEPEST = 64
MOST_NODES = 2_000_000  # what is shared counts each time: a small file may be a huge tree


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The weights as a safetensors header would have them, all that the file holds, and what was left out of it."""

    header: Header
    objects: Any
    warnings: tuple[str, ...]


def read_torch_file(path: Path, key: str | None = None, inert: Collection[Global] | None = ()) -> TorchFile:
    """The weights of a PyTorch file: those under ``key``; without it those under the first of KEYS that holds any, or
    else all. Nested dicts are joined by dots. In the order of safetensors' own writer. Raises InputError,
    StorageError."""
    tree = read_torch_tree(path, inert)
    entries, warnings = _weights(tree.value, key, str(path))
    if len(entries) > MAX_TENSORS:
        raise InputError(f"{path}: {len(entries)} tensors in one file, at most {MAX_TENSORS} are read")
    check_names(entries, str(path))
    order = sorted(entries, key=lambda name: (DTYPE_ORDER[entries[name].dtype], name))
    ordered = {name: entries[name] for name in order}
    start = min((entry.offset for entry in entries.values()), default=0)
    header = Header(ordered, {"format": "pt"}, start, tree.file_size)
    return TorchFile(header, tree.value, (*warnings, *_tied(ordered)))


def tensors_under(value: object, where: str) -> tuple[dict[str, Entry], list[str]]:
    """Tensors of a tree by their dotted names, and the names of what else it holds. Raises InputError where a tensor
    cannot be read, or has no name of its own.

    >>> tensors_under({"a": {"b": Entry("F32", (3,), 0, 12)}, "step": 1}, "x")
    ({'a.b': Entry(dtype='F32', shape=(3,), offset=0, size=12, view=None)}, ['step'])
    """
    found: dict[str, Entry] = {}
    rest: list[str] = []
    for steps, leaf in leaves(value, where):
        name = ".".join(str(step) if type(step) in (str, int) else f"<{type(step).__name__}>" for step in steps)
        odd = [type(step).__name__ for step in steps if type(step) not in (str, int)]
        if odd and isinstance(leaf, Entry):
            raise InputError(f"{where}: a tensor lies under a key of kind {odd[0]}, which is no name")
        if not isinstance(leaf, Entry):
            _refuse_tensor(leaf, name, where)
            rest.append(name)
        elif name in found:
            raise InputError(f"{where}: two tensors are called {printable(name)}")
        else:
            found[name] = leaf
    return found, rest


def leaves(value: object, where: str) -> Iterator[tuple[tuple[object, ...], Any]]:
    """What a tree of dicts, lists and tuples ends in, each with the keys that lead to it. Depth and number are
    limited. Raises InputError."""
    todo: list[tuple[tuple[object, ...], object]] = [((), value)]
    nodes = 0
    while todo:
        steps, node = todo.pop()
        nodes += 1
        if isinstance(node, dict):
            below = [((*steps, step), part) for step, part in node.items()]
        elif isinstance(node, list | tuple) and node:
            below = [((*steps, index), part) for index, part in enumerate(node)]
        else:
            yield steps, node
            continue
        nodes += len(below)
        if len(steps) >= DEEPEST or nodes > MOST_NODES:
            raise InputError(f"{where}: holds values nested deeper than {DEEPEST}, or more than {MOST_NODES}")
        todo.extend(reversed(below))


def _refuse_tensor(leaf: object, name: str, where: str) -> None:
    what = None
    if isinstance(leaf, Storage):
        what = "is a storage without a shape"
    elif isinstance(leaf, Call) and leaf.function in UNREAD_TENSORS:
        what = f"is {UNREAD_TENSORS[leaf.function]}, which is not read"
    elif isinstance(leaf, Call) and leaf.function == FROM_TYPE:
        what = f"is a tensor of a class of its own ({printable(str(leaf.arguments[1]), 80)}), which is not read"
    if what:
        raise InputError(f"{where}: {printable(name)}: {what}", hint="save plain tensors")


def _weights(value: object, key: str | None, where: str) -> tuple[dict[str, Entry], list[str]]:
    if not isinstance(value, dict):
        what = "one tensor without a name" if isinstance(value, Entry) else f"no dict but a {type(value).__name__}"
        raise InputError(f"{where}: holds {what}", hint="save a state dict")
    holding = {name: part for name, part in value.items() if _holds_tensor(part, where)}
    if key is not None:
        if key not in holding:
            raise InputError(f"{where}: holds no tensors under '{printable(key)}'")
        return _chosen(value, holding, key, where)
    if not any(isinstance(part, Entry) for part in holding.values()):
        for known in KEYS:
            if known in holding:
                return _chosen(value, holding, known, where)
    beside = [name for name in holding if _is_beside(name, holding[name])]
    entries, rest = tensors_under({name: part for name, part in value.items() if name not in beside}, where)
    if not entries:
        raise InputError(f"{where}: holds no tensors" + (" but " + _listed(beside) if beside else ""))
    return entries, _left_out(rest, beside)


def _chosen(
    value: Mapping[Any, Any], holding: Mapping[Any, object], key: str, where: str
) -> tuple[dict[str, Entry], list[str]]:
    """The tensors under one key; what is beside must be known to be no weights."""
    others = [name for name in holding if name != key]
    unclear = [name for name in others if not _is_beside(name, holding[name])]
    if unclear:
        raise InputError(
            f"{where}: holds tensors under '{printable(key)}' and under {_listed(unclear)}",
            hint="save the one that is meant alone",
        )
    entries, rest = tensors_under(value[key], where)
    return entries, _left_out(rest, others)


def _holds_tensor(value: object, where: str) -> bool:
    for _, leaf in leaves(value, where):
        if isinstance(leaf, Entry | Storage) or (isinstance(leaf, Call) and _is_tensor(leaf)):
            return True
    return False


def _is_tensor(leaf: Call) -> bool:
    return leaf.function in UNREAD_TENSORS or leaf.function == FROM_TYPE


def _is_beside(name: object, part: object) -> bool:
    words = str(name).lower().replace("-", "_").split("_") if isinstance(name, str) else []
    return not isinstance(part, Entry) and any(word in BESIDE for word in words)


def _left_out(rest: list[str], beside: list[Any]) -> list[str]:
    warnings = []
    if beside:
        warnings.append(f"left out, with its tensors: {_listed(beside)}")
    if rest:
        warnings.append(f"left out, as it is no tensor: {_listed(rest)}")
    return warnings


def _listed(names: Collection[Any]) -> str:
    shown = ", ".join(printable(str(name), 80) for name in list(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _tied(entries: Mapping[str, Entry]) -> list[str]:
    """Names of one tensor: each is written on its own, since a cut may treat them differently."""
    first: dict[tuple[int, int, object], str] = {}
    tied = []
    for name, entry in entries.items():
        other = first.setdefault((entry.offset, entry.size, entry.view), name)
        if other != name and entry.size:
            tied.append(f"{name} = {other}")
    return [f"one tensor under two names, written under both: {_listed(tied)}"] if tied else []
