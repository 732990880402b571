"""DeepSpeed's training checkpoints: ``latest`` names a step's folder, in which each tensor-parallel rank has a file of
model states with its part of the weights under ``module``, as the training has them (ZeRO 1 and 2, or none).

Where several ranks hold parts, DeepSpeed's own record says which (since 0.19); older folders are read by policy, shapes
and samples. The optimizer's states, its FP32 copies among them, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpshard.checkpoint import Checkpoint
from tpshard.engines.names import Template
from tpshard.engines.readers.cuts import Cuts, check_same_names
from tpshard.engines.readers.deepspeed_map import Record
from tpshard.engines.readers.deepspeed_steps import INERT, is_own, step_of
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.engines.readers.reading import Held, Own, Reading
from tpshard.engines.readers.samples import Samples
from tpshard.errors import InputError, printable
from tpshard.layout import Layout
from tpshard.policy import Policy

STATES = Template("mp_rank_<tp:02>_model_states.pt")
HEADS = ("lm_head", "embed_out")
_ZERO_3 = Template("zero_pp_rank_<dp>_mp_rank_<tp:02>_model_states.pt")
_LAYER = re.compile(r"layer_[0-9]+-model_[0-9]+-model_states\.pt")
_EXPERT = re.compile(r"(layer_[0-9]+_)?expert_[0-9]+_mp_rank_[0-9]+_model_states\.pt")
_OF_THE_RUN = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size", "ds_version")


def recognises(folder: Path) -> bool:
    """A universal checkpoint has copies of these files, too, beside its folder ``zero``."""
    try:
        step = step_of(folder, "latest")
    except InputError:
        return (folder / "zero_to_fp32.py").is_file()  # opening it says what is wrong
    return not (folder / step / "zero").is_dir() and bool(_files(folder, step))


def _files(folder: Path, step: str) -> list[str]:
    """All model states of a step, by name."""
    names = sorted(path.name for path in (folder / step).iterdir())
    known = (STATES.read, _ZERO_3.read, _LAYER.fullmatch, _EXPERT.fullmatch)
    return [name for name in names if any(read(name) for read in known)]


def open_training(asked: Asked) -> Checkpoint:
    """Raises InputError where the weights are not in these files, or not as the model has them."""
    step = step_of(asked.folder, "latest")
    names = _files(asked.folder, step)
    _refuse_others(asked.folder / step, names)
    reading = Reading(asked)
    states = [_state(reading, f"{step}{name}", rank) for rank, name in enumerate(names)]
    for rank, (name, (state, _)) in enumerate(zip(names, states, strict=True)):
        _check_run(asked.folder / step / name, state, states[0][0], names[0], len(names))
        _check_shapes(reading, asked.folder / step / name, state, states[rank][1])
    held, policy = _held(reading, [state for state, _ in states], [own for _, own in states])
    _warn_of_ties(reading, states[0][1])
    return reading.checkpoint(READER.name, len(names), held, policy, lambda name: is_own(name, step))


def _refuse_others(folder: Path, names: Sequence[str]) -> None:
    """Raises InputError unless there is one file for each rank, and no others."""
    for name in names:
        if _ZERO_3.read(name):
            what = f"{folder}: was saved by ZeRO 3, which keeps weights in the optimizer's files only"
            raise InputError(what, hint="run its zero_to_fp32.py, or DeepSpeed's ds_to_universal.py")
        if _LAYER.fullmatch(name):
            what = f"{folder}: has a file for each layer of a pipeline, whose tensors have no names of the model"
            raise InputError(what, hint="convert it with the trainer's own script to Hugging Face first")
        if _EXPERT.fullmatch(name):
            raise InputError(f"{folder}: has its experts in files of their own, which are not read")
    ranks = sorted(int(values["tp"]) for name in names if (values := STATES.read(name)))
    if not ranks:
        raise InputError(f"{folder}: holds no mp_rank_XX_model_states.pt", hint="is it the folder with 'latest'?")
    for rank in range(ranks[-1] + 1):
        if rank not in ranks:
            what = f"{folder}: {STATES.fill({'tp': str(rank)})} is not there, that of rank {ranks[-1]} is"
            raise InputError(what, hint="is the folder complete?")


def _state(reading: Reading, name: str, rank: int) -> tuple[Mapping[Any, Any], dict[str, Own]]:
    """A rank's file: all it says, and its tensors."""
    file, tree = reading.torch(name, rank, INERT)
    if not isinstance(tree.value, dict) or not isinstance(tree.value.get("module"), dict):
        what = f"{reading.folder / name}: has no table 'module'"
        raise InputError(what, hint="a pipeline's weights are in files of its layers, which are not there")
    return tree.value, reading.tensors(tree.value["module"], file)


