"""What transformers calls a base model's tensors once they are loaded, for adapters: PEFT's names are the module's."""

from __future__ import annotations

import torch

from tpshard.adapter_folder import Base
from tpshard.verify.models import TransformersModel
from tpshard.verify.preparation import default_dtype


def disk_names(base: Base) -> dict[str, str]:
    """By a parameter's name in the module, the tensor on disk that it is. Those that are made of several, or changed
    when they are loaded, are left out. Raises InconclusiveError where transformers cannot tell."""
    assert base.checkpoint is not None
    with default_dtype(torch.float64):
        model = TransformersModel(base.place, base.config, tuple(base.checkpoint.tensors), torch.float64)
    return {name: recipe.names[0] for name, recipe in model.recipes.items() if recipe.plain and name != recipe.names[0]}
