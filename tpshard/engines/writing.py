"""Writing an engine's files: which tensors are in which file, and where in it each rank's parts go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpshard.checkpoint import Checkpoint
from tpshard.companions import assign_stored
from tpshard.conversion import DEFAULT_MAX_SHARD_SIZE, Conversion, Options
from tpshard.engines.files import frame_of
from tpshard.engines.joints import LAYER, Joined, Joint, Logical, Part, join
from tpshard.engines.names import Template
from tpshard.engines.profile import Engine, Family
from tpshard.engines.readers.of import READERS
from tpshard.engines.rules import engine_policy, refuse_replicas, refuse_uneven
from tpshard.engines.settings.of import settings_of
from tpshard.engines.shelf import engine_called, families_for
from tpshard.errors import InputError, PolicyError, UsageError, printable
from tpshard.expressions import evaluate
from tpshard.folder import CONFIG, KEPT_CONFIG, read_bytes
from tpshard.frames import Frame, Tensor
from tpshard.header import DTYPE_ORDER, byte_count
from tpshard.mesh import Grid, Mesh
from tpshard.plan import Item, Output, Plan, Targets
from tpshard.policy import Policy
from tpshard.quantised import read_quantised
from tpshard.views import View


@dataclass(frozen=True, slots=True)
class EngineArrangement:
    """Where everything goes. ``parts``: the joints of each part, in the order of their items."""

    joined: Joined
    parts: tuple[tuple[Joint, ...], ...]
    in_order: bool = field(default=True)

    def frame(self, plan: Plan, output: Output) -> Frame:
        settings, rank = settings_of(self.joined.engine), output.rank
        return frame_of(
            self.joined.engine, self._tensors(output), lambda tensors: settings.objects(self.joined, rank, tensors)
        )

    def _tensors(self, output: Output) -> list[Tensor]:
        """Constants first, so that all that is known beforehand is at the begin."""
        own = [tensor for tensor, _ in self.joined.of_rank(output.rank, self.parts[output.part])]
        return [t for t in own if t.constant is not None] + [t for t in own if t.constant is None]

    def targets(self, plan: Plan, outputs: Sequence[Output], frames: Sequence[Frame | None]) -> Iterator[Targets]:
        joints = self.parts[outputs[0].part]
        constants = [len(list(self.joined.constants(joints, output.rank))) for output in outputs]
        starts = [
            iter(frame.starts[first:]) if frame else itertools.repeat(0)
            for frame, first in zip(frames, constants, strict=True)
        ]
        for joint in joints:
            begins: dict[int, list[int]] = {index: [0] * len(outputs) for index in joint.logical}
            views: dict[int, list[View | None]] = {index: [None] * len(outputs) for index in joint.logical}
            for rank in range(len(outputs)):
                found = self.joined.on_rank(joint, rank)
                if found is not None:
                    _place(found[1], next(starts[rank]), rank, begins, views)
            for index in joint.logical:
                yield Targets(tuple(begins[index]), tuple(views[index]) if any(views[index]) else None)


def _place(
    parts: Sequence[Part], start: int, rank: int, begins: dict[int, list[int]], views: dict[int, list[View | None]]
) -> None:
    for part in parts:
        begins[part.logical][rank] = start + part.offset
        views[part.logical][rank] = part.view


def plan_engine(
    checkpoint: Checkpoint, target: Path, grid: Grid, policy: Policy, options: Options, engine_name: str
) -> Conversion:
    """Plan to write a checkpoint as an engine has it. Raises PolicyError, InputError with the reason where it cannot
    hold it."""
    if engine_name in READERS:
        raise UsageError(f"folders of {READERS[engine_name].title} are read, not written", hint="see tpshard engines")
    engine = engine_called(engine_name)
    family = written_family(engine, checkpoint.config)
    grid = replace(grid, whole_experts=True) if engine.whole_experts else grid
    grid = _with_even_stages(engine, policy, checkpoint, grid) if engine.even_stages else grid
    left = {name: why for name in checkpoint.tensors if (why := reason_to_leave(family, name, checkpoint.config))}
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in left}
    _refuse_both(engine, family, kept, checkpoint.config)
    copies = _copies(family, kept)
    kept |= {name: replace(kept[of], name=name) for name, of in copies.items()}
    shapes = {name: tensor.shape for name, tensor in kept.items()}
    own = engine_policy(engine, family, policy, shapes, grid.mesh.tp)
    sizes = {name: byte_count(tensor.dtype, tensor.shape) for name, tensor in kept.items()}
    assigned = assign_stored(own, checkpoint.config, shapes, sizes, grid, read_quantised(checkpoint))
    refuse_replicas(engine, assigned, grid.mesh)
    refuse_uneven(engine, assigned)
    logical = [Logical(name, tensor.dtype, assigned.tensors[name].layout) for name, tensor in kept.items()]
    joined = join(engine, family, logical, grid.mesh, checkpoint.config)
    named = output_names(engine, grid.mesh)
    several = any("part" in template.places for template in engine.files)
    parts = arrange_joints(joined, (options.max_shard_size or DEFAULT_MAX_SHARD_SIZE) if several else None)
    items: list[Item] = []
    outputs: list[Output] = []
    for number, part in enumerate(parts):
        first = len(items)
        items += [Item(kept[logical[i].name], logical[i].layout) for joint in part for i in joint.logical]
        outputs += [Output(named(rank, number), rank, number, first, len(items)) for rank in range(grid.mesh.ranks)]
    in_order = engine.format == "safetensors" and not any(j.recipe.is_reordered for j in joined.joints)
    arrangement = EngineArrangement(joined, tuple(parts), in_order)
    plan = Plan(checkpoint, tuple(items), tuple(outputs), grid.mesh.ranks, arrangement)
    roles = {name: assigned.tensors[name].role for name in kept}
    beside = settings_of(engine).files(joined)
    plan = replace(plan, source=without(checkpoint, beside))
    return Conversion(
        plan,
        target,
        policy,
        roles,
        warnings=(*checkpoint.warnings, *(f"{name} {why}: left out" for name, why in left.items())),
        mesh=grid.mesh,
        beside={**checkpoint.beside, **kept_config(checkpoint, beside), **beside},
        engine=engine.name,
        copies=copies,
    )


def _refuse_both(engine: Engine, family: Family, names: Collection[str], config: Mapping[str, Any]) -> None:
    """Raises InputError where config.json ties the head, the checkpoint has one of its own, and the engine's loader
    goes by config.json: it would take one tensor for both."""
    tied = family.tied
    if tied is None or tied.name is None or not config.get("tie_word_embeddings"):
        return
    if tied.head in names and tied.embedding in names:
        what = f"config.json ties {tied.head} to {tied.embedding}, and the checkpoint has both"
        raise InputError(f"{engine.title}: {what}", hint="set tie_word_embeddings: false, or remove the head")


def written_family(engine: Engine, config: Mapping[str, Any]) -> Family:
    """The names to write. Raises InputError where they are only read."""
    family = families_for(engine, config)[0]
    if family.variant and not engine.variants[family.variant]:
        base = engine.name.partition(":")[0]
        writable = ", ".join(f"{base}:{name}" for name, writes in engine.variants.items() if writes)
        raise InputError(f"{engine.name}: these names are only read", hint=f"written are {writable}")
    return family


def _copies(family: Family, names: Collection[str]) -> dict[str, str]:
    """What the engine wants twice, by its second name: the embedding as head, where the model has no other."""
    tied = family.tied
    wanted = tied is not None and tied.copied and tied.head not in names and tied.embedding in names
    return {tied.head: tied.embedding} if tied is not None and wanted else {}


def _with_even_stages(engine: Engine, policy: Policy, checkpoint: Checkpoint, grid: Grid) -> Grid:
    """Raises PolicyError where other stages are asked for than the engine's loader takes."""
    if policy.stages is None or grid.mesh.pp == 1:
        return grid
    found = {policy.stages.layer(name) for name in checkpoint.tensors} - {None}
    each, more = divmod(len(found), grid.mesh.pp)
    even = tuple(each + (stage < more) for stage in range(grid.mesh.pp))
    if grid.layers not in ((), even):
        shown = ["+".join(map(str, layers)) for layers in (grid.layers, even)]
        raise PolicyError(f"{engine.title} deals layers as {shown[1]}, not {shown[0]}", hint="leave out --stages")
    return replace(grid, layers=even)


