"""Gradients of a real loss, through the whole model at once: a second figure beside the block-by-block ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError
from tpshard.verify.execution import Outcome, Subject, Way, execute, tensors_of
from tpshard.verify.inputs import signature_of
from tpshard.verify.models import one_line, slots
from tpshard.verify.sections import tensors_in
from tpshard.verify.values import Weights

MOST = 10**9  # bytes of activations
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


def activations(subject: Subject) -> int:
    """About as many bytes as all runs keep until the way back: what matrices are given and return, in float64."""
    first = max((tensor.shape[:2].numel() for tensor in tensors_in(subject.inputs)), default=1)
    tables = {id(part.weight) for part in subject.model.skeleton.modules() if isinstance(part, nn.Embedding)}
    matrices = [t for t in slots(subject.model.skeleton).values() if t.ndim >= 2 and id(t) not in tables]
    return sum(sum(t.shape[-2:]) for t in matrices) * first * 8 * (subject.ranks + 1)


def run_loss(subject: Subject, weights: Weights) -> tuple[str, Outcome | str]:
    """The loss's name and what its gradients showed; or why there are none, which is no verdict."""
    name, inputs, function = loss_of(subject)
    needed = activations(subject)
    if needed > MOST:
        return name, f"its activations take about {needed / 1e9:.1f} GB"
    try:
        outcome = execute(replace(subject, inputs=inputs), weights, Way(loss=function))
    except InconclusiveError as error:
        return name, str(error)
    return name, outcome if outcome.failure is None else one_line(outcome.failure.cause)
