"""An architecture without weights: from config.json alone, what its checkpoint's tensors are called and how large they
are, and a smaller model of the same architecture to try a policy on.

Names are those on disk: transformers renames, splits and transposes between module and file, and undoes it when it
saves; here it undoes it on tensors of the meta device, which have a shape and no memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError, InputError, printable
from tpshard.layout import Shape
from tpshard.verify.models import one_line, without_parameters
from tpshard.verify.sections import outermost_blocks
from tpshard.verify.smaller import Scale, depths_to_try, divisors, require_sane, scaled

MOST_NUMBERS = 2 * 10**8  # of a model that a policy is tried on

Maker = Any  # a class of transformers


@dataclass(frozen=True, slots=True)
class Blueprint:
    """``config`` is config.json as it would be written; ``tensors``: by their names on disk, floats on the meta device,
    whole numbers as they are; ``module``: the model itself, on the meta device."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    module: nn.Module

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def classes(self) -> dict[str, str]:
        """The names of the modules' classes, by path."""
        return {path: _known_class(part) for path, part in self.module.named_modules()}

    @property
    def numbers(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


class Architecture:
    """A class of transformers for a config.json. Remote code is never run.

    Raises InputError where config.json is not one, InconclusiveError where transformers does not know the architecture.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        require_sane(config)
        try:
            import transformers
            from transformers.utils import logging
        except ImportError:
            raise InconclusiveError("transformers is not installed", hint="pip install 'tpshard[hf]'") from None
        quiet: Any = logging
        quiet.set_verbosity_error()
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise InputError("config.json: names no model_type", hint="is it a model's config.json?")
        known: Any = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        if model_type not in known:
            remote = "; its own code (auto_map) is never run" if "auto_map" in config else ""
            what = f"transformers {transformers.__version__} does not know model_type '{printable(model_type)}'{remote}"
            raise InconclusiveError(what, hint="a checkpoint folder can be checked by names and shapes alone")
        self.model_type, self.own = model_type, dict(config)
        self._config_class: Any = known[model_type]
        self._class = _class_for(transformers, model_type, config)
        self.name: str = self._class.__name__
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        self._full: dict[str, Any] = json.loads(self._read(plain).to_json_string(use_diff=False))
        require_sane(self._full)

    def _read(self, config: Mapping[str, Any]) -> Any:
        try:
            return self._config_class.from_dict(copy.deepcopy(dict(config)))
        except Exception as error:
            raise InconclusiveError(f"transformers cannot read config.json: {one_line(error)}") from None

    @property
    def plan(self) -> Mapping[str, str]:
        """Which modules transformers' own tensor parallelism cuts, and how, by patterns of names; may be empty."""
        config = self._read({key: value for key, value in self.own.items() if key != "quantization_config"})
        found: dict[str, str] = {}
        for source in (getattr(config, "base_model_tp_plan", None), getattr(self._class, "_tp_plan", None)):
            if isinstance(source, Mapping):
                found |= {key: style for key, style in source.items() if isinstance(style, str)}
        return found

    @property
    def full(self) -> Mapping[str, Any]:
        """config.json with the defaults that it leaves out."""
        return self._full

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not as config.json says."""
        if self.own.get("quantization_config") is None:
            return ()
        return ("config.json tells of quantisation: names and shapes are those of the model without it",)

    def real(self) -> Blueprint:
        """At its real sizes."""
        return Blueprint(self.own, *self._built(self._full, on_meta=True))

    def smaller(self, ranks: int) -> Iterator[Blueprint]:
        """Models with its heads and every kind of its layers, the smallest first; ``ranks``: a multiple of the rank
        counts that they are for. Raises InconclusiveError where none can be made."""
        depth = self._depth()
        reasons: list[str] = []
        made = 0
        for short in (True, False):
            for width in divisors(self._full):
                try:
                    config = scaled(self._full, Scale(width, depth, ranks, short))
                    found = Blueprint(self._told(config), *self._built(config))
                except (ValueError, InconclusiveError) as error:
                    reasons.append(one_line(error))
                    continue
                if found.numbers <= MOST_NUMBERS:
                    made += 1
                    yield found
                else:
                    reasons.append(f"{found.numbers:.1e} numbers are too many to try")
        if not made:
            raise InconclusiveError(f"no smaller {self.name} can be made: {reasons[0] if reasons else 'no sizes'}")

    def written(self, blueprint: Blueprint) -> dict[str, Any]:
        """config.json of a smaller model, whole, for transformers to read."""
        module: Any = blueprint.module
        return {**module.config.to_dict(), "architectures": [self.name], "model_type": self.model_type}

    def _told(self, smaller: Mapping[str, Any]) -> dict[str, Any]:
        """The same keys as in the config.json that was given, with the smaller numbers: a policy's expressions are over
        its keys."""
        return _restricted(smaller, self.own, self._config_class)

    def _depth(self) -> int:
        """The fewest layers that show every kind."""
        wanted = _kinds(self._built(self._full, on_meta=True)[1])
        steps = depths_to_try(self._full)
        for depth in steps[:-1]:
            try:
                config = scaled(self._full, Scale(1, depth, only_depth=True))
                if _kinds(self._built(config, on_meta=True)[1]) == wanted and _same_lists(self._full, config):
                    return depth
            except (ValueError, InconclusiveError):
                continue
        return steps[-1]

    def _built(self, config: Mapping[str, Any], on_meta: bool = False) -> tuple[dict[str, torch.Tensor], nn.Module]:
        read = self._read(config)
        try:
            with torch.device("meta" if on_meta else "cpu"), without_parameters():
                module = self._class._from_config(
                    read, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
                )
            return on_disk(module), module.eval()
        except Exception as error:
            raise InconclusiveError(f"{self.name} cannot be made: {one_line(error)}") from None


def _known_class(module: nn.Module) -> str:
    """Embedding, Linear and Conv1D, whatever was derived from them."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return next((name for name in ("Embedding", "Conv1D", "Linear") if name in names), names[0])


def on_disk(module: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's checkpoint as ``save_pretrained`` would write them, without writing them."""
    state: dict[str, torch.Tensor] = dict(module.state_dict())
    for key in module._keys_to_ignore_on_save or ():
        state.pop(key, None)
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = remove_tied_weights_from_state_dict(state, module)
    return dict(revert_weight_conversion(module, state))


def _class_for(transformers: Any, model_type: str, config: Mapping[str, Any]) -> Maker:
    """The class that config.json names; where it names none, the one that predicts words, or the first there is."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        name = next(_usual_names(transformers.models.auto.modeling_auto, model_type), None)
    found = getattr(transformers, name or "", None)
    if found is None or not isinstance(found, type) or not hasattr(found, "_from_config"):
        what = f"transformers {transformers.__version__} does not know {printable(name or 'a model of ' + model_type)}"
        raise InconclusiveError(what, hint="name another class in config.json's architectures")
    return found


def _usual_names(auto: Any, model_type: str) -> Iterator[str]:
    for kind in (
        "CAUSAL_LM",
        "SEQ_TO_SEQ_CAUSAL_LM",
        "IMAGE_TEXT_TO_TEXT",
        "MASKED_LM",
        "PRETRAINING",
        "SPEECH_SEQ_2_SEQ",
    ):
        name = getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").get(model_type)
        if name is not None:
            yield name if isinstance(name, str) else name[0]
    name = auto.MODEL_MAPPING_NAMES.get(model_type)
    if name is not None:
        yield name if isinstance(name, str) else name[0]


def _kinds(module: nn.Module) -> set[Any]:
    """The unlike elements of a model's outermost lists of modules: their classes and their parameters' shapes."""
    kinds: set[Any] = set()
    for path in outermost_blocks(module):
        block = module.get_submodule(path)
        classes = tuple((name, type(part).__name__) for name, part in block.named_modules())
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kinds.add((path.rpartition(".")[0], classes, shapes))
    return kinds


def _same_lists(real: Mapping[str, Any], smaller: Mapping[str, Any]) -> bool:
    """Whether lists that were shortened (kinds of layers) still have every item."""
    for key, value in real.items():
        short = smaller.get(key)
        if isinstance(value, Mapping) and isinstance(short, Mapping) and not _same_lists(value, short):
            return False
        if not isinstance(value, list) or not isinstance(short, list):
            continue
        if len(short) < len(value) and set(map(str, short)) != set(map(str, value)):
            return False
    return True


def _restricted(smaller: Mapping[str, Any], own: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    aliases: Mapping[str, str] = getattr(config_class, "attribute_map", {})
    made: dict[str, Any] = {}
    for key, value in own.items():
        known = key if key in smaller else aliases.get(key, key)
        new = smaller.get(known, value)
        made[key] = _restricted(new, value, None) if isinstance(value, Mapping) and isinstance(new, Mapping) else new
    return made
