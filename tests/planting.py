"""How a fault gets into a shard folder: by a wrong policy, a wrong layout, another source, or changed bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests import quantised_models
from tests.architectures import architectures
from tests.proof import save
from tests.tampering import NUMPY, Folder, Tensors, read_file, write_file
from tests.tiny_models import SIZES, save_model
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.layout import Layout, Shard, Span
from tpshard.library import choose_policy
from tpshard.mesh import Grid, Mesh
from tpshard.plan import Item
from tpshard.roles import Role

Plant = Callable[[Path, Path, int], Path | None]
"""From a source makes a wrong shard folder for so many ranks; returns what to verify it against, if not the source."""

Arrays = dict[str, np.ndarray]

# ---------------------------------------------------------------------------------------------- models

KEY_VALUE_HEADS = 2  # of six heads: dealt at tp 2, replicated at 6


def eight_heads(model_type: str) -> dict[str, Any]:
    """Eight heads of ten; of nine in encoders."""
    match model_type:
        case "gpt2":
            return {"n_embd": 72, "n_head": 8}
        case "distilbert":
            return {"dim": 72, "n_heads": 8}
    hidden = SIZES[model_type]["hidden_size"]
    return {"num_attention_heads": 8, "hidden_size": {60: 80, 66: 72}.get(hidden, hidden)}


def make_model(key: str, folder: Path) -> None:
    """``qwen2``, or with a variant: ``/k3`` three key-value heads, for three ranks; ``/h8`` eight query heads, for
    four; ``/zero`` no biases but zeros; ``/equal`` key-value heads that are all alike; ``/buffers`` a mask's scalar;
    ``/square`` experts with as many channels as hidden cells; ``/six`` six experts; ``/gptq`` and other formats: quantised."""
    model_type, _, variant = key.partition("/")
    if variant in quantised_models.FORMATS:
        quantised_models.save(variant, folder)
        return
    if model_type not in SIZES:
        (found,) = (one for one in architectures() if one.name == model_type)
        more = {"square": {"intermediate_size": found.sizes.get("hidden_size")}, "six": {"num_local_experts": 6}}
        save(dataclasses.replace(found, sizes={**found.sizes, **more.get(variant, {})}), folder)
        return
    changes = eight_heads(model_type) if variant == "h8" else {}
    save_model(model_type, folder, 3 if variant == "k3" else KEY_VALUE_HEADS, **changes)
    match variant:
        case "zero":
            change_source(folder, lambda arrays: [a.fill(0) for name, a in arrays.items() if name.endswith("bias")])
        case "equal":
            change_source(folder, _make_heads_equal)
        case "buffers":
            change_source(folder, lambda arrays: arrays.update({"h.0.attn.masked_bias": np.float32(-1e4).reshape(())}))


def _make_heads_equal(arrays: Arrays) -> None:
    for name, array in arrays.items():
        if "k_proj" in name or "v_proj" in name:
            array[10:] = array[:10]


def change_source(folder: Path, change: Callable[[Arrays], object]) -> None:
    """Change the tensors of a full checkpoint in place: as arrays, by name."""
    path = folder / "model.safetensors"
    metadata, tensors = read_file(path)
    arrays = {n: np.frombuffer(data, NUMPY[dtype]).reshape(shape).copy() for n, (dtype, shape, data) in tensors.items()}
    change(arrays)
    names = {np.dtype(numpy): name for name, numpy in NUMPY.items()}
    made: Tensors = {name: (names[a.dtype], list(a.shape), a.tobytes()) for name, a in arrays.items()}
    write_file(path, metadata, made)


# ---------------------------------------------------------------------------------------------- planting


def split_rightly(source: Path, target: Path, tp: int) -> None:
    run(plan_split(source, target, tp))


def policy_fault(rules: str) -> Plant:
    """Split by a policy that is wrong in ``rules`` and otherwise the built-in one."""

    def plant(source: Path, target: Path, tp: int) -> None:
        base = choose_policy("auto", json.loads((source / "config.json").read_text())).name
        policy = target.parent / "wrong.yaml"
        policy.write_text(f"name: wrong\nextends: {base}\nrules:\n" + "".join(f"  {r}\n" for r in rules.split("\n")))
        run(plan_split(source, target, tp, str(policy)))

    return plant


def disguised(plant: Plant) -> Plant:
    """The manifest says that the built-in policy was followed."""

    def disguise(source: Path, target: Path, tp: int) -> None:
        plant(source, target, tp)
        folder = Folder(target)
        base = choose_policy("auto", json.loads((target / "config.json").read_text())).name
        folder.edit(lambda manifest: manifest["policy"].update(name=base), seal=True)

    return disguise


def layout_fault(part_of_name: str, change: Callable[[Layout], Layout], role: Role | None = None) -> Plant:
    """Split with the layout (and role) of all tensors whose name holds ``part_of_name`` changed, and recorded so."""

    def plant(source: Path, target: Path, tp: int) -> None:
        conversion = plan_split(source, target, tp)
        hit = [item.stored.name for item in conversion.plan.items if part_of_name in item.stored.name]
        assert hit, part_of_name
        items = tuple(
            Item(item.stored, change(item.want)) if item.stored.name in hit else item for item in conversion.plan.items
        )
        roles = {name: role if role and name in hit else old for name, old in conversion.roles.items()}
        plan = dataclasses.replace(conversion.plan, items=items)
        run(dataclasses.replace(conversion, plan=plan, roles=roles))

    return plant


def experts_dealt_in_turn(source: Path, target: Path, tp: int) -> None:
    """Two groups of experts, of which one has the even and the other the odd ones, in place of a run each."""
    conversion = plan_split(source, target, Grid(Mesh(tp=tp, ep=2)))
    wanted = {item.stored.name: item.want for item in conversion.plan.items}

    def in_turn(name: str) -> Layout:
        expert = re.search(r"(?<=experts\.)\d+", name)
        if expert is None:
            return wanted[name]
        of_group = (0, 5)[int(expert[0]) % 2]  # the first and the last of six
        return wanted[name[: expert.start()] + str(of_group) + name[expert.end() :]]

    items = tuple(Item(item.stored, in_turn(item.stored.name)) for item in conversion.plan.items)
    run(dataclasses.replace(conversion, plan=dataclasses.replace(conversion.plan, items=items)))


def source_fault(change: Callable[[Arrays], object]) -> Plant:
    """Split a source that was changed before: its rows in the order of another convention."""

    def plant(source: Path, target: Path, tp: int) -> None:
        other = target.parent / "changed"
        shutil.copytree(source, other)
        change_source(other, change)
        run(plan_split(other, target, tp))

    return plant


def changed_after(change: Callable[[Arrays], object]) -> Plant:
    """Split rightly; verify against a source that was changed since."""

    def plant(source: Path, target: Path, tp: int) -> Path:
        run(plan_split(source, target, tp))
        other = target.parent / "changed"
        shutil.copytree(source, other)
        change_source(other, change)
        return other

    return plant


def folder_fault(change: Callable[[Folder], object], reseal: bool) -> Plant:
    """Split rightly, then change the folder; ``reseal``: and make manifest and digests agree with what was done."""

    def plant(source: Path, target: Path, tp: int) -> None:
        run(plan_split(source, target, tp))
        folder = Folder(target)
        change(folder)
        if reseal:
            folder.reseal()

    return plant


# ---------------------------------------------------------------------------------------------- wrong layouts


def same(layout: Layout) -> Layout:
    return layout


def reverse(layout: Layout) -> Layout:
    return Layout(layout.shape, layout.shards[::-1])


def whole(layout: Layout) -> Layout:
    return Layout.replicated(layout.shape, layout.ranks)


def along(axis: int, edges: list[int], own: int = 0) -> Callable[[Layout], Layout]:
    """Cut along an axis at ``edges``, the ranks' own tensors ``own`` long (0: as long as what they hold)."""

    def change(layout: Layout) -> Layout:
        runs = [(Span(a, b),) for a, b in itertools.pairwise(edges)]
        return Layout.along(layout.shape, axis, runs, [own or run.size for (run,) in runs])

    return change


