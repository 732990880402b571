"""The same run in the checkpoint's own dtype: what an engine would show. Beside the verdict, never the gate, since no
figure here tells a head swap from rounding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpshard.errors import InconclusiveError, UsageError
from tpshard.verify.execution import Outcome, Subject, Way, execute
from tpshard.verify.models import one_line
from tpshard.verify.placement import Parameters
from tpshard.verify.preparation import Choice, default_dtype, make_model
from tpshard.verify.report import Table
from tpshard.verify.values import TORCH_DTYPES, Weights

COMPUTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class NativeFigures:
    """Of the first output: rank 0's against the unsharded model's. The last three are for logits: nats for each
    position, and shares of positions."""

    dtype: str
    max_abs: float
    relative: float
    divergence: float | None = None
    top_1: float | None = None
    top_5: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "max_abs": self.max_abs,
            "relative_l2": self.relative,
            "kl_nats_per_position": self.divergence,
            "top_1_agreement": self.top_1,
            "top_5_agreement": self.top_5,
        }

    def table(self) -> Table:
        rows = [("largest difference", f"{self.max_abs:.2e}"), ("relative L2", f"{self.relative:.2e}")]
        if self.divergence is not None:
            rows += [
                ("KL, nats per position", f"{self.divergence:.2e}"),
                ("same first choice", f"{self.top_1:.1%}"),
                ("same first five", f"{self.top_5:.1%}"),
            ]
        return Table(f"in {self.dtype}, beside the verdict", ("rank 0 against unsharded", ""), tuple(rows), brief=5)


def native_dtype(weights: Weights) -> torch.dtype:
    """The commonest of the checkpoint's that one computes in; BF16 where there is none."""
    count = Counter(TORCH_DTYPES.get(weights.dtype(name)) for name in weights.names)
    return next((dtype for dtype, _ in count.most_common() if dtype in COMPUTED), torch.bfloat16)


def native_figures(subject: Subject, weights: Weights, choice: Choice) -> NativeFigures | str:
    """The figures, or why there are none."""
    dtype = native_dtype(weights)
    name = str(dtype).removeprefix("torch.")
    try:
        with default_dtype(dtype):
            model = make_model(weights, replace(choice, dtype=dtype))
            inputs = model.inputs(weights.ranks, choice.seed)
            low = replace(subject, model=model, parameters=Parameters(model, weights), inputs=inputs)
            outcome = execute(low, weights, Way(dtype=dtype, keep=True))
    except (InconclusiveError, UsageError) as error:
        return f"no figures in {name}: {error}"
    if len(outcome.outputs) < 2:  # the reference is in another process
        return f"no figures in {name}"
    if outcome.failure is not None:
        return f"no figures in {name}: {one_line(outcome.failure.cause)}"
    return _figures(name, outcome, subject)


def _figures(name: str, outcome: Outcome, subject: Subject) -> NativeFigures | str:
    want, got = outcome.outputs[0][0].double(), outcome.outputs[1][0].double()
    if want.shape != got.shape:
        return f"no figures in {name}: rank 0's output is {list(got.shape)}, not {list(want.shape)}"
    if not bool(torch.isfinite(want).all() and torch.isfinite(got).all()):
        return f"no figures in {name}: there are numbers that are not finite in its range"
    apart = got - want
    figures = NativeFigures(name, float(apart.abs().max()), float(apart.norm() / want.norm().clamp(min=1e-300)))
    if want.ndim != 3 or want.shape[-1] < 6 or not _is_vocabulary(subject, want.shape[-1]):
        return figures
    best, ours = want.topk(5).indices, got.topk(5).indices
    divergence = torch.nn.functional.kl_div(
        got.log_softmax(-1), want.log_softmax(-1), reduction="none", log_target=True
    )
    same_five = (best.unsqueeze(-1) == ours.unsqueeze(-2)).any(-1).double().mean()
    return replace(
        figures,
        divergence=float(divergence.sum(-1).mean()),
        top_1=float((best[..., 0] == ours[..., 0]).double().mean()),
        top_5=float(same_five),
    )


def _is_vocabulary(subject: Subject, size: int) -> bool:
    config: Any = getattr(subject.model.skeleton, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "vocab_size", None) == size)
