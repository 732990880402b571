"""Parameters that several commands share: text becomes objects here, at the edge."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from tpshard.digest import ALGORITHMS
from tpshard.mesh import Grid, Mesh
from tpshard.stores.path import place

Function = TypeVar("Function", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number from 1, in plain decimal: 010, 2.0 and 1e3 are refused rather than guessed at."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if not re.fullmatch(r"[1-9][0-9]{0,17}", value):
            self.fail(f"'{value}' is not a whole number from 1, in plain decimal", param, ctx)
        return int(value)


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes: 5GB (powers of ten), 5GiB (powers of two), or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,3}))?\s*([A-Za-z]*)", value)
        if not match or match[3].upper() not in _UNITS:
            self.fail(f"'{value}' is not a size such as 5GB, 500MB or 4GiB", param, ctx)
        size = int(float(f"{match[1]}.{match[2] or 0}") * _UNITS[match[3].upper()])
        if size < 1:
            self.fail("must be at least one byte", param, ctx)
        return size


def counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(Count().convert(part, param, ctx) for part in value.split(",")) if value else ()


class Folder(click.Path):
    """A folder here, or the URL of one in a store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return place(value)


FOLDER = Folder()
FILE = click.Path(path_type=Path)

quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/json.md has its shape).")
tp = click.option("--tp", type=Count(), required=True, metavar="N", help="Number of tensor-parallel ranks.")
base = click.option(
    "--base", type=FOLDER, metavar="MODEL", help="The base model of a LoRA adapter: its folder, or its config.json."
)
engine = click.option(
    "--engine", default="native", show_default=True, metavar="E", help="Whose files are written: tpshard engines lists."
)
source_engine = click.option("--from", "source_engine", metavar="E", help="Whose files SRC has; default: recognised.")
config = click.option("--config", type=FOLDER, metavar="FILE", help="The model's config.json, where SRC has none.")
no_manifest = click.option("--no-manifest", is_flag=True, help="Write the engine's files alone.")
max_shard_size = click.option(
    "--max-shard-size", type=Size(), metavar="SIZE", help="Start a new file beyond this, e.g. 5GB, 4GiB."
)
workers = click.option("--workers", type=Count(), metavar="W", help="Writer threads; the result is the same for any.")
digest = click.option(
    "--digest", type=click.Choice(ALGORITHMS), default="xxh3-128", show_default=True, help="For tensors and files."
)
strict = click.option("--strict", is_flag=True, help="Make warnings errors, e.g. a rule that matches nothing.")
resume = click.option(
    "--resume", is_flag=True, help="Go on where a run was interrupted; keep what is finished if this one is."
)
timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    metavar="SECONDS",
    help="How long several processes wait for one another.",
)
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")


_GRID = (
    tp,
    click.option("--ep", type=Count(), default=1, metavar="N", help="Groups of --tp ranks, each with its own experts."),
    click.option("--pp", type=Count(), default=1, metavar="N", help="Pipeline stages, each with its own layers."),
    click.option("--expert-parallel", is_flag=True, help="Deal whole experts to the --tp ranks; cut none."),
    click.option("--stages", callback=counts, default="", metavar="N,...", help="Layers of each stage, not balanced."),
)


def grid(function: Function) -> Function:
    """The options that say for which ranks; the function gets them as one ``grid``."""

    @functools.wraps(function)
    def with_grid(
        *args: Any, tp: int, ep: int, pp: int, expert_parallel: bool, stages: tuple[int, ...], **kwargs: Any
    ) -> Any:
        return function(*args, grid=Grid(Mesh(tp=tp, ep=ep, pp=pp), expert_parallel, stages), **kwargs)

    return apply(*_GRID)(cast(Function, with_grid))


def apply(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options as one decorator, in the order given."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
