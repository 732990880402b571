"""A model that the user names with ``--model package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tpshard.errors import UsageError, printable
from tpshard.verify.models import Recipe, one_line, renamed, slots, without_parameters


class FactoryModel:
    """``package.module:function``; the function takes config.json as a dict and returns the module and its inputs.

    Raises UsageError where it does not import, returns something else, or does not fit the checkpoint.
    """

    def __init__(self, text: str, config: Mapping[str, Any], shapes: Mapping[str, Any], dtype: torch.dtype) -> None:
        function = _import(text)
        self.name, self._dtype = text, dtype
        was = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)
            with without_parameters(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # random inputs are the same in every run
                made = function(dict(config))
        except (Exception, SystemExit) as error:
            raise UsageError(f"--model {text} failed: {one_line(error)}") from None
        finally:
            torch.set_default_dtype(was)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise UsageError(f"--model {text} must return (module, inputs), returned {type(made).__name__}")
        self.skeleton, self._inputs = made[0].to(dtype).eval(), made[1]
        self.recipes = self._fit(shapes)
        self.unused: tuple[str, ...] = ()

    def _fit(self, shapes: Mapping[str, Any]) -> dict[str, Recipe]:
        tensors = slots(self.skeleton)
        by_name = {name: renamed(name) for name in shapes if name in tensors}
        made = {id(tensors[name]) for name in by_name}
        missing = [name for name, tensor in tensors.items() if id(tensor) not in made]
        extra = [name for name in shapes if name not in tensors]
        wrong = [name for name in by_name if tuple(tensors[name].shape) != tuple(shapes[name])]
        problem = (
            f"it wants {printable(missing[0])}" if missing else
            f"it has no {printable(extra[0])}" if extra else
            f"its {printable(wrong[0])} is {list(tensors[wrong[0]].shape)}, on disk {list(shapes[wrong[0]])}" if wrong
            else None
        )  # fmt: skip
        if problem:
            hint = "its state_dict must have the names and shapes on disk"
            raise UsageError(f"--model {self.name} does not fit the checkpoint: {problem}", hint=hint)
        return by_name

    def inputs(self, ranks: int, seed: int) -> dict[str, Any]:
        if isinstance(self._inputs, Mapping):
            return {key: self._widened(value) for key, value in self._inputs.items()}
        values = self._inputs if isinstance(self._inputs, tuple) else (self._inputs,)
        return {"": tuple(map(self._widened, values))}

    def _widened(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _import(text: str) -> Callable[[dict[str, Any]], Any]:
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(f"--model '{printable(text)}' is not package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--model {printable(text)} does not import: {one_line(error)}") from None
    function = getattr(module, function_name, None)
    if function is None:
        raise UsageError(f"--model {printable(text)}: {module_name} has no {function_name}")
    if not callable(function):
        raise UsageError(f"--model {printable(text)} is not a function")
    return function  # type: ignore[no-any-return]
