"""A model that transformers does not know, for ``--model tests.a_model:build``: two towers and a head."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Embedding by vocabulary, a column and a row layer around a norm of the whole, a gathered head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(101, 14)
        self.up = nn.Linear(14, 33)
        self.down = nn.Linear(33, 14)
        self.norm = nn.LayerNorm(14)
        self.head = nn.Linear(14, 9)
        self.unused = nn.Linear(14, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        head: torch.Tensor = self.head(x)
        return head


class NetThatUsesAll(Net):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return torch.cat([self.head(x), self.unused(x)], dim=-1)


class NetThatBreaks(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if bool((self.up.weight[0] == 0).all()):  # so on every rank but the one that holds row 0
            raise RuntimeError("not on this rank")
        return super().forward(tokens)


class NetThatTakesAnotherWay(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if bool((self.up.weight[0] == 0).all()):
            return self.head(self.words(tokens))  # type: ignore[no-any-return]
        return super().forward(tokens)


class NetThatDies(NetThatUsesAll):
    """The second of several processes dies without a word, once it has weights."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if os.environ.get("RANK") == "1" and bool((self.up.weight != 0).any()):
            os._exit(9)
        return super().forward(tokens)


def is_a_rank(model: Net) -> bool:
    """Whether some channels are another's."""
    return bool((model.up.weight == 0).all(dim=1).any())


class NetThatLosesAnOutput(Net):
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        x = self.words(tokens)
        outputs = self.head(self.norm(x + self.down(torch.relu(self.up(x))))), self.unused(x)
        return outputs[:1] if is_a_rank(self) else outputs


class _TurnedOnTheWayBack(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.flip(-1)


class NetThatTurnsGradients(NetThatUsesAll):
    """Right forward; on the ranks the output's gradient has its features in reverse."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output = super().forward(tokens)
        turned: torch.Tensor = _TurnedOnTheWayBack.apply(output)
        return turned if is_a_rank(self) else output


class NetThatForgetsGradients(NetThatUsesAll):
    """Right forward; on the ranks nothing before the norm's output learns."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        x = x.detach() if is_a_rank(self) else x
        return torch.cat([self.head(x), self.unused(x)], dim=-1)


TOKENS = torch.arange(0, 100, 2).reshape(2, 25)


def build(config: dict[str, Any]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return NetThatUsesAll(), {"tokens": TOKENS}


def build_partly_used(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Net(), (TOKENS,)


def build_breaking(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return NetThatBreaks(), (TOKENS,)


def build_other_way(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return NetThatTakesAnotherWay(), (TOKENS,)


def build_losing_an_output(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return NetThatLosesAnOutput(), (TOKENS,)


def build_turning_gradients(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return NetThatTurnsGradients(), (TOKENS,)


def build_forgetting_gradients(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return NetThatForgetsGradients(), (TOKENS,)


def build_another(config: dict[str, Any]) -> tuple[nn.Module, tuple[torch.Tensor]]:
    return nn.Linear(3, 5), (TOKENS,)


def build_nothing(config: dict[str, Any]) -> None:
    return None


def build_dying(config: dict[str, Any]) -> tuple[nn.Module, Any]:
    return NetThatDies(), {"tokens": TOKENS}


# ------------------------------------------------------------------------------------------ that do not run


class NetThatRaises(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such\nforward")


class NetThatLeaves(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise SystemExit(0)


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no derivative is known")


class NetWithoutWayBack(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (
            super().forward(_OneWay.apply(tokens * 1.0).long() // 2)
            + _OneWay.apply(self.norm(self.words(tokens)))[..., :1]
        )


class NetThatOverwrites(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = super().forward(tokens).exp()
        return y.add_(1) * y.mul_(2)


class NetWithoutHistory(NetThatUsesAll):
    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens)


class NetOfWholeNumbers(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).argmax(-1)


class NetOfNothing(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> None:
        super().forward(tokens)


class NetThatLosesShape(NetThatUsesAll):
    """The number of positions depends on the rank."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = super().forward(tokens)
        return y[:, 1:] if bool((self.up.weight[0] == 0).all()) else y


class NetInDoubleOnly(NetThatUsesAll):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.up.weight.dtype is not torch.float64:
            raise RuntimeError("not in this dtype")
        return super().forward(tokens)


class NetOfSmallNorms(NetThatUsesAll):
    """Runs with its own weights and not with generic ones, whose norms are around one."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if bool(self.norm.weight.mean() > 0.6):
            raise ValueError("norms are too large")
        return super().forward(tokens)


def _of(made: type[nn.Module]) -> Any:
    return lambda config: (made(), {"tokens": TOKENS})


build_raising, build_leaving, build_one_way = _of(NetThatRaises), _of(NetThatLeaves), _of(NetWithoutWayBack)
build_overwriting, build_without_history = _of(NetThatOverwrites), _of(NetWithoutHistory)
build_whole_numbers, build_no_output, build_losing = _of(NetOfWholeNumbers), _of(NetOfNothing), _of(NetThatLosesShape)
build_double_only, build_small_norms = _of(NetInDoubleOnly), _of(NetOfSmallNorms)


def build_exit(config: dict[str, Any]) -> None:
    raise SystemExit(0)
