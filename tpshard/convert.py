"""Split, merge and reshard: each is a wanted layout, a way to name files, and the same copy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tpshard.adapter_folder import OF_THE_BASE, AskNames, Base, assign_by_base, open_with_base, recorded_base
from tpshard.assignment import Assigned
from tpshard.checkpoint import Checkpoint
from tpshard.companions import assign_stored
from tpshard.conversion import DEFAULT_MAX_SHARD_SIZE, Conversion, Options, hf_names
from tpshard.dcp_writing import InDistcp, InSafetensors, plan_dcp_safetensors, plan_distcp
from tpshard.engines.opening import NATIVE, Source
from tpshard.engines.whole import open_whole
from tpshard.engines.writing import plan_engine
from tpshard.errors import UsageError
from tpshard.folder import MANIFEST_NAME
from tpshard.header import byte_count
from tpshard.layout import Layout
from tpshard.library import choose_policy, policy_from_data
from tpshard.manifest import Manifest, shard_spans
from tpshard.mesh import Grid, Mesh
from tpshard.plan import Item, Output, Plain, Plan, arrange
from tpshard.policy import Policy
from tpshard.quantised import read_quantised
from tpshard.reframing import made_by_split, reframed
from tpshard.staging import check_target

CHUNKED = {"dcp": plan_distcp, "dcp-hf": plan_dcp_safetensors}  # stores of PyTorch's distributed checkpoints


def plan_split(
    source: Path | Source,
    target: Path,
    ranks: int | Grid,
    policy: str = "auto",
    options: Options = Options(),
    engine: str = NATIVE,
) -> Conversion:
    """Plan to cut a full checkpoint for tensor-parallel ranks, or a grid, in an engine's files; reads headers only.
    Raises any TpshardError."""
    given = source if isinstance(source, Source) else Source(source)
    if (given.folder / MANIFEST_NAME).exists():
        raise UsageError(f"{given.folder}: is a shard folder already", hint="tpshard reshard cuts it for other ranks")
    check_target(target, given.folder)
    checkpoint = open_whole(given, policy)
    chosen = choose_policy(policy, checkpoint.config)
    if checkpoint.container is not None and engine == NATIVE:
        checkpoint = replace(checkpoint, beside=checkpoint.container.around())
    return _to_ranks(checkpoint, target, Grid.of(ranks), chosen, options, engine)


def plan_adapter_split(
    source: Path,
    target: Path,
    ranks: int | Grid,
    base: Path,
    policy: str = "auto",
    options: Options = Options(),
    ask_names: AskNames = lambda base: {},
) -> Conversion:
    """Plan to cut a LoRA adapter as the policy cuts its base: a checkpoint's folder, or its config.json alone.
    ``ask_names``: who tells the names on disk of what a module calls otherwise."""
    if (source / MANIFEST_NAME).exists():
        raise UsageError(f"{source}: is a shard folder already", hint="tpshard reshard cuts it for other ranks")
    check_target(target, source)
    checkpoint, model = open_with_base(source, base, ask_names)
    chosen = choose_policy(policy, model.config)
    conversion = _adapter_to_shards(checkpoint, target, Grid.of(ranks), chosen, model, options)
    return replace(conversion, beside=model.files)


def plan_reshard(
    source: Path | Source,
    target: Path,
    ranks: int | Grid,
    policy: str | None = None,
    options: Options = Options(),
    engine: str = NATIVE,
) -> Conversion:
    """Plan to recut a folder of ranks' files for other ranks, or another engine, by the policy it was cut with unless
    another is given."""
    given = source if isinstance(source, Source) else Source(source)
    check_target(target, given.folder)
    checkpoint = given.open(policy or "auto")
    assert checkpoint.manifest is not None
    base = recorded_base(checkpoint)
    if policy is None:
        chosen = policy_from_data(checkpoint.manifest.policy_documents, str(given.folder / MANIFEST_NAME))
    else:
        chosen = choose_policy(policy, base.config if base else checkpoint.config)
    if base is not None:
        return _adapter_to_shards(checkpoint, target, Grid.of(ranks), chosen, base, options)
    return _to_ranks(checkpoint, target, Grid.of(ranks), chosen, options, engine)


def plan_merge(source: Path | Source, target: Path, options: Options = Options()) -> Conversion:
    """Plan to rebuild the full checkpoint: in the files it came in, or in parts of ``options.max_shard_size``."""
    given = source if isinstance(source, Source) else Source(source)
    check_target(target, given.folder)
    opened = given.open()
    assert opened.manifest is not None
    made = {*OF_THE_BASE, *made_by_split(opened.manifest, options.max_shard_size is None)}
    checkpoint = replace(opened, carried=tuple(name for name in opened.carried if name not in made))
    assert checkpoint.manifest is not None
    items = [Item(tensor, Layout.replicated(tensor.shape, 1)) for tensor in checkpoint.tensors.values()]
    if options.max_shard_size is None and checkpoint.manifest.sources:
        groups, names, metadata = _as_it_was(checkpoint.manifest, items)
    else:
        groups = arrange(items, 1, options.max_shard_size or DEFAULT_MAX_SHARD_SIZE)
        names = hf_names(len(groups))
        metadata = [{"format": "pt"}] * len(groups)
    outputs, first = [], 0
    for part, (group, name) in enumerate(zip(groups, names, strict=True)):
        outputs.append(Output(name, 0, part, first, first + len(group)))
        first += len(group)
    items = [item for group in groups for item in group]
    files = dict(zip(names, metadata, strict=True))
    arrangement = reframed(given.folder, checkpoint.manifest, files) or Plain(lambda output: metadata[output.part])
    plan = Plan(checkpoint, tuple(items), tuple(outputs), 1, arrangement)
    return Conversion(plan, target, None, {}, checkpoint.warnings, beside=checkpoint.beside)


# ---------------------------------------------------------------------------------------------- to shards


def _to_ranks(
    checkpoint: Checkpoint, target: Path, grid: Grid, policy: Policy, options: Options, engine: str
) -> Conversion:
    if engine in CHUNKED:
        return _to_chunks(checkpoint, target, grid, policy, engine)
    if engine != NATIVE:
        return plan_engine(checkpoint, target, grid, policy, options, engine)
    return _as_assigned(checkpoint, target, grid.mesh, policy, options, _assigned(checkpoint, policy, grid))


def _assigned(checkpoint: Checkpoint, policy: Policy, grid: Grid) -> Assigned:
    sizes = {name: byte_count(tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    quantised = read_quantised(checkpoint)
    return assign_stored(policy, checkpoint.config, checkpoint.shapes, sizes, grid, quantised)


def _to_chunks(checkpoint: Checkpoint, target: Path, grid: Grid, policy: Policy, engine: str) -> Conversion:
    """A store of chunks, which any ranks can load: it says itself what is where, and has no manifest."""
    assigned = _assigned(checkpoint, policy, grid)
    layouts = {name: assignment.layout for name, assignment in assigned.tensors.items()}
    plan = CHUNKED[engine](checkpoint, layouts, grid.mesh.ranks)
    assert isinstance(plan.arrangement, InDistcp | InSafetensors)
    return Conversion(
        plan,
        target,
        policy,
        {name: assignment.role for name, assignment in assigned.tensors.items()},
        checkpoint.warnings,
        mesh=grid.mesh,
        beside={**checkpoint.beside, **plan.arrangement.beside(plan)},
        engine=engine,
        manifest=False,
    )


def _adapter_to_shards(
    checkpoint: Checkpoint, target: Path, grid: Grid, policy: Policy, base: Base, options: Options
) -> Conversion:
    assigned, warnings = assign_by_base(policy, base, checkpoint, grid)
    conversion = _as_assigned(checkpoint, target, grid.mesh, policy, options, assigned)
    return replace(conversion, warnings=(*conversion.warnings, *warnings))


def _as_assigned(
    checkpoint: Checkpoint, target: Path, mesh: Mesh, policy: Policy, options: Options, assigned: Assigned
) -> Conversion:
    wanted = assigned.tensors
    items = [Item(tensor, wanted[name].layout) for name, tensor in checkpoint.tensors.items()]
    groups = arrange(items, mesh.ranks, options.max_shard_size or DEFAULT_MAX_SHARD_SIZE)
    outputs, first = [], 0
    for part, group in enumerate(groups):
        last = first + len(group)
        names = (shard_name(rank, mesh, part, len(groups)) for rank in range(mesh.ranks))
        outputs += [Output(name, rank, part, first, last) for rank, name in enumerate(names)]
        first = last
    items = [item for group in groups for item in group]
    describe = partial(_self_description, items, mesh, len(groups))
    plan = Plan(checkpoint, tuple(items), tuple(outputs), mesh.ranks, Plain(describe))
    unused = [f"{rule.mark}: rule '{rule.key}' matches no tensor" for rule in assigned.unused]
    roles = {name: assignment.role for name, assignment in wanted.items()}
    return Conversion(plan, target, policy, roles, (*checkpoint.warnings, *unused), mesh=mesh, beside=checkpoint.beside)


def shard_name(rank: int, mesh: Mesh, part: int, parts: int) -> str:
    """A rank's file.

    >>> shard_name(3, Mesh(8), 0, 1), shard_name(5, Mesh(tp=2, ep=2, pp=2), 1, 2)
    ('rank-00003-of-00008.safetensors', 'rank-00005-of-00008-pp1-ep0-tp1-part-00002-of-00002.safetensors')
    """
    place = "".join(f"-{axis}{at}" for axis, at in mesh.place(rank).items()) if mesh.is_grid else ""
    suffix = f"-part-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return f"rank-{rank:05d}-of-{mesh.ranks:05d}{place}{suffix}.safetensors"


def _self_description(items: Sequence[Item], mesh: Mesh, parts: int, output: Output) -> dict[str, str]:
    """What a shard file says of itself: enough to place every tensor in the whole without the manifest."""
    layouts: dict[Layout, int] = {}
    tensors = {
        item.stored.name: layouts.setdefault(item.want, len(layouts))
        for item in items[output.first : output.last]
        if item.want.shards[output.rank]
    }
    slices = [{"shape": list(own.shape), **shard_spans(own.shards[output.rank], own.shape)} for own in layouts]
    return {
        "format": "pt",
        "tpshard.version": "1",
        "tpshard.rank": str(output.rank),
        "tpshard.ranks": str(mesh.ranks),
        "tpshard.mesh": json.dumps(mesh.as_data(), separators=(",", ":")),
        "tpshard.part": str(output.part),
        "tpshard.parts": str(parts),
        "tpshard.slices": json.dumps(slices, separators=(",", ":")),
        "tpshard.tensors": json.dumps(tensors, separators=(",", ":"), ensure_ascii=False),
    }


# ---------------------------------------------------------------------------------------------- to full


def _as_it_was(
    manifest: Manifest, items: Sequence[Item]
) -> tuple[list[tuple[Item, ...]], list[str], list[Mapping[str, str]]]:
    """The original files: names, metadata, and each one's tensors in their order."""
    groups: list[list[Item]] = [[] for _ in manifest.sources]
    for item in items:
        groups[item.stored.source].append(item)
    kept = [(tuple(group), source) for group, source in zip(groups, manifest.sources, strict=True) if group]
    return [group for group, _ in kept], [source.name for _, source in kept], [source.metadata for _, source in kept]
