"""What DeepSpeed's init_inference saves (save_mp_checkpoint_path): ``tp_RR_MM.pt``, rank RR's part of the weights in
eight files, and ``non-tp.pt`` for what every rank has.

How it cuts depends on numbers of heads and on blocks of 64 rows, and its output head is cut along its input. So sizes
are taken from all ranks' shapes, and nothing is assumed even.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tpshard.checkpoint import Checkpoint
from tpshard.engines.names import Template
from tpshard.engines.readers.cuts import Cuts
from tpshard.engines.readers.deepspeed import HEADS
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.engines.readers.reading import Held, Own, Reading
from tpshard.engines.readers.samples import Samples
from tpshard.errors import InputError, printable
from tpshard.folder import is_bare_name, read_json
from tpshard.layout import Layout

RECORD = "ds_inference_config.json"
PART = Template("tp_<tp:02>_<part:02>.pt")


def recognises(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def open_inference(asked: Asked) -> Checkpoint:
    tp, whole, parts = _listed(asked.folder / RECORD)
    reading = Reading(asked)
    ranks: list[dict[str, Own]] = [{} for _ in range(tp)]
    for name, rank in parts:
        _add(reading, name, rank, ranks[rank])
    common: dict[str, Own] = {}
    for name in whole:
        _add(reading, name, 0, common)
    policy = reading.policy(needed=tp > 1)
    if policy is None or tp == 1:
        held = {name: _copies([own]) for name, own in ranks[0].items()}
    else:
        with Samples(reading.folder, reading.files) as samples:
            held = Cuts(policy, reading.config, samples, HEADS).held(ranks)
    for name, own in common.items():
        if name in held:
            raise InputError(f"{asked.folder}: {printable(name)} is in {whole[0]} and in a rank's files")
        _refuse_cut_head(reading, name, own)
        held[name] = _copies([own] * tp)
    own_files = {RECORD, *whole}
    return reading.checkpoint(
        READER.name, tp, held, policy, lambda name: name in own_files or PART.read(name) is not None
    )


def _copies(own: list[Own]) -> Held:
    return Held(own[0].entry.dtype, Layout.replicated(own[0].entry.shape, len(own)), tuple(o.place for o in own))


def _listed(path: Path) -> tuple[int, list[str], list[tuple[str, int]]]:
    """The number of ranks, the files that all have, and those of each rank. Raises InputError."""
    record = read_json(path)

    def fail(what: str, hint: str | None = None) -> NoReturn:
        raise InputError(f"{path}: {what}", hint=hint)

    if record.get("dtype") == "int8":
        fail("is of int8 with scales in a form of its own, which is not read", "save it in float16 or bfloat16")
    for key, wanted in (("type", "ds_model"), ("parallelization", "tp")):
        if record.get(key) != wanted:
            fail(f"{key} is '{printable(str(record.get(key)), 40)}', '{wanted}' is read")
    tp, listed = record.get("tp_size"), record.get("checkpoints")
    if type(tp) is not int or not 1 <= tp <= 4096 or not isinstance(listed, dict):
        fail("says not how many ranks there are (tp_size), or which files (checkpoints)")
    names: dict[str, list[str]] = {}
    for key in ("non_tp", "tp"):
        given: Any = listed.get(key)
        if not isinstance(given, list) or not all(isinstance(name, str) and is_bare_name(name) for name in given):
            fail(f"checkpoints.{key} is no list of file names")
        names[key] = given
    parts = [(name, int(values["tp"])) for name in names["tp"] if (values := PART.read(name))]
    counts = [sum(rank == own for _, own in parts) for rank in range(tp)]
    if len(parts) != len(names["tp"]) or sum(counts) != len(parts) or len(set(counts)) != 1 or not counts[0]:
        fail(f"lists {len(names['tp'])} files, not as many tp_RR_MM.pt for each of {tp} ranks")
    for name in (*names["non_tp"], *names["tp"]):
        if not (path.parent / name).exists():
            fail(f"names {name}, which is not there", "is the folder complete?")
    there = {file.name for file in path.parent.iterdir() if PART.read(file.name)}
    extra = sorted(there - set(names["tp"]))
    if extra:
        fail(f"does not name {extra[0]}, which is there", "were two runs mixed?")
    return tp, names["non_tp"], parts


def _add(reading: Reading, name: str, rank: int, own: dict[str, Own]) -> None:
    file, tree = reading.torch(name, rank, ())
    if isinstance(tree.value, dict):
        for key, value in tree.value.items():
            if isinstance(value, list | tuple):
                what = f"{reading.folder / name}: {printable(str(key))} is int8 with scales in a form of its own"
                raise InputError(f"{what}, which is not read", hint="save it in float16 or bfloat16")
    for key, tensor in reading.tensors(tree.value, file).items():
        if key in own:
            raise InputError(f"{reading.folder / name}: {printable(key)} is in two files of rank {rank}")
        own[key] = tensor


def _refuse_cut_head(reading: Reading, name: str, own: Own) -> None:
    """``non-tp.pt`` is the first rank's: a head that was cut would be a part alone."""
    config: Mapping[str, Any] = reading.config
    shape, layer = own.entry.shape, name.rpartition(".")[0].rpartition(".")[2]
    wanted = config.get("vocab_size"), config.get("hidden_size")
    if layer in HEADS and len(shape) == 2 and shape != wanted:
        what = f"{reading.folder}: {printable(name)} is {list(shape)}, whole it has {list(wanted)}: only a part"
        raise InputError(f"{what} was saved", hint="give the model's config.json with --config" if not config else None)


READER = Reader(
    name="deepspeed-inference",
    title="DeepSpeed inference",
    files="tp_RR_MM.pt",
    description="What init_inference saves, without injected kernels. Sizes of parts are those of the files; which "
    "axis is cut follows from the policy, and from samples of the numbers where ranks may hold copies.",
    recognises=recognises,
    open=open_inference,
    own_cuts=True,
)
