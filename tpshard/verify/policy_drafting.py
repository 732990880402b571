"""``policy init`` with a model at hand: drafts are tried on a smaller one, and what is left is proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpshard.errors import InconclusiveError, printable
from tpshard.layout import Shape
from tpshard.policy_init import Made, Source, make_policy, ranks_to_prove
from tpshard.verify.blueprint import Architecture
from tpshard.verify.policy_proof import Candidates, ForwardJudge, ProofTrial, proof_trial, told
from tpshard.verify.report import Verdict

MULTIPLE = 16 * 3 * 5 * 7  # of the rank counts that are tried


@dataclass(frozen=True, slots=True)
class Drafting:
    """``trials``: the proofs of the policy that was made; ``model_line``: what they ran on; ``unproven``: why there is
    no model to run."""

    made: Made
    trials: tuple[ProofTrial, ...] = ()
    model_line: str = ""
    unproven: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        verdicts = [trial.verdict for trial in self.trials]
        if Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.PASS if verdicts and set(verdicts) == {Verdict.PASS} else Verdict.INCONCLUSIVE

    @property
    def reason(self) -> str:
        """Why it is not proven; empty where it is."""
        return self.unproven or next((trial.line for trial in self.trials if trial.verdict is not Verdict.PASS), "")


def draft_and_prove(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Drafting:
    """``shapes``: a checkpoint's, or none, and then those that transformers' model has.

    Raises InputError where config.json is none; InconclusiveError where neither names nor an architecture are known.
    """
    try:
        architecture = Architecture(config)
        real = architecture.real()
    except InconclusiveError as error:
        if not shapes:
            raise
        return Drafting(make_policy(Source(shapes, config, config), None), unproven=str(error))
    source = Source({**real.shapes, **shapes}, config, architecture.full, real.classes, architecture.plan)
    candidates = Candidates(architecture.smaller(MULTIPLE))
    for wholly in (False, True):  # one forward decides, as a rule; where it did not see a fault, all checks do
        made = make_policy(source, ForwardJudge(architecture, candidates, wholly=wholly))
        trials = _trials(made, architecture, candidates)
        if not any(trial.verdict is Verdict.FAIL for trial in trials):
            break
    untried = [name for name in shapes if name not in real.shapes]
    warnings = list(architecture.warnings)
    if untried:
        what = f"{len(untried)} tensors of the checkpoint are not in the model that was run"
        warnings.append(f"{what}: {', '.join(map(printable, untried[:3]))}{', ...' if len(untried) > 3 else ''}")
    return Drafting(made, trials, told(architecture, real, candidates.used), warnings=tuple(warnings))


def _trials(made: Made, architecture: Architecture, candidates: Candidates) -> tuple[ProofTrial, ...]:
    ranks: Sequence[int] = ranks_to_prove(made.fit.legal)
    return tuple(proof_trial(made.policy, architecture, candidates, count) for count in ranks)