def without(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint without carried files of these names: the engine has its own."""
    return replace(checkpoint, carried=tuple(name for name in checkpoint.carried if name not in names))


def kept_config(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, bytes]:
    """The model's config.json under another name, where the engine has one of its own."""
    if CONFIG not in names:
        return {}
    if CONFIG in checkpoint.beside:
        return {KEPT_CONFIG: checkpoint.beside[CONFIG]}
    return {KEPT_CONFIG: read_bytes(checkpoint.folder / CONFIG)} if CONFIG in checkpoint.carried else {}


def reason_to_leave(family: Family, name: str, config: Mapping[str, Any]) -> str:
    """Why the engine has no place for a logical tensor, and needs none; empty for all others."""
    if family.layers is not None:
        template, layers = family.layers
        at = template.read(name)
        if at is not None and int(at[LAYER]) >= evaluate(str(layers), config):
            return f"is of a layer beyond {layers}, which the engine does not run"
    try:
        match = family.logical_names.find(name)
    except ValueError as error:
        raise InputError(f"{printable(name)}: {error}") from None
    return "follows from the configuration" if match is not None and match[0] is None else ""


def arrange_joints(joined: Joined, limit: int | None) -> list[tuple[Joint, ...]]:
    """Joints in groups, one for each part of a rank's files: a new part where any rank's would outgrow ``limit``
    bytes; inside a part wide dtypes first, so that every tensor is aligned to its element."""
    parts: list[list[Joint]] = [[]]
    filled = np.zeros(joined.mesh.ranks, np.int64)
    sizes: dict[tuple[object, ...], np.ndarray] = {}
    for joint in joined.joints:
        logical = [joined.logical[index] for index in joint.logical]
        key = (id(joint.recipe), *((tensor.layout, tensor.dtype) for tensor in logical))
        if key not in sizes:
            own = [[t.size for t, parts in joined.of_rank(rank, (joint,))] for rank in range(joined.mesh.ranks)]
            sizes[key] = np.array([sum(sizes) for sizes in own], np.int64)
        if limit is not None and parts[-1] and bool((filled + sizes[key] > limit).any()):
            parts.append([])
            filled[:] = 0
        parts[-1].append(joint)
        filled += sizes[key]

    def order(joint: Joint) -> tuple[int, str]:
        name = joint.recipe.name.fill(joint.values) if joined.engine.by_name else ""
        return DTYPE_ORDER[joint.recipe.dtype(joined.logical[joint.members[0][0]].dtype)], name

    return [tuple(sorted(part, key=order)) for part in parts]


def output_names(engine: Engine, mesh: Mesh) -> Callable[[int, int], str]:
    """A function that names the file of a rank and part. Raises PolicyError where the engine has no such grid."""
    if mesh.ep > 1:
        raise PolicyError(f"{engine.title}: groups of experts are not written", hint="leave out --ep")
    by_stage = [t for t in engine.files if ("pp" in t.places) == (mesh.pp > 1)]
    template = next((t for t in engine.files if "global" in t.places), by_stage[0] if by_stage else None)
    if template is None:
        raise PolicyError(f"{engine.title} has no pipeline stages", hint="leave out --pp")
    chosen: Template = template

    def name(rank: int, part: int) -> str:
        at = mesh.coordinates(rank)
        values = {
            "rank": at.tp,
            "global": rank,
            "tp": at.tp,
            "pp": at.pp,
            "part": part,
            "ranks": mesh.ranks,
            "iteration": 0,
        }
        return chosen.fill({place: str(values[place]) for place in chosen.places})

    return name
