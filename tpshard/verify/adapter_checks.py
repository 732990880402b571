"""The checks that run the model, of an adapter merged into its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from tpshard.adapter_folder import Base, adapter_of, with_names
from tpshard.adapter_layout import Names, place_targets
from tpshard.assignment import assign
from tpshard.checkpoint import Checkpoint
from tpshard.errors import InconclusiveError, InputError, PolicyError, printable
from tpshard.layout import Shape
from tpshard.library import policy_from_data
from tpshard.verify.adapter_weights import BaseWeights, MergedWeights, misfits
from tpshard.verify.disk_names import disk_names
from tpshard.verify.generic import GenericWeights
from tpshard.verify.model_checks import ModelRequest, check_model
from tpshard.verify.models import TransformersModel, slots
from tpshard.verify.preparation import default_dtype
from tpshard.verify.report import CheckResult, Finding
from tpshard.verify.values import StoredWeights, Weights

OWN = "with the adapter merged into the base's own weights"
RANDOM = "with the adapter merged into random weights: of the base only config.json is known (--base FOLDER)"
UNKNOWN_DTYPE = "F32"  # of weights that are not there: of the figures beside the verdict


def check_adapter_model(
    shards: Checkpoint, source: Checkpoint | None, base: Base, request: ModelRequest
) -> Iterator[CheckResult]:
    """Forward, backward and what belongs to them, with the adapter merged into the base on both sides. Random weights
    stand for the base's where its folder is not given; a remark says so."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(StoredWeights(shards, source))
        whole = stack.enter_context(StoredWeights(base.checkpoint, None)) if base.checkpoint else None
        try:
            weights, wrong = merged_weights(shards, own, base, whole, request)
        except (InconclusiveError, InputError, PolicyError) as error:
            yield CheckResult("forward", unproven=str(error))
            return
        if wrong:
            yield CheckResult("forward", wrong, {"tensors": len(shards.tensors), "ranks": shards.ranks})
            return
        for result in check_model(weights, request):
            remark = (OWN if whole else RANDOM,) if result.name == "forward" else ()
            yield replace(result, notes=(*result.notes, *remark))
    if base.checkpoint is not None:
        base.checkpoint.check_unchanged()


def merged_weights(
    shards: Checkpoint, own: Weights, base: Base, whole: Weights | None, request: ModelRequest
) -> tuple[MergedWeights, tuple[Finding, ...]]:
    """The merged weights, and where they cannot be had of a rank's own."""
    assert shards.manifest is not None
    policy = policy_from_data(shards.manifest.policy_documents, str(shards.folder))
    adapter = adapter_of(shards)
    dtypes, shapes = _tensors_of(base, request)
    known = base if request.factory else with_names(base, adapter, disk_names)
    disk = Names(shapes, known.renamed)
    placed = place_targets(policy, adapter, shapes, disk)
    for place in placed:
        if not place.known:
            what = f"the base has no tensor {printable(place.target.weight)}: is it tied to another, or converted?"
            hint = "an adapter of such a layer is not merged here" if whole else "give the base's folder with --base"
            raise InconclusiveError(what, hint=hint)
    assigned = assign(policy, base.config, shapes, shards.ranks).tensors
    tensors: Weights = BaseWeights(dtypes, assigned, shards.ranks, base.config, base.place, whole)
    wrong = tuple(Finding(what, tensor=name, rank=rank) for name, rank, what in misfits(tensors, own, placed))
    for place in placed:
        if place.target.bias and f"{place.name.rpartition('.')[0]}.bias" not in shapes:
            raise InconclusiveError(f"{place.target.bias}: the base's layer has no bias to add it to")
    replaced = {disk.find(name) or name: tensor for name, tensor in adapter.replaced.items()}
    return MergedWeights(tensors if whole else GenericWeights(tensors), own, placed, replaced), wrong


def _tensors_of(base: Base, request: ModelRequest) -> tuple[Mapping[str, str], Mapping[str, Shape]]:
    """The dtypes and shapes of a base's tensors: from its files, or as transformers makes it of its config.json."""
    if base.checkpoint is not None:
        if base.shapes is None:
            raise InconclusiveError("the base is quantised: its numbers are not read", hint="--base CONFIG.json")
        return {name: tensor.dtype for name, tensor in base.checkpoint.tensors.items()}, base.shapes
    if request.factory:
        raise InconclusiveError("--model names no tensors on disk", hint="give the base's folder with --base")
    with default_dtype(torch.float64):
        model = TransformersModel(base.place, base.config, None, torch.float64)
    shapes = {name: tuple(tensor.shape) for name, tensor in slots(model.skeleton).items() if name in model.names}
    return dict.fromkeys(shapes, UNKNOWN_DTYPE), shapes
