"""nanotron's checkpoints of Llama: a safetensors file for each parameter and rank, which says itself what it holds.

The metadata of a file lists pairs of slices, the rank's own and the whole's; a file without them is whole. Q, K and V
are rows of one tensor, as are the MLP's two ways up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tpshard.checkpoint import Checkpoint, Place
from tpshard.engines.names import Dictionary, Template
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.engines.readers.nanotron_config import CONFIG, hf_config, rows_of
from tpshard.engines.readers.pieces import shard_of
from tpshard.engines.readers.reading import Held, Own, Reading
from tpshard.engines.readers.rows import rows_between
from tpshard.errors import InputError, printable
from tpshard.header import Entry
from tpshard.layout import Box, Layout, Piece, Shape, Shard

_FILE = re.compile(
    r"model_(?P<last>[a-z_]+)(_pp-rank-(?P<pp>\d{1,4})-of-\d{1,4}_tp-rank-(?P<tp>\d{1,4})-of-(?P<ranks>\d{1,4})"
    r"(?P<exp>_exp-rank-\d{1,4}-of-\d{1,4})?)?\.safetensors"
)
_NUMPY = re.compile(r"np\.int64\((\d+)\)")
_SHAPE = re.compile(r"\((\d{1,12}(, ?\d{1,12})*,?)?\)")
_SLICE = re.compile(r"(?P<a>None|\d{1,12}),(?P<b>None|\d{1,12}),(None|1)")
_BLOCK, _LAYER = "model.decoder.<layer>.pp_block", "model.layers.<layer>"
NAMES: Mapping[str, tuple[str, ...]] = {
    "model.token_position_embeddings.pp_block.token_embedding.weight": ("model.embed_tokens.weight",),
    "model.final_layer_norm.pp_block.weight": ("model.norm.weight",),
    "model.lm_head.pp_block.weight": ("lm_head.weight",),
    f"{_BLOCK}.attn.qkv_proj.<leaf>": tuple(f"{_LAYER}.self_attn.{x}_proj.<leaf>" for x in "qkv"),
    f"{_BLOCK}.attn.o_proj.<leaf>": (f"{_LAYER}.self_attn.o_proj.<leaf>",),
    f"{_BLOCK}.mlp.gate_up_proj.<leaf>": (f"{_LAYER}.mlp.gate_proj.<leaf>", f"{_LAYER}.mlp.up_proj.<leaf>"),
    f"{_BLOCK}.mlp.down_proj.<leaf>": (f"{_LAYER}.mlp.down_proj.<leaf>",),
    f"{_BLOCK}.input_layernorm.weight": (f"{_LAYER}.input_layernorm.weight",),
    f"{_BLOCK}.post_attention_layernorm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
}
_KNOWN = Dictionary((Template(name), tuple(map(Template, parts))) for name, parts in NAMES.items())


@dataclass(frozen=True, slots=True)
class _File:
    """``path``: in the folder; ``tp``: None where it is every rank's."""

    path: str
    tp: int | None
    ranks: int


def recognises(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / "model" / "model").is_dir()


def open_nanotron(asked: Asked) -> Checkpoint:
    named = _files(asked.folder)
    several = {file.ranks for files in named.values() for file in files if file.tp is not None}
    if len(several) > 1:
        raise InputError(f"{asked.folder}: has files of {' and of '.join(map(str, sorted(several)))} ranks")
    ranks = several.pop() if several else 1
    theirs = hf_config(asked.folder)
    if asked.config is None:
        asked = Asked(asked.folder, theirs.config, asked.policy)
    reading = Reading(asked)
    held: dict[str, Held] = {}
    for name, files in named.items():
        joined = _joined(reading, name, files, ranks)
        match = _KNOWN.find(name)
        if match is None:
            what = f"{asked.folder}: {printable(name)} has no place in a Llama, the one model whose names are known"
            raise InputError(what)
        parts = [part.fill(match[1]) for part in match[0]]
        rows = rows_of(theirs, parts, joined.layout.shape)
        for part, (start, stop, head) in zip(parts, rows, strict=True):
            held[part] = rows_between(part, joined, start, stop, head)
    _check_complete(asked.folder, held, theirs.config)
    policy = reading.policy(needed=False)
    return reading.checkpoint(READER.name, ranks, held, policy, _is_own)


def _is_own(name: str) -> bool:
    return "/" in name or name in (CONFIG, "config.yaml", "checkpoint_metadata.json", "latest.txt")


def _files(folder: Path) -> dict[str, list[_File]]:
    """Each parameter's files, by its name. Raises InputError where one is missing."""
    found: dict[str, list[_File]] = {}
    for path in sorted((folder / "model").rglob("*.safetensors")):
        match = _FILE.fullmatch(path.name)
        name = path.relative_to(folder).as_posix()
        if match is None or match["exp"]:
            kind = "is of a group of experts" if match else "is not called as nanotron calls its files"
            raise InputError(f"{path}: {kind}, and is not read")
        parameter = ".".join((*path.relative_to(folder / "model").parts[:-1], match["last"]))
        tp = int(match["tp"]) if match["tp"] else None
        found.setdefault(parameter, []).append(_File(name, tp, int(match["ranks"] or 1)))
    if not found:
        raise InputError(f"{folder}: holds no model_*.safetensors")
    for parameter, files in found.items():
        have = sorted(file.tp for file in files if file.tp is not None)
        wanted = list(range(files[0].ranks)) if files[0].tp is not None else []
        if have != wanted or (not wanted and len(files) > 1):
            what = f"{folder}: {printable(parameter)} has files of the ranks {have} of {files[0].ranks}"
            raise InputError(what, hint="is the folder complete?")
    return found


