"""What PyTorch's pickles say of tensors: each becomes a header's Entry, a place in the file, and no bytes are read.

The names are those of torch._utils and torch.storage; their arguments are taken from there. Every tensor must lie in
its storage, and a storage in its member.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpshard.errors import InputError
from tpshard.header import MAX_DIMENSIONS, Entry
from tpshard.pickle_machine import Call, Global, Meaning
from tpshard.pickles import PLAIN
from tpshard.views import strided

# torch's name of a dtype: safetensors' name, bytes of an element
DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1),
    "bool": ("BOOL", 1), "complex64": ("C64", 8), "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "float8_e8m0fnu": ("F8_E8M0", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1), "float4_e2m1fn_x2": ("F4", 1),
}  # fmt: skip
STORAGES: Mapping[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
}  # fmt: skip
UNREAD_DTYPES = ("complex128", "complex32", "quint8", "qint8", "qint32", "quint4x2", "quint2x4")
UNREAD_STORAGES = ("ComplexDoubleStorage", "QUInt8Storage", "QInt8Storage", "QInt32Storage", "QUInt4x2Storage")
UNTYPED = "untyped"
BEYOND = 2**48  # more than any file has bytes


def _names(module: str, *names: str) -> list[Global]:
    return [Global(module, name) for name in names]


TENSOR_V2, TENSOR_V3, TENSOR, PARAMETER, PARAMETER_WITH_STATE = _names(
    "torch._utils", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_tensor", "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)  # fmt: skip
FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
PLAIN_TYPES = {
    Global("torch", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.nn.parameter", "Buffer"),
}

# Tensors that have no plain bytes: kept as records, refused by name where they are wanted.
UNREAD_TENSORS: Mapping[Global, str] = {
    Global("torch._utils", name): what
    for name, what in {
        "_rebuild_sparse_tensor": "a sparse tensor",
        "_rebuild_sparse_csr_tensor": "a sparse tensor",
        "_rebuild_qtensor": "a quantised tensor of torch's own kind",
        "_rebuild_nested_tensor": "a nested tensor",
        "_rebuild_meta_tensor_no_storage": "a tensor without data (device meta)",
        "_rebuild_wrapper_subclass": "a tensor of a class of its own",
        "_rebuild_device_tensor_from_numpy": "a tensor of another device",
        "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
        "_rebuild_xla_tensor": "a tensor of another device",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors share: ``offset`` in the file, ``size``; ``dtype`` is torch's name, or ``untyped``."""

    offset: int
    size: int
    dtype: str


def storage_type(kind: object) -> str:
    """torch's dtype of a storage's class, or ``untyped``."""
    if isinstance(kind, Global) and kind.module in ("torch", "torch.cuda", "torch.storage"):
        if kind.name in STORAGES:
            return STORAGES[kind.name]
        if kind.name == "UntypedStorage":
            return UNTYPED
    raise InputError(f"has a storage of {kind if isinstance(kind, Global) else 'no known kind'}, which is not read")


def itemsize(dtype: str) -> int:
    return 1 if dtype == UNTYPED else DTYPES[dtype][1]


def _tensor_v2(arguments: tuple[Any, ...]) -> object:
    if len(arguments) not in (6, 7):
        raise InputError(f"rebuilds a tensor from {len(arguments)} values, 6 or 7 were expected")
    storage, first, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or storage.dtype == UNTYPED:
        raise InputError("rebuilds a tensor from what is no storage of a type")
    return _entry(storage, storage.dtype, first, shape, strides, arguments[6:])


def _tensor_v3(arguments: tuple[Any, ...]) -> object:
    if len(arguments) not in (7, 8):
        raise InputError(f"rebuilds a tensor from {len(arguments)} values, 7 or 8 were expected")
    storage, first, shape, strides, _, _, dtype = arguments[:7]
    if not isinstance(storage, Storage):
        raise InputError("rebuilds a tensor from what is no storage")
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in DTYPES:
        raise InputError(f"has a tensor of {dtype if isinstance(dtype, Global) else 'no dtype'}, which is not read")
    return _entry(storage, dtype.name, first, shape, strides, arguments[7:])


def _tensor(arguments: tuple[Any, ...]) -> object:
    return _tensor_v2((*arguments, False, None) if len(arguments) == 4 else ())


def _parameter(arguments: tuple[Any, ...]) -> object:
    if len(arguments) not in (3, 4) or not isinstance(arguments[0], Entry | Call):
        raise InputError("makes a parameter of what is no tensor")
    return arguments[0]