def _check_run(path: Path, state: Mapping[Any, Any], first: Mapping[Any, Any], other: str, ranks: int) -> None:
    """Raises InputError where files are of different steps or runs."""
    for key in _OF_THE_RUN:
        if state.get(key) != first.get(key):
            here, there = (printable(str(given.get(key)), 40) for given in (state, first))
            raise InputError(f"{path}: {key} is {here}, in {other} {there}", hint="were two steps or runs mixed?")
    said = state.get("mp_world_size")
    if type(said) is int and said != ranks:
        what = f"{path}: is of {said} tensor-parallel ranks (mp_world_size), there are files of {ranks}"
        raise InputError(what, hint="is the folder complete?")


def _check_shapes(reading: Reading, path: Path, state: Mapping[Any, Any], own: Mapping[str, Own]) -> None:
    """The file lists the shapes of all that was trained, and of what was not: each must be among the weights."""
    groups = state.get("param_shapes")
    for group in groups if isinstance(groups, list) else []:
        for name, shape in group.items() if isinstance(group, dict) else ():
            if name not in own:
                raise InputError(f"{path}: lacks {printable(str(name))}, which it says was trained")
            if shape != own[name].entry.shape:
                what = f"{path}: {printable(str(name))} is {list(own[name].entry.shape)}, param_shapes says {shape}"
                raise InputError(what, hint="if it was saved by ZeRO 3, run its zero_to_fp32.py")
    frozen = state.get("frozen_param_shapes")
    for name in frozen if isinstance(frozen, dict) else ():
        if name not in own:
            reading.warn(f"{printable(str(name))} was frozen and not saved: it is not in this checkpoint")


def _held(
    reading: Reading, states: Sequence[Mapping[Any, Any]], ranks: Sequence[Mapping[str, Own]]
) -> tuple[dict[str, Held], Policy | None]:
    """All tensors, and the model's policy if one is known."""
    info = states[0].get("universal_checkpoint_info")
    record = Record(info, str(reading.files[0].path))
    if len(ranks) > 1 and not record:
        policy = reading.policy(needed=True)
        assert policy is not None
        with Samples(reading.folder, reading.files) as samples:
            return Cuts(policy, reading.config, samples, HEADS).held(ranks), policy
    check_same_names(ranks)
    held = {}
    for name, first in ranks[0].items():
        own = [rank[name] for rank in ranks]
        layout = record.layout(name, len(ranks)) if len(ranks) > 1 else Layout.replicated(first.entry.shape, 1)
        if layout is None:
            layout = _unrecorded(reading, name, own)
        for rank, (tensor, shard) in enumerate(zip(own, layout.shards, strict=True)):
            wanted = first.entry.dtype, shard.shape if shard else None
            if (tensor.entry.dtype, tensor.entry.shape) != wanted:
                raise InputError(
                    f"{reading.files[tensor.file].path}: {printable(name)}: {tensor.entry.dtype} "
                    f"{list(tensor.entry.shape)}, recorded for rank {rank} is {wanted[0]} {list(wanted[1] or ())}"
                )
        held[name] = Held(first.entry.dtype, layout, tuple(tensor.place for tensor in own))
    return held, reading.policy(needed=False)


def _unrecorded(reading: Reading, name: str, own: Sequence[Own]) -> Layout:
    """Buffers and second names of one tensor are not in the record: they are taken where all ranks have the same."""
    shapes = {tensor.entry.shape for tensor in own}
    with Samples(reading.folder, reading.files) as samples:
        if len(shapes) == 1 and samples.compare(own).same:
            return Layout.replicated(own[0].entry.shape, len(own))
    raise InputError(f"{reading.files[0].path}: its affine_map lacks {printable(name)}, of which ranks hold parts")


def _warn_of_ties(reading: Reading, own: Mapping[str, Own]) -> None:
    first: dict[object, str] = {}
    for name, tensor in own.items():
        other = first.setdefault(tensor.place, name)
        if other != name and tensor.entry.size:
            reading.warn(f"{printable(name)} is {printable(other)}, one tensor under two names: kept under both")


READER = Reader(
    name="deepspeed",
    title="DeepSpeed training, ZeRO 1 and 2",
    files="<step>/mp_rank_XX_model_states.pt",
    description="The weights of mp_rank_XX_model_states.pt, in the names of the module that was trained. Parts are "
    "joined by DeepSpeed's own record (affine_map), or by policy, shapes and samples. Optimizer states are left out.",
    recognises=recognises,
    open=open_training,
)