def _joined(reading: Reading, name: str, files: Iterable[_File], ranks: int) -> Held:
    """A parameter as nanotron has it."""
    shards: list[Shard] = []
    places: list[Place] = []
    shapes: set[Shape] = set()
    dtypes: set[str] = set()
    for file in files:
        index, header = reading.safetensors(file.path, file.tp or 0)
        path = reading.files[index].path
        entry = header.entries.get("data")
        if entry is None or len(header.entries) != 1:
            raise InputError(f"{path}: holds {len(header.entries)} tensors, not one called 'data'")
        whole, shard = _said(header.metadata, entry, path, file)
        shapes.add(whole)
        dtypes.add(entry.dtype)
        copies = 1 if file.tp is not None else ranks
        shards += [shard] * copies
        places += [Own(index, entry).place] * copies
    if len(shapes) > 1 or len(dtypes) > 1:
        shown = ", ".join(sorted({*map(str, map(list, shapes)), *dtypes}))
        raise InputError(f"{printable(name)}: ranks disagree on what it is: {shown}", hint="were two runs mixed?")
    return Held(dtypes.pop(), Layout(shapes.pop(), tuple(shards)), tuple(places))


def _said(metadata: Mapping[str, str], entry: Entry, path: Path, file: _File) -> tuple[Shape, Shard]:
    """The whole shape, and what this file holds of it."""
    pairs, shape = metadata.get("local_global_slices_pairs"), metadata.get("unsharded_shape")
    if pairs is None and shape is None and (file.tp is None or file.ranks == 1):
        return entry.shape, Shard.whole(entry.shape)

    def fail(what: str) -> NoReturn:
        raise InputError(f"{path}: {what}", hint="is it a file of nanotron?")

    if pairs is None or shape is None:
        fail("does not say which part of the whole it is (local_global_slices_pairs, unsharded_shape)")
    numbers = _SHAPE.fullmatch(_NUMPY.sub(r"\1", shape))
    if numbers is None:
        fail(f"unsharded_shape '{printable(shape, 60)}' is no shape")
    whole = tuple(int(n) for n in re.findall("[0-9]+", numbers[0]))
    if len(whole) != len(entry.shape):
        fail(f"holds {list(entry.shape)}, a part of {list(whole)} has as many dimensions")
    try:
        return whole, shard_of(entry.shape, [_piece(pair, entry.shape, whole) for pair in pairs.split(";")])
    except ValueError as error:
        fail(f"local_global_slices_pairs: {printable(str(error))}")


def _piece(pair: str, own: Shape, whole: Shape) -> Piece:
    sides = pair.split("#")
    if len(sides) != 2:
        raise ValueError(f"'{pair}' is no pair of slices")
    local, of_whole = _box(sides[0], own), _box(sides[1], whole)
    if local.shape != of_whole.shape:
        raise ValueError(f"'{pair}' is {list(local.shape)} of the rank's own and {list(of_whole.shape)} of the whole")
    return Piece(of_whole, local.start)


def _box(text: str, shape: Shape) -> Box:
    """Slices "start,stop,step|…" of a tensor.

    >>> _box("2,4,None|None,None,None", (9, 5))
    Box(start=(2, 0), stop=(4, 5))
    """
    axes = [_SLICE.fullmatch(axis) for axis in text.split("|")]
    if len(axes) != len(shape) or not all(axes):
        raise ValueError(f"'{text}' are no slices of {list(shape)}")
    start = tuple(int(m["a"]) if m and m["a"] != "None" else 0 for m in axes)
    stop = tuple(int(m["b"]) if m and m["b"] != "None" else n for m, n in zip(axes, shape, strict=True))
    if any(not a <= b <= n for a, b, n in zip(start, stop, shape, strict=True)):
        raise ValueError(f"'{text}' goes beyond {list(shape)}")
    return Box(start, stop)


def _check_complete(folder: Path, held: Mapping[str, Held], config: Mapping[str, object]) -> None:
    """Nothing lists what a checkpoint has: every layer must have what a Llama has."""
    wanted = ["model.embed_tokens.weight", "model.norm.weight"]
    wanted += [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
    for layer in range(int(str(config["num_hidden_layers"]))):
        parts = (Template(part) for name, parts in NAMES.items() if name.startswith(_BLOCK) for part in parts)
        wanted += [part.fill({"layer": str(layer), "leaf": "weight"}) for part in parts]
    for name in wanted:
        if name not in held:
            raise InputError(f"{folder}: {name} is in none of the files", hint="is the folder complete?")
    if len(held) != len(wanted) + sum(name.endswith(".bias") for name in held):
        extra = min(name for name in held if name not in wanted and not name.endswith(".bias"))
        raise InputError(f"{folder}: has {printable(extra)}, beyond what {CONFIG} says")


READER = Reader(
    name="nanotron",
    title="nanotron, Llama",
    files="model/<parameter>/model_<last>_pp-rank-P-of-PP_tp-rank-T-of-TP.safetensors",
    description="Every file says itself which cells of the whole it holds; config.json is made of model_config.json.",
    recognises=recognises,
    open=open_nanotron,
)
