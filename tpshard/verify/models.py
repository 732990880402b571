"""Where the model comes from: transformers' own classes, or a function that the user names.

Either way a maker turns a state dict in the names on disk into a module, so that renaming and conversion between disk
and module are the library's business, for the reference and for every rank alike.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tpshard.errors import InconclusiveError, UsageError, printable

State = dict[str, torch.Tensor]
POSITIONS = 24  # wrong rotary embeddings have looked fine for 20


class Maker(Protocol):
    """Makes modules from tensors in the names on disk, and the inputs to run them on."""

    def make(self, state: State) -> nn.Module: ...

    def parameter_of(self, name: str, model: nn.Module) -> str | None:
        """The module's own name of a tensor on disk; None where the model has no such tensor."""

    def call(self, model: nn.Module, ranks: int, seed: int) -> Any: ...


def one_line(error: BaseException) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


# ---------------------------------------------------------------------------------------- transformers


class TransformersMaker:
    """A class of transformers, by config.json's ``architectures``. Remote code is never run."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
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
        try:
            self._config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:
            raise InconclusiveError(f"transformers cannot read {folder}/config.json: {one_line(error)}") from None

    def make(self, state: State) -> nn.Module:
        try:
            model, info = self._class.from_pretrained(
                None,
                config=copy.deepcopy(self._config),
                state_dict=dict(state),
                dtype=torch.float64,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:
            raise InconclusiveError(f"{self._class.__name__} cannot be made: {one_line(error)}") from None
        lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if lacking:
            what = f"the checkpoint gives {self._class.__name__} no or another {printable(lacking[0])}"
            raise InconclusiveError(f"{what} ({len(lacking)} such tensors)", hint="is config.json of this model?")
        module: nn.Module = model.eval()
        return module

    def parameter_of(self, name: str, model: nn.Module) -> str | None:
        known = model.state_dict()
        prefix = str(getattr(model, "base_model_prefix", ""))
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in known:
                return candidate
        return self._renamed(name, model, known)

    def _renamed(self, name: str, model: nn.Module, known: Mapping[str, torch.Tensor]) -> str | None:
        """Through transformers' own conversion table, which is not a public interface: without it, no answer."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError:
            return None
        convertible: Any = model
        steps = get_model_conversion_mapping(convertible)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        found = rename_source_key(name, renamings, converters, convertible.base_model_prefix, dict(known))[0]
        return found if found in known else None

    def call(self, model: nn.Module, ranks: int, seed: int) -> Any:
        kind = getattr(model, "main_input_name", "input_ids")
        if kind != "input_ids":
            hint = "name the model and its inputs with --model"
            raise InconclusiveError(f"no inputs of kind {kind} can be made yet", hint=hint)
        text = self._config.get_text_config()
        tokens = token_ids(text.vocab_size, _longest(text), ranks, seed)
        inputs: dict[str, Any] = {"input_ids": tokens, "return_dict": True}
        if getattr(self._config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = token_ids(text.vocab_size, _longest(text), ranks, seed + 1)
        if hasattr(text, "use_cache"):
            inputs["use_cache"] = False
        return model(**inputs)


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


def _longest(config: Any) -> int:
    """Positions that the model can take; two fewer, since some models count from two."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return max(2, limit - 2) if isinstance(limit, int) and limit > 0 else 2**20


def token_ids(vocabulary: int, longest: int, ranks: int, seed: int) -> torch.Tensor:
    """Two sequences of tokens drawn from equal strata of the vocabulary, so that every rank's part is met."""
    length = min(max(POSITIONS, math.ceil(ranks / 2)), longest)
    count = 2 * length
    generator = torch.Generator().manual_seed(seed)
    strata = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * vocabulary / count
    order = torch.randperm(count, generator=generator)
    return strata.long().clamp(max=vocabulary - 1)[order].reshape(2, length)


# ---------------------------------------------------------------------------------------- --model


class FactoryMaker:
    """``package.module:function``; the function takes config.json as a dict and returns the module and its inputs."""

    def __init__(self, text: str, config: Mapping[str, Any]) -> None:
        self._function, self._text, self._config = _import(text), text, config
        self._inputs: Any = None

    def make(self, state: State) -> nn.Module:
        was = torch.get_default_dtype()
        try:
            made = self._function(dict(self._config))
        except Exception as error:
            raise UsageError(f"--model {self._text} failed: {one_line(error)}") from None
        finally:
            torch.set_default_dtype(was)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise UsageError(f"--model {self._text} must return (module, inputs), returned {type(made).__name__}")
        module, self._inputs = made[0].double().eval(), made[1]
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            hint = "its state_dict must have the names and shapes on disk"
            raise UsageError(
                f"--model {self._text} does not fit the checkpoint: {one_line(error)}", hint=hint
            ) from None
        return module

    def parameter_of(self, name: str, model: nn.Module) -> str | None:
        return name if name in model.state_dict() else None

    def call(self, model: nn.Module, ranks: int, seed: int) -> Any:
        inputs = self._inputs
        if isinstance(inputs, Mapping):
            return model(**{key: _widened(value) for key, value in inputs.items()})
        return model(*map(_widened, inputs if isinstance(inputs, tuple) else (inputs,)))


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _import(text: str) -> Callable[[dict[str, Any]], Any]:
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(f"--model '{printable(text)}' is not package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError:
        raise UsageError(f"--model {printable(text)}: {module_name} has no {function_name}") from None
    except Exception as error:
        raise UsageError(f"--model {printable(text)} does not import: {one_line(error)}") from None
    if not callable(function):
        raise UsageError(f"--model {printable(text)} is not a function")
    return function  # type: ignore[no-any-return]
