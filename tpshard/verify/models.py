"""Where the model comes from: transformers' own classes, or a function that the user names.

Either way the model is made once without its weights, and for every recipe is known: from which tensors on disk each of
its parameters comes, and how. Renaming, stacking and transposing between disk and module is the library's business;
its own steps are carried out on ``BlockTensor``, for the reference and for every rank alike.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tpshard.errors import InconclusiveError, printable
from tpshard.verify import block_operations, block_products  # noqa: F401 - BlockTensor learns to multiply
from tpshard.verify.block_tensor import BlockTensor

Source = Callable[[str], torch.Tensor]  # a tensor by its name on disk


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a parameter is made: of these tensors on disk, by this function of them. ``plain``: it is the one tensor."""

    names: tuple[str, ...]
    make: Callable[[Source], torch.Tensor]
    plain: bool = False


class Model(Protocol):
    """A model without weights, and how it gets them and its inputs.

    ``skeleton``: the module, its parameters on the meta device; ``recipes``: by the module's names of parameters and
    persistent buffers; ``unused``: tensors on disk that it lacks; ``inputs``: what it is called with.
    """

    name: str
    skeleton: nn.Module

    @property
    def recipes(self) -> Mapping[str, Recipe]: ...
    @property
    def unused(self) -> tuple[str, ...]: ...
    def inputs(self, ranks: int, seed: int) -> dict[str, Any]: ...


def one_line(error: BaseException) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


@contextlib.contextmanager
def without_parameters(keep: frozenset[tuple[str, tuple[int, ...]]] = frozenset()) -> Iterator[None]:
    """Modules made in here get their parameters on the meta device, but for those with the names and shapes to keep;
    buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta" and (name, tuple(param.shape)) not in keep:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def slots(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer, twins included."""
    kept = set(module.state_dict(keep_vars=True))
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named.items() if name in kept}


# ---------------------------------------------------------------------------------------------- transformers


class TransformersModel:
    """A class of transformers, by config.json's ``architectures``. Remote code is never run. ``folder``: of
    config.json, or that file; ``names``: those on disk, or None where only the module's own are known.

    Raises InconclusiveError where transformers has no such class, cannot read the config, or the checkpoint does not
    fit the class.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], names: Sequence[str] | None, dtype: torch.dtype
    ) -> None:
        try:
            import transformers
            from transformers.utils import logging
        except ImportError:
            hint = "pip install 'tpshard[hf]', or name the model with --model"
            raise InconclusiveError("transformers is not installed", hint=hint) from None
        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self._class = _class_of(transformers, config)
        self.name = self._class.__name__
        own: Any = self._class
        named_otherwise = config.get("model_type") in _OF_ITS_CLASS
        reader: Any = own.config_class if named_otherwise else transformers.AutoConfig
        try:
            self.config = reader.from_pretrained(str(folder), trust_remote_code=False)
            if named_otherwise:  # how names on disk become the module's goes by this
                self.config.model_type = own.config_class.model_type
        except Exception as error:
            raise InconclusiveError(f"transformers cannot read {folder}/config.json: {one_line(error)}") from None
        for part in (self.config, getattr(self.config, "text_config", None)):
            getattr(part, "__dict__", {}).pop("quantization_config", None)  # weights come dequantised
        self._dtype = dtype
        self.skeleton = self._make(frozenset())
        self.names = _own_names(self.skeleton) if names is None else tuple(names)
        try:
            self.recipes, self.unused = _recipes(self.skeleton, self.names)
        except Exception as error:
            what = f"transformers {transformers.__version__} does not tell what {self.name} loads: {one_line(error)}"
            raise InconclusiveError(what) from None
        computed = self._without_recipe()
        if computed:  # made by the class itself, such as sinusoidal positions
            shapes = {name: tuple(tensor.shape) for name, tensor in slots(self.skeleton).items()}
            self.skeleton = self._make(frozenset((name.rpartition(".")[2], shapes[name]) for name in computed))

    def _make(self, keep: frozenset[tuple[str, tuple[int, ...]]]) -> nn.Module:
        try:
            with without_parameters(keep):
                module: nn.Module = self._class._from_config(
                    copy.deepcopy(self.config),
                    dtype=self._dtype,
                    attn_implementation="eager",
                    experts_implementation="eager",
                )
        except Exception as error:
            raise InconclusiveError(f"{self.name} cannot be made: {one_line(error)}") from None
        return module.eval()

    def _without_recipe(self) -> list[str]:
        """Parameters that the class makes by itself. Raises InconclusiveError where the checkpoint lacks others."""
        tensors = slots(self.skeleton)
        made = {id(tensors[name]) for name in self.recipes}
        lacking = [name for name, tensor in tensors.items() if id(tensor) not in made]
        own: Any = self.skeleton
        ignored = own._keys_to_ignore_on_load_missing or ()
        missing = [name for name in lacking if not any(re.search(pattern, name) for pattern in ignored)]
        missing = [name for name in missing if name not in dict(self.skeleton.named_buffers())]
        if missing:
            what = f"the checkpoint gives {self.name} no {printable(missing[0])}"
            raise InconclusiveError(f"{what} ({len(missing)} such tensors)", hint="is config.json of this model?")
        return lacking

    def inputs(self, ranks: int, seed: int) -> dict[str, Any]:
        from tpshard.verify.inputs import make_inputs

        try:
            return make_inputs(self.skeleton, self.config, ranks, seed, self._dtype)
        except InconclusiveError:
            raise
        except Exception as error:
            hint = "name the model and its inputs with --model"
            raise InconclusiveError(f"no inputs can be made for {self.name}: {one_line(error)}", hint=hint) from None


# Names of model types that transformers does not know, of models that are what their ``architectures`` says.
_OF_ITS_CLASS = frozenset({"kimi_k2"})


def _class_of(transformers: Any, config: Mapping[str, Any]) -> Any:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise InconclusiveError("config.json names no architecture", hint="name the model with --model")
    found = getattr(transformers, name, None)
    if found is None or not isinstance(found, type) or not issubclass(found, nn.Module):
        remote = "; its own code (auto_map) is never run" if "auto_map" in config else ""
        what = f"transformers {transformers.__version__} does not know {printable(name)}{remote}"
        raise InconclusiveError(what, hint="name the model with --model")
    return found


def _recipes(skeleton: nn.Module, names: Sequence[str]) -> tuple[dict[str, Recipe], tuple[str, ...]]:
    """By transformers' own conversion table, which is not a public interface; without it, by equal names."""
    model: Any = skeleton
    known = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return {name: renamed(name) for name in names if name in known}, tuple(n for n in names if n not in known)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    recipes: dict[str, Recipe] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unused: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            unused.append(name)
        elif pattern is None:
            recipes[target] = renamed(name)
        else:
            groups.setdefault(target, (of_pattern[pattern], []))[1].append((pattern, name))
    for target, (converter, members) in groups.items():
        recipes.update(_converted(skeleton, target, converter, members, known))
    return recipes, tuple(unused)


