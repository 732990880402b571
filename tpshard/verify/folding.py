"""A grid of ranks as the model checks run it: one rank for every place in a stage, each layer's cells counted once.

A pipeline's ranks at one place follow one another, so together they are one rank that has all layers. Groups of
experts stay apart: each adds what its experts give; whatever all groups have alike counts in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tpshard.checkpoint import Checkpoint, Place, Stored
from tpshard.layout import Layout, Shard
from tpshard.mesh import Mesh

Shards = tuple[Shard | None, ...]


def fold(shards: Checkpoint) -> Checkpoint:
    """The same tensors for ``ep * tp`` ranks; a folder without a grid is as it was."""
    assert shards.manifest is not None
    mesh = shards.manifest.mesh
    if not mesh.is_grid:
        return shards
    folded = fold_stages(shards)
    tensors = folded.tensors.values()
    summed = {_layer(tensor) for tensor in tensors if tensor.role.rule == "row" and _is_cut(tensor.layout, mesh)}
    counted = {
        tensor.name: _counted_once(tensor, mesh, _layer(tensor) in summed) if tensor.role.rule == "row" else tensor
        for tensor in tensors
    }
    return replace(folded, tensors=counted)


def fold_stages(shards: Checkpoint) -> Checkpoint:
    """The same tensors for ``ep * tp`` ranks, all copies kept."""
    assert shards.manifest is not None
    mesh = shards.manifest.mesh
    if not mesh.is_grid:
        return shards
    tensors = {name: _of_all_stages(tensor, mesh) for name, tensor in shards.tensors.items()}
    return replace(shards, ranks=mesh.ep * mesh.tp, tensors=tensors)


def _layer(tensor: Stored) -> str:
    return tensor.name.rpartition(".")[0]


def _of_all_stages(tensor: Stored, mesh: Mesh) -> Stored:
    """Each place's shard from the first stage that has one: if others do, the weights check has compared them."""
    size = mesh.ep * mesh.tp
    ranks = [
        next((rank for rank in range(place, mesh.ranks, size) if tensor.layout.shards[rank] is not None), place)
        for place in range(size)
    ]
    return _with(tensor, [tensor.layout.shards[rank] for rank in ranks], [tensor.places[rank] for rank in ranks])


def _with(tensor: Stored, shards: Sequence[Shard | None], places: Sequence[Place | None]) -> Stored:
    return replace(tensor, layout=Layout(tensor.shape, tuple(shards)), places=tuple(places))


def _groups(layout: Layout, mesh: Mesh) -> list[Shards]:
    return [layout.shards[begin : begin + mesh.tp] for begin in range(0, mesh.ep * mesh.tp, mesh.tp)]


def _is_cut(layout: Layout, mesh: Mesh) -> bool:
    """Whether the ranks of some group have different parts."""
    return any(len(set(group)) > 1 for group in _groups(layout, mesh))


def _counted_once(tensor: Stored, mesh: Mesh, summed: bool) -> Stored:
    """A row layer's tensor without the copies that its engine does not add: those of other groups; and, of a layer
    whose ranks are summed, a bias that all ranks of a group have."""
    if tensor.layout.is_replicated:
        return tensor
    cut, groups = _is_cut(tensor.layout, mesh), _groups(tensor.layout, mesh)
    kept = [
        None if shard in (other[at] for other in groups[:number]) or (at > 0 and summed and not cut) else shard
        for number, group in enumerate(groups)
        for at, shard in enumerate(group)
    ]
    places = [place if shard else None for place, shard in zip(tensor.places, kept, strict=True)]
    return _with(tensor, kept, places)
