"""``python -m tests.failures [--most N] [--rounds N] [--case NAME]``: every kind of failure at every call, then random
ones, one after the other; prints the table of rounds and outcomes. Needs Linux and gcc."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from tests.failures.kinds import KINDS, retried
from tests.failures.rounds import HEAD, Case, Tally, fresh, small_cases
from tests.failures.server import Server

CASES = ("split", "reshard", "merge")


def tallies(
    server: Server, cases: list[Case], names: tuple[str, ...], most: int | None, rounds: int, seed: int
) -> Iterator[Tally]:
    """All kinds for each case that is named, then random rounds. Split makes what the others read."""
    for case in cases:
        if case.name not in names:
            continue
        if case.name != "split":
            server.run(cases[0].folder, cases[0].words)
        for kind in KINDS:
            yield from kind(server, fresh(case), most)
        yield retried(server, fresh(case), rounds, seed)


@click.command()
@click.option("--most", type=int, help="Calls to fail at, spread over the run; default: every one.")
@click.option("--rounds", default=500, show_default=True, help="Random rounds for each command.")
@click.option("--seed", default=1, show_default=True, help="Of the random rounds.")
@click.option("--case", "names", type=click.Choice(CASES), multiple=True, help="Default: all of them.")
def main(most: int | None, rounds: int, seed: int, names: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(prefix="tpshard-failures-") as scratch, Server() as server:
        cases = small_cases(server, Path(scratch))
        click.echo(HEAD)
        total = Tally("in all")
        for tally in tallies(server, cases, names or CASES, most, rounds, seed):
            click.echo(tally.row())
            total += tally
        click.echo(total.row())


if __name__ == "__main__":
    main()
