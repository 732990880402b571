"""A checkpoint folder's files: which hold the weights, which are carried along.

Names inside an index are checked as text (a bare file name), not by resolving them: the Hugging Face cache is made
of links to ``../../blobs``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tpshard.errors import InputError, StorageError, printable
from tpshard.header import parse_json_object

MANIFEST_NAME = "tpshard.json"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLED_INDEX_SUFFIX = ".bin.index.json"
CONFIG = "config.json"
KEPT_CONFIG = "hf_config.json"  # the model's own, where an engine's is called config.json
MAX_CARRIED = 64 * 2**20  # tokenizers reach 35 MB; what is larger is weights of another kind
MAX_JSON = 2**30  # bounds memory on a hostile file; the manifest of 94,000 tensors on 64 ranks has 0.3 GB
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".keras", ".msgpack", ".onnx", ".gguf", ".tflite", ".npz",
    ".ot", ".pdparams", ".distcp", ".index.json", ".incomplete", ".lock",
)  # fmt: skip
_SIGNATURES = (".sig", ".sigstore.json", ".intoto.jsonl")  # model-signing's and sigstore's, in-toto's bundles
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = (
    "training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "adapter_model*",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a full checkpoint, and the index's map from tensor to file where there is one.

    ``total_size``: the bytes of all tensors, as the index says.
    """

    names: tuple[str, ...]
    index: Mapping[str, str] | None
    total_size: int | float | None = None
    warnings: tuple[str, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError or StorageError."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: is not there" if not path.exists() else f"{path}: is not a regular file")
        if path.stat().st_size > MAX_JSON:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, at most {MAX_JSON} are read")
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    if raw.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer", hint="run: git lfs pull")
    return parse_json_object(raw, str(path))


def read_bytes(path: Path, offset: int = 0, count: int = -1) -> bytes:
    """A small file, or a part of one. Raises StorageError."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(count)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty where there is none."""
    path = folder / CONFIG
    return read_json(path) if path.exists() or path.is_symlink() else {}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config.json that was made rather than found."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def config_of(path: Path) -> dict[str, Any]:
    """config.json itself, or that of a folder. Raises InputError where there is none."""
    return read_json(path / "config.json" if path.is_dir() else path)


def find_weights(folder: Path) -> WeightFiles:
    """Which files hold the weights: safetensors, or else PyTorch's. Raises InputError where there is none, or where it
    is not clear."""
    present = sorted(_listing(folder))
    pickles = [name for name in present if _may_be_weights(name)]
    found = _in_safetensors(folder, present)
    if found is None:
        found = _in_pickles(folder, present, pickles)
    elif pickles:
        found = replace(found, warnings=(*found.warnings, f"safetensors are there, so {_some(pickles)} is left out"))
    if found is None:
        raise _nothing_found(folder, present)
    return found


def is_pickled(name: str) -> bool:
    """Whether a file is PyTorch's by its name."""
    return name.endswith(_PICKLES)


def _may_be_weights(name: str) -> bool:
    return is_pickled(name) and not any(fnmatch(name, pattern) for pattern in _NO_WEIGHTS)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _in_safetensors(folder: Path, present: list[str]) -> WeightFiles | None:
    indexes = [name for name in present if name.endswith(INDEX_SUFFIX)]
    files = [name for name in present if name.endswith(".safetensors")]
    if indexes:
        return _indexed(folder, _only(folder, indexes), files, ".safetensors")
    weights = [name for name in files if not name.startswith("adapter_model")]
    if len(weights) > 1:
        raise InputError(
            f"{folder}: has {len(weights)} safetensors files and no index",
            hint="model.safetensors.index.json is missing",
        )
    return WeightFiles((weights[0],), None) if weights else None


def _in_pickles(folder: Path, present: list[str], weights: list[str]) -> WeightFiles | None:
    indexes = [name for name in present if name.endswith(PICKLED_INDEX_SUFFIX)]
    if indexes:
        return _indexed(folder, _only(folder, indexes), weights, ".bin")
    if "pytorch_model.bin" in weights:
        others = [name for name in weights if name != "pytorch_model.bin"]
        warnings = [f"pytorch_model.bin is there, so {_some(others)} is left out"] if others else []
        return WeightFiles(("pytorch_model.bin",), None, None, tuple(warnings))
    if len(weights) > 1:
        raise InputError(
            f"{folder}: has {len(weights)} PyTorch files ({_some(weights)}) and no index",
            hint="keep the one that is meant, or add pytorch_model.bin.index.json",
        )
    return WeightFiles((weights[0],), None) if weights else None


