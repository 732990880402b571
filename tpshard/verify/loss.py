"""Gradients of a real loss, through the whole model at once: a second figure beside the block-by-block ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tpshard.errors import InconclusiveError
from tpshard.verify.execution import Outcome, Subject, Way, execute, tensors_of
from tpshard.verify.inputs import signature_of
from tpshard.verify.models import one_line
from tpshard.verify.values import Weights

WORDS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def loss_of(subject: Subject) -> tuple[str, Mapping[str, Any], Callable[[Any], torch.Tensor]]:
    """What the loss is called, the inputs that it wants, and the loss of an output.

    Language models: their own cross-entropy, the labels being the tokens. Others: the mean square distance of the
    first output from fixed random numbers.
    """
    module, inputs = subject.model.skeleton, dict(subject.inputs)
    words = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if words is not None and type(module).__name__.endswith(WORDS) and "labels" in signature_of(module):
        return "cross-entropy", inputs | {"labels": words}, lambda output: output.loss

    def distance(output: Any) -> torch.Tensor:
        first = next(tensors_of(output))
        target = torch.randn(first.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (first - target.to(first)).square().mean()

    return "mean square distance", inputs, distance


def run_loss(subject: Subject, weights: Weights) -> tuple[str, Outcome | str]:
    """The loss's name and what its gradients showed; or why there are none, which is no verdict."""
    name, inputs, function = loss_of(subject)
    try:
        outcome = execute(replace(subject, inputs=inputs), weights, Way(loss=function))
    except InconclusiveError as error:
        return name, str(error)
    return name, outcome if outcome.failure is None else one_line(outcome.failure.cause)