def _own_names(skeleton: nn.Module) -> tuple[str, ...]:
    """What would be saved: of tied twins the first, and no tensor of whole numbers."""
    first: dict[int, str] = {}
    for name, tensor in slots(skeleton).items():
        if tensor.is_floating_point():
            first.setdefault(id(tensor), name)
    return tuple(first.values())


def renamed(name: str) -> Recipe:
    return Recipe((name,), lambda source: source(name), plain=True)


def _converted(
    skeleton: nn.Module, target: str, template: Any, members: list[tuple[str, str]], known: Mapping[str, Any]
) -> Iterator[tuple[str, Recipe]]:
    """The parameters that one of transformers' converters makes of a group of tensors."""
    owner: Any = skeleton

    def convert(source: Source) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(template)
        for pattern, name in members:
            converter.add_tensor(target, name, pattern, lambda name=name: source(name))
        made = converter.convert(target, model=skeleton, config=owner.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    names = tuple(name for _, name in members)
    targets = [target, *(target.replace(template.target_patterns[0], p) for p in template.target_patterns[1:])]
    for key in targets:
        if key in known:
            yield key, Recipe(names, lambda source, key=key: convert(source)[key])  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- filling in


def copy_with(skeleton: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device) -> nn.Module:
    """A copy of a skeleton with these tensors in the places of its parameters and persistent buffers. A twin that is
    tied to another and not named gets the other's."""
    old = slots(skeleton)
    of_id = {id(old[name]): tensor for name, tensor in tensors.items()}
    module = copy.deepcopy(skeleton)
    for name, tensor in old.items():
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        new = tensors.get(name, of_id.get(id(tensor)))
        place = owner._parameters if leaf in owner._parameters else owner._buffers
        if new is not None:
            place[leaf] = new  # type: ignore[assignment]
        elif tensor.device.type == "meta":
            raise InconclusiveError(f"{name} has no values")
    for submodule in module.modules():
        for leaf, buffer in submodule._buffers.items():
            if buffer is not None and not isinstance(buffer, BlockTensor):
                submodule._buffers[leaf] = buffer.to(device)
        for leaf, kept in submodule._parameters.items():
            if kept is not None and not isinstance(kept, BlockTensor):
                submodule._parameters[leaf] = nn.Parameter(kept.detach().to(device), requires_grad=False)
    return module