def _only(folder: Path, indexes: list[str]) -> str:
    if len(indexes) > 1:
        raise InputError(
            f"{folder}: has {len(indexes)} indexes: {', '.join(indexes)}", hint="keep the one that is meant"
        )
    return indexes[0]


def _listing(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        raise InputError(f"{folder}: is not there") from None
    except NotADirectoryError:
        raise InputError(f"{folder}: is a file", hint="give the checkpoint's folder") from None
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}") from None


def _nothing_found(folder: Path, present: list[str]) -> InputError:
    adapters = [name for name in present if name.startswith("adapter_")]
    pickles = [name for name in present if is_pickled(name)]
    partial = [name for name in present if name.endswith((".incomplete", ".safetensors.gz"))]
    if adapters:
        return InputError(
            f"{folder}: holds an adapter ({adapters[0]}), not a model", hint="tpshard split takes it with --base MODEL"
        )
    if partial:
        return InputError(f"{folder}: {partial[0]} is an unfinished download or compressed", hint="finish it first")
    if pickles:
        return InputError(
            f"{folder}: holds PyTorch files ({pickles[0]}), but none with weights",
            hint="weights are in model.safetensors, pytorch_model.bin or one other .pt, .pth, .bin or .ckpt file",
        )
    return InputError(f"{folder}: holds no safetensors file, and none of PyTorch")


def _indexed(folder: Path, index_name: str, files: list[str], suffix: str) -> WeightFiles:
    path = folder / index_name
    index = read_json(path)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: weight_map is missing or empty")
    for tensor, file in table.items():
        if not isinstance(file, str) or not is_bare_name(file):
            raise InputError(f"{path}: {printable(tensor)}: '{printable(str(file))}' is not a file name")
        if not file.endswith(suffix):
            raise InputError(f"{path}: {printable(tensor)}: '{file}' is not a {suffix} file")
    single = index_name.removesuffix(".index.json")
    if single in files and single not in table.values():
        raise InputError(f"{folder}: has both {single} and {index_name}", hint="remove the one that is stale")
    names = sorted(set(table.values()), key=natural_order)
    folded = {name.casefold() for name in names}
    if len(folded) != len(names):
        raise InputError(f"{path}: names files that differ only in case")
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"{path}: names {name}, which is not there", hint="download it again")
    metadata = index.get("metadata", {})
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and not (isinstance(total, int | float) and not isinstance(total, bool) and total >= 0):
        raise InputError(f"{path}: total_size is {printable(repr(total), 40)}")
    extra = [name for name in files if name not in table.values()]
    warnings = [f"{index_name} does not name {', '.join(extra)}: left out"] if extra else []
    return WeightFiles(tuple(names), table, total, tuple(warnings))


def safetensors_names(names: Sequence[str]) -> list[str]:
    """What the files of a checkpoint are called as safetensors.

    >>> safetensors_names(["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"])
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    >>> safetensors_names(["best.pt"]), safetensors_names(["best.safetensors"])
    (['model.safetensors'], ['best.safetensors'])
    """
    if len(names) == 1 and is_pickled(names[0]):
        return ["model.safetensors"]
    stems = [name.rpartition(".")[0] if is_pickled(name) else name.removesuffix(".safetensors") for name in names]
    return [stem.removeprefix("pytorch_") + ".safetensors" if is_pickled(name) else name
            for stem, name in zip(stems, names, strict=True)]  # fmt: skip


def is_bare_name(name: str) -> bool:
    """Whether a name from a file may be looked up in a folder: no path, no dots-only, no control characters."""
    return bool(re.fullmatch(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,255}", name)) and name not in (".", "..")


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which rank 10 follows rank 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", name)]


def is_signature(name: str) -> bool:
    """Whether a file, by its path in a folder, signs the folder: it is of this folder alone, and made after it.

    >>> is_signature("model.sig"), is_signature("tokenizer/model.sig")
    (True, False)
    """
    return "/" not in name and name.endswith(_SIGNATURES)


def carried_files(folder: Path) -> list[str]:
    """Paths, relative to the folder, of everything that goes along with the weights: config, tokenizer and the like.

    Weights in any format, their indexes, signatures, hidden files and very large files stay behind. Raises InputError
    where a name could not be recorded in a manifest.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        weight = path.name.endswith(_WEIGHT_SUFFIXES) or path.name == MANIFEST_NAME
        stays = hidden or weight or is_signature(relative.as_posix())
        if not stays and path.is_file() and path.stat().st_size <= MAX_CARRIED:
            if not all(map(is_bare_name, relative.parts)):
                raise InputError(f"{folder}: file name '{printable(str(relative))}' cannot be kept", hint="rename it")
            found.append(relative.as_posix())
    return found
