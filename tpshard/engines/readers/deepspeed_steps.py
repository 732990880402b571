"""What DeepSpeed's folders have in common: a file that names the newest step, and what its pickles may name."""

from __future__ import annotations

from pathlib import Path

from tpshard.errors import InputError, StorageError, printable
from tpshard.folder import is_bare_name
from tpshard.pickle_machine import Global

# Kept as records that do nothing: what DeepSpeed, or a trainer through it, saves beside the weights.
INERT = (
    Global("argparse", "Namespace"),
    Global("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    Global("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    Global("deepspeed.utils.tensor_fragment", "fragment_address"),
)
OWN = {"latest", "latest_universal", "zero_to_fp32.py", "zero_to_torch.py"}  # files of DeepSpeed beside the step's
LONGEST_TAG = 255


def step_of(folder: Path, pointer: str) -> str:
    """The step's folder, by the file that names it: a path in ``folder``, empty where ``folder`` is the step's own.
    Raises InputError where it is not there."""
    file = folder / pointer
    if not file.is_file():
        return ""
    try:
        with file.open("rb") as opened:
            raw = opened.read(LONGEST_TAG + 2)
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror}") from None
    tag = raw.decode("utf-8", "replace").strip()
    if not is_bare_name(tag):
        raise InputError(f"{file}: '{printable(tag, 40)}' is not the name of a folder")
    if not (folder / tag).is_dir():
        raise InputError(f"{file}: names {tag}, which is not there", hint="is the folder complete?")
    return f"{tag}/"


def is_own(name: str, step: str) -> bool:
    """Whether a file is DeepSpeed's: of the step, or beside it."""
    return name in OWN or bool(step and name.startswith(step))
