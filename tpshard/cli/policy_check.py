"""``tpshard policy check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpshard.checkpoint import open_checkpoint
from tpshard.cli import options, render
from tpshard.errors import UsageError
from tpshard.folder import config_of
from tpshard.library import choose_policy
from tpshard.partition import LARGEST_TP_LISTED
from tpshard.policy_check import PolicyCheck, Use, check_policy, in_runs, in_words
from tpshard.quantised import read_quantised

if TYPE_CHECKING:
    from tpshard.verify.policy_proof import Proven


@click.command()
@click.argument("wanted", metavar="POLICY")
@click.argument("folder", metavar="[CHECKPOINT]", type=options.FOLDER, required=False)
@click.option("--config", metavar="FILE", type=options.FILE, help="A config.json (or its folder); needs no weights.")
@click.option(
    "--tp", "ranks", callback=options.counts, default="", metavar="N,...", help="Rank counts that have to work."
)
@options.apply(options.strict, options.as_json)
def check(
    wanted: str, folder: Path | None, config: Path | None, ranks: tuple[int, ...], strict: bool, as_json: bool
) -> int:
    """Say whether a policy fits a checkpoint; with --config, prove it without any weights.

    POLICY (auto, a built-in name, or a YAML file) is matched with every tensor of CHECKPOINT. Shown are what each
    rule cuts, the rank counts that work, and which rule is against the others. Only headers are read, nothing is
    written.

    With --config the tensors are those that transformers' model for that config.json has. For each --tp a smaller
    model of the same architecture, with the same heads and random numbers, is cut and run as verify does it.

    Exit codes: 0 fits (and is proven), 1 the model came out wrong, 2 does not fit, or not at a --tp asked for,
    4 not proven either way.

    \b
    tpshard policy check llama llama-8b
    tpshard policy check my-policy.yaml my-model --tp 2,4,8
    tpshard policy check auto --config llama-70b/config.json --tp 2,4,8
    tpshard policy check auto llama-8b --tp 16 --json
    """
    if (folder is None) == (config is None):
        raise UsageError("policy check wants a CHECKPOINT folder or --config FILE, one of the two")
    if config is not None:
        return _proven(wanted, config, ranks, strict, as_json)
    assert folder is not None
    checkpoint = open_checkpoint(folder)
    policy = choose_policy(wanted, checkpoint.config)
    found = check_policy(policy, checkpoint, ranks, read_quantised(checkpoint))
    render.warn(found.warnings, strict)
    if as_json:
        render.emit({"command": "policy check", "path": str(folder), **found.as_json()})
        return found.refusal.exit_code if found.refusal else 0
    render.say("\n".join([fit_text(found), *(f"--tp {t.ranks:<4} {t.problem or 'works'}" for t in found.trials)]))
    if found.refusal:
        raise found.refusal
    return 0


def _proven(wanted: str, path: Path, ranks: Sequence[int], strict: bool, as_json: bool) -> int:
    config = config_of(path)
    policy = choose_policy(wanted, config)
    from tpshard.verify.policy_proof import prove_without_weights

    found = prove_without_weights(policy, config, ranks)
    render.warn(found.fit.warnings, strict)
    if as_json:
        render.emit({"command": "policy check", "path": str(path), **found.as_json()})
    else:
        render.say("\n".join([fit_text(found.fit), *proof_lines(found)]))
    if found.exit_code == 2 and found.fit.refusal and not as_json:
        raise found.fit.refusal
    return found.exit_code


def fit_text(found: PolicyCheck) -> str:
    """What each rule cuts, the rank counts that work, and what is against the others."""
    head = ["rule", "pattern", "tensors", "axis", "units"]
    rows = [_row(use) for use in found.uses]
    return "\n".join(
        [
            render.table([head, *rows], right=frozenset({2, 3})),
            "",
            f"policy {found.policy.name} has a rule for each of {found.tensors} tensors",
            f"--tp that works, up to {LARGEST_TP_LISTED}: {in_runs(found.legal)}",
            *(f"  not {refusal}" for refusal in found.refusals),
        ]
    )


def proof_lines(found: Proven) -> list[str]:
    """One line for each rank count, after one that says what was run."""
    return [found.model_line, *(f"--tp {trial.ranks:<4} {trial.line}" for trial in found.trials)]


def _row(use: Use) -> list[str]:
    kind, gather = (use.rule.kind, use.rule.gather) if use.rule else ("replicate", "")
    said = {"": "", "output": ", gather", "input": ", gather input"}[gather]
    axis = "-" if use.axis is None else str(use.axis)
    return [f"{kind}{said}", use.rule.key if use.rule else "(default)", str(use.tensors), axis, in_words(use.cut)]
