"""Which container a path or a folder holds: a Keras or TensorFlow checkpoint, named itself or alone in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from tpshard.containers import Container
from tpshard.errors import InputError, StorageError
from tpshard.folder import is_pickled
from tpshard.keras_files import open_keras
from tpshard.tensorflow_files import open_tensorflow

_KERAS = (".keras", ".weights.json", ".h5")
_PART = re.compile(r"(.+)_\d{5}\.weights\.h5")
OF_TRANSFORMERS = "tf_model.h5"  # with names that only transformers' own converter understands


def find_container(path: Path) -> Container | None:
    """The container at ``path``: a file, a checkpoint's prefix, or a folder that holds one and no safetensors. None
    where there is none. Raises InputError where there are several."""
    index = path.parent / f"{path.name}.index"
    if not path.exists() and index.is_file():
        return open_tensorflow(index)
    if path.is_file():
        return _open(path) if path.name.endswith((*_KERAS, ".index")) else None
    if not path.is_dir():
        return None
    found = _candidates(path)
    if len(found) > 1:
        names = ", ".join(item.name for item in found[:5])
        raise InputError(f"{path}: holds {len(found)} checkpoints: {names}", hint="name the file that is meant")
    return _open(found[0]) if found else None


def _open(path: Path) -> Container:
    return open_tensorflow(path) if path.is_dir() or path.name.endswith(".index") else open_keras(path)


def _candidates(folder: Path) -> list[Path]:
    try:
        present = sorted(folder.iterdir())
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}") from None
    names = {path.name for path in present}
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return []
    if "saved_model.pb" in names and (folder / "variables" / "variables.index").is_file():
        return [folder]
    found = []
    for path in present:
        part = _PART.fullmatch(path.name)
        of_index = part is not None and f"{part[1]}.weights.json" in names
        if path.name.endswith(_KERAS) and not of_index and path.name != OF_TRANSFORMERS and path.is_file():
            found.append(path)
        data = f"{path.name.removesuffix('.index')}.data-00000-of-"
        if path.name.endswith(".index") and any(name.startswith(data) for name in names):
            found.append(path)
    return [*found, *(path for path in present if is_pickled(path.name))] if found else []
