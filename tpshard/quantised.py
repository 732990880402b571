"""Recognising quantised checkpoints, which must not be cut as if they were dense: scales, zero points and packed
words have to follow their weight's cut."""

from __future__ import annotations

from tpshard.checkpoint import Checkpoint
from tpshard.errors import InputError, printable

_COMPANIONS = frozenset(
    {
        "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv",
        "weight_zero_point", "SCB", "absmax", "quant_map", "weight_format", "input_scale", "weight_shape",
    }
)  # fmt: skip
_SUFFIXES = ("_blocks", "_scales")


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Raises InputError where config.json or a tensor's name tells of quantisation."""
    quantisation = checkpoint.config.get("quantization_config")
    if quantisation is not None:
        named = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        method = printable(str(named), 40)
        raise InputError(f"{checkpoint.folder}: is quantised ({method}); only dense checkpoints are cut", hint=_HINT)
    for name in checkpoint.tensors:
        leaf = name.rpartition(".")[2]
        if leaf in _COMPANIONS or leaf.endswith(_SUFFIXES):
            raise InputError(f"{checkpoint.folder}: {printable(name)} belongs to a quantised weight", hint=_HINT)


_HINT = "dequantise it first"