def like_a_column(layout: Layout) -> Layout:
    """Cut a one-dimensional tensor evenly."""
    size, ranks = layout.shape[0], layout.ranks
    return along(0, [size * rank // ranks for rank in range(ranks + 1)])(layout)


def inside_heads(layout: Layout) -> Layout:
    """Cut the axis that counts cells of a head."""
    size, ranks = layout.shape[1], layout.ranks
    return along(1, [size * rank // ranks for rank in range(ranks + 1)])(layout)


def last_rank_takes_more(layout: Layout) -> Layout:
    """Cut the first axis so that the last rank has the remainder."""
    size, ranks = layout.shape[0], layout.ranks
    return along(0, [size // ranks * rank for rank in range(ranks)] + [size])(layout)


def remainder_lost(layout: Layout) -> Layout:
    """Cut the first axis into equal parts; nobody holds what is left over."""
    size, ranks = layout.shape[0] - 1, layout.ranks
    return along(0, [size // ranks * rank for rank in range(ranks + 1)])(layout)


def modulo_heads(layout: Layout) -> Layout:
    """More ranks than key-value heads: rank r has head r modulo their number, in place of runs of ranks."""
    each = len({shard for shard in layout.shards if shard})
    dealt: list[Shard | None] = [layout.shards[layout.ranks // each * (rank % each)] for rank in range(layout.ranks)]
    return Layout(layout.shape, tuple(dealt))


def overlapping_row(layout: Layout) -> Layout:
    """Rank 0 of two also holds the first row of rank 1."""
    size = layout.shape[0]
    half = (size + 1) // 2
    return Layout.along(layout.shape, 0, [(Span(0, half + 1),), (Span(half, size),)], [half + 1, size - half])


# ---------------------------------------------------------------------------------------------- other conventions


def rows_moved(parts: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> Callable[[Arrays], None]:
    """For tensors whose name holds a key: the first axis in another order."""

    def change(arrays: Arrays) -> None:
        hit = [(name, order) for name in arrays for part, order in parts.items() if part in name]
        assert hit, parts
        for name, order in hit:
            arrays[name] = arrays[name][order(np.arange(len(arrays[name])))]

    return change


def columns_moved(part: str, order: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    """The same along the last axis."""

    def change(arrays: Arrays) -> None:
        for name in [name for name in arrays if part in name]:
            arrays[name] = np.ascontiguousarray(arrays[name][..., order(np.arange(arrays[name].shape[-1]))])

    return change


def halves_to_pairs(rows: np.ndarray) -> np.ndarray:
    """Within each head of ten, from rotating halves (Hugging Face) to neighbouring pairs (Meta)."""
    return rows.reshape(-1, 2, 5).swapaxes(1, 2).reshape(-1)


def blocks_exchanged(one: int, other: int, of: int) -> Callable[[np.ndarray], np.ndarray]:
    """Equal blocks of the axis, two of which change places."""
    order = list(range(of))
    order[one], order[other] = other, one
    return lambda rows: rows.reshape(of, -1)[order].reshape(-1)


def dealt_by_rank(blocks: int, ranks: int) -> Callable[[np.ndarray], np.ndarray]:
    """From [q; k; v] to [q0 k0 v0 q1 k1 v1]."""
    return lambda rows: rows.reshape(blocks, ranks, -1).swapaxes(0, 1).reshape(-1)
