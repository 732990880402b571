"""Which tensors of a distributed checkpoint are the model's weights, and what they are called without what leads to
them.

A state dict is often saved nested, as ``{"model": …, "optim": …}``; its names are then ``model.layers.0…``, and the
metadata keeps the keys that led to each. So a key that led to the weights can be told from the first word of their own
names, which may well be ``model`` too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tpshard.errors import InputError, printable
from tpshard.torch_state import BESIDE, KEYS

AROUND = ("app", "app_state", *KEYS)  # keys that lead to weights, in the order in which they are looked for
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DcpNames:
    """``full``: the name in the checkpoint of each weight, by its own."""

    full: Mapping[str, str]
    warnings: tuple[str, ...]


def chosen_names(
    tensors: Collection[str], objects: Collection[str], paths: Mapping[str, Path], key: str | None, where: str
) -> DcpNames:
    """The weights. Raises InputError where there are none.

    >>> paths = {"model.a.w": ("model", "a.w"), "optim.a.w": ("optim", "a.w")}
    >>> chosen_names(["model.a.w", "optim.a.w"], [], paths, None, "x")
    DcpNames(full={'a.w': 'model.a.w'}, warnings=('left out, with its tensors: optim (1)',))
    """
    path_of = {name: paths.get(name, (name,)) for name in (*tensors, *objects)}
    lead: Path = ()
    if key is not None:
        wanted = {name for name in tensors if name.startswith(f"{key}.")}
        if not wanted:
            raise InputError(f"{where}: holds no tensors under '{printable(key)}'", hint=f"it holds {_tops(path_of)}")
        full = {name[len(key) + 1 :]: name for name in tensors if name in wanted}
        inside = [name for name in objects if name.startswith(f"{key}.")]
        return DcpNames(full, _left_out([n for n in tensors if n not in wanted], inside, path_of, ()))
    while (step := _next_step(tensors, path_of, lead)) is not None:
        lead = (*lead, step)
    depth = len(lead)
    full, others = {}, []
    for name in tensors:
        path = path_of[name]
        if path[:depth] == lead and not _is_beside(path[depth:]):
            full[".".join(path[depth:])] = name
        else:
            others.append(name)
    if not full:
        raise InputError(f"{where}: holds no weights, but {_tops(path_of)}")
    inside = [n for n in objects if path_of[n][:depth] == lead and not _is_beside(path_of[n][depth:])]
    return DcpNames(full, _left_out(others, inside, path_of, lead))


def _next_step(tensors: Iterable[str], path_of: Mapping[str, Path], lead: Path) -> str | None:
    """The key below ``lead`` that leads on to the weights; None where they are there."""
    depth = len(lead)
    below = {
        path_of[name][depth] for name in tensors if path_of[name][:depth] == lead and len(path_of[name]) > depth + 1
    }
    return next((known for known in AROUND if known in below), None)


def _is_beside(path: Path) -> bool:
    """Whether a key is known to lead to no weights. A name of one key is a weight's."""
    words = path[0].lower().replace("-", "_").split("_")
    return len(path) > 1 and any(word in BESIDE for word in words)


def _left_out(others: list[str], inside: list[str], path_of: Mapping[str, Path], lead: Path) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for name in others:
        path, shared = path_of[name], 0
        while shared < min(len(lead), len(path) - 1) and path[shared] == lead[shared]:
            shared += 1
        top = ".".join(path[: shared + 1])
        counts[top] = counts.get(top, 0) + 1
    warnings = []
    if counts:
        shown = _listed([f"{top} ({count})" for top, count in sorted(counts.items())])
        warnings.append(f"left out, with its tensors: {shown}")
    if inside:
        warnings.append(f"left out, as it is no tensor: {_listed(sorted(inside))}")
    return tuple(warnings)


def _tops(path_of: Mapping[str, Path]) -> str:
    return "tensors under " + _listed(sorted({path[0] for path in path_of.values()}))


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name, 80) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