def _from_type(arguments: tuple[Any, ...]) -> object:
    """A tensor with attributes of its own: (function, class, arguments, state)."""
    if len(arguments) != 4 or type(arguments[0]) is not Global or type(arguments[2]) is not tuple:
        raise InputError("rebuilds a tensor from what is no function, class, arguments, state")
    function, kind, given = arguments[:3]
    rebuild = _REBUILD.get(function)
    if rebuild is None or type(kind) is not Global or kind not in PLAIN_TYPES:
        return Call(FROM_TYPE, arguments)
    return rebuild(given)


def _entry(storage: Storage, dtype: str, first: Any, shape: Any, strides: Any, more: tuple[Any, ...]) -> Entry:
    """A tensor in its storage; ``first`` and ``strides`` count elements, ``more``: its flags, if any."""
    item = itemsize(dtype)
    _check_counts(first, shape, strides)
    flags = more[0] if more else None
    if flags and (type(flags) is not dict or len(flags) > 8 or any(value is not False for value in flags.values())):
        raise InputError("has a tensor whose values are negated or conjugated when read, which is not read")
    elements = math.prod(shape)
    last = first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if elements else 0
    if elements and (last + 1) * item > storage.size:
        raise InputError(
            f"has a tensor of shape {list(shape)} with strides {list(strides)} from element {first} of {item} bytes, "
            f"its storage has {storage.size} bytes"
        )
    if any(n > 1 and stride == 0 for n, stride in zip(shape, strides, strict=True)) and elements:
        raise InputError(
            f"has a tensor of shape {list(shape)} that repeats itself (strides {list(strides)})",
            hint="save it with .contiguous()",
        )
    if elements * item > storage.size:
        raise InputError(f"has a tensor of shape {list(shape)} that overlaps itself (strides {list(strides)})")
    offset = storage.offset + (first * item if elements else 0)
    view = strided((*shape, item), (*(n * item for n in strides), 1)) if elements else None
    name = DTYPES[dtype][0]
    if name == "F4":  # two in a byte: torch counts bytes, safetensors elements
        if not shape:
            raise InputError("has a tensor of float4_e2m1fn_x2 without dimensions")
        shape = (*shape[:-1], 2 * shape[-1])
    return Entry(name, shape, offset, elements * item, view)


def _check_counts(first: Any, shape: Any, strides: Any) -> None:
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise InputError("has a tensor whose shape and strides do not fit each other")
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"has a tensor of {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if not all(type(n) is int and 0 <= n < BEYOND for n in (first, *shape, *strides)):
        raise InputError("has a tensor whose shape, strides or place are no counts")


_REBUILD: Mapping[Global, Meaning] = {
    TENSOR_V2: _tensor_v2,
    TENSOR_V3: _tensor_v3,
    TENSOR: _tensor,
    PARAMETER: _parameter,
    PARAMETER_WITH_STATE: _parameter,
}


def _size(arguments: tuple[Any, ...]) -> object:
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise InputError("has a torch.Size that is none")
    return arguments[0]


# All names that a PyTorch file may hold without being asked for.
MEANINGS: Mapping[Global, Meaning | None] = {
    **PLAIN,
    **_REBUILD,
    FROM_TYPE: _from_type,
    Global("torch", "Size"): _size,
    **dict.fromkeys(UNREAD_TENSORS),
    **dict.fromkeys(PLAIN_TYPES),
    **dict.fromkeys(_names("torch", *DTYPES, *UNREAD_DTYPES, *STORAGES, *UNREAD_STORAGES, "UntypedStorage", "device")),
    **dict.fromkeys(_names("torch.cuda", *STORAGES)),
    **dict.fromkeys(_names("torch.storage", "UntypedStorage", "TypedStorage")),
    **dict.fromkeys(_names("torch", "strided", "sparse_coo", "sparse_csr", "per_tensor_affine", "per_channel_affine")),
    **dict.fromkeys(_names("torch.serialization", "_get_layout")),
    **dict.fromkeys(_names("collections", "defaultdict", "Counter")),
    **dict.fromkeys(_names("_codecs", "encode")),
    **dict.fromkeys(_names("builtins", "set", "frozenset", "bytearray", "complex", "int", "float", "dict", "list")),
    **dict.fromkeys(_names("__builtin__", "set", "frozenset", "bytearray", "complex", "int", "float", "dict", "list")),
}
