"""An engine's files: headers in either format, and what goes around the tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.engines.profile import Engine
from tpshard.errors import InputError, printable
from tpshard.frames import Frame, Tensor, safetensors_frame
from tpshard.header import Header, check_names, read_header
from tpshard.pickle_machine import Global
from tpshard.torch_files import read_torch_tree
from tpshard.torch_frames import torch_frame
from tpshard.torch_state import tensors_under

Around = Callable[[Sequence[Tensor]], Mapping[str, Any]]  # the values beside a file's tensors


def read_engine_file(
    path: Path, engine: Engine, inert: Collection[tuple[str, str]]
) -> tuple[Header, Mapping[Any, Any]]:
    """A file's tensors by the engine's names, and what a PyTorch file holds beside them."""
    if engine.format == "safetensors":
        return read_header(path), {}
    tree = read_torch_tree(path, [Global(module, name) for module, name in inert])
    value, beside = tree.value, tree.value
    for key in engine.inside:
        if isinstance(value, dict) and f"{key}0" in value:
            what = f"has '{key}0' and more: several stages on each rank (virtual pipeline) are not read"
            raise InputError(f"{path}: {what}", hint="save it without virtual stages")
        if not isinstance(value, dict) or key not in value:
            raise InputError(f"{path}: has no '{printable(key)}'", hint=f"is it a file of {engine.title}?")
        value = value[key]
    entries, _ = tensors_under(value, str(path))
    check_names(entries, str(path))
    start = min((entry.offset for entry in entries.values()), default=0)
    return Header(entries, {}, start, tree.file_size), beside if isinstance(beside, dict) and engine.inside else {}


def frame_of(engine: Engine, tensors: Sequence[Tensor], around: Around) -> Frame:
    """A rank's file. Constants come first, as part of what is known beforehand."""
    if engine.format == "safetensors":
        frame = safetensors_frame(tensors, {"format": "pt"} if engine.metadata else {})
        constants = b"".join(tensor.constant for tensor in tensors if tensor.constant is not None)
        return Frame(((0, frame.head + constants),), frame.starts, frame.size) if constants else frame
    tree: Mapping[str, Any] = {tensor.name: tensor for tensor in tensors}
    for key in reversed(engine.inside):
        tree = {key: tree}
    return torch_frame(tensors, {}, {**around(tensors), **tree} if engine.inside else tree)
