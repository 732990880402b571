"""Faults, planted into the verifier itself: ``python -m tests.mutants`` shows that each turns a test red.

Every mutant is a few characters changed in a copy of the package. Ids are those of the list that the project keeps (V01
to V25). ``python -m tests.mutants V05 V24`` plants those only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """In ``file`` of tpshard/verify, ``old`` (which stands there once) becomes ``new``; one of ``tests`` must fail."""

    id: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


V, L, F = "tests/test_verify.py::", "tests/test_layout_check.py::", "tests/test_faults.py::"
Q = "tests/test_quantised.py::"
NO_NAN = V + "test_difference_is_never_fooled"
ONE_OFF = V + "test_one_element_off_is_found_by_the_forward_alone"
WORST = V + "test_the_worst_check_decides"
TOKENS = V + "test_seeds_change_the_tokens_and_every_stratum_is_met"
BACK = V + "test_what_is_wrong_on_the_way_back_only"
BREAKS = V + "test_a_rank_that_breaks_down_fails_and_nothing_hangs"

MUTANTS = [
    Mutant("V01", "a check that covered nothing passes", "report.py",
           "if self.unproven or not self.covered or not all(self.covered.values()):", "if self.unproven:",
           (V + "test_a_check_that_covered_nothing_never_passes",)),
    Mutant("V02", "NaN is within tolerance: not (error > tolerance)", "record.py",
           "within = error <= TOLERANCE and bool(apart.abs().max() <= LARGEST * root_mean_square)",
           "within = not error > TOLERANCE and not bool(apart.abs().max() > LARGEST * root_mean_square)", (NO_NAN,)),
    Mutant("V02", "a gradient that is NaN is within tolerance", "sections.py",
           'error = error if error == error else float("inf")\n        gradients.append(Gradient(section, d.key, error, not error <= TOLERANCE))',
           "gradients.append(Gradient(section, d.key, error, error > TOLERANCE))",
           (V + "test_a_gradient_that_is_no_number_is_wrong",)),
    Mutant("V03", "max(0.0, NaN) is 0.0", "record.py",
           "error = float(torch.maximum(of_rows.max(), apart.norm() / rows.norm()))",
           "error = max(0.0, float(of_rows.max()), float(apart.norm() / rows.norm()))", (NO_NAN,)),
    Mutant("V04", "unlike shapes are broadcast", "record.py", "if got.shape != want.shape:", "if False:", (NO_NAN,)),
    Mutant("V05", "zip drops the model's last outputs", "execution.py",
           "zip(own, reference, strict=True)", "zip(own, reference, strict=False)",
           (V + "test_an_output_more_than_the_ranks_have_is_found",)),
    Mutant("V06", "a rank's exception is swallowed", "execution.py",
           "failure = self._accepted(error)", "self._accepted(error)", (BREAKS,)),
    Mutant("V07", "exit code 0 after FAIL", "report.py", '"FAIL": 1,', '"FAIL": 0,', (WORST,)),
    Mutant("V08", "the ranks' numbers are the source's", "values.py",
           "return self._read(self._shards.tensors[name], holder, self._files[0], box)",
           "inside = [p for _, p in self.held(name, holder) if p.local.intersect(box) == box]\n"
           "            away = tuple(g - own for g, own in zip(inside[0].box.start, inside[0].local.start, strict=True))\n"
           "            return self.read(name, WHOLE, box.translate(away))", (ONE_OFF,)),
    Mutant("V09", "the reference is what the shards are together", "values.py",
           "if self._source is not None:", "if False:", (ONE_OFF,)),
    Mutant("V10", "the wanted layout is the recorded one", "layout.py",
           "want = _wanted(parts, slot, sizes, way, rank, tensor.layout.ranks)\n        own",
           "want = held(tensor, axis, rank)\n        own", (L + "test_all_in_reverse_rank_order",)),
    Mutant("V10", "the forward joins outputs as the policy cut them", "placement.py",
           'task = "gather" if role.gather else "column"', 'task = "gather"',
           (F + "test_fault_is_caught_and_named[W01-gpt2@2-q,_k,_v_cut_into_equal_blocks]",)),
    Mutant("V11", "sequences of one position", "inputs.py", "POSITIONS = 24", "POSITIONS = 1", (TOKENS,)),
    Mutant("V11", "only the first position is compared", "record.py",
           "error, wrong = difference(got.detach(), want.detach())",
           "error, wrong = difference(got.detach()[..., :1, :], want.detach()[..., :1, :])",
           (V + "test_every_position_is_compared",)),
    Mutant("V12", "tokens from the first rank's vocabulary", "inputs.py",
           "* vocabulary / count\n", "* vocabulary / ranks / count\n", (TOKENS,)),
    Mutant("V13", "one token everywhere", "inputs.py",
           "return strata.long().clamp(max=vocabulary - 1)[order].reshape(sequences, length)",
           "return torch.full((sequences, length), vocabulary // 2)", (TOKENS,)),
    Mutant("V14", "only rank 0 is compared by the forward", "record.py",
           "        self.positions += want.numel()", "        wrong = wrong and rank == 0\n        self.positions += want.numel()",
           (ONE_OFF,)),
    Mutant("V14", "only rank 0's bytes are compared", "weights.py",
           "if rank not in self.findings and not np.array_equal(actual, expected):",
           "if rank == 0 and not np.array_equal(actual, expected):",
           (V + "test_first_bad_element_is_named_with_its_bytes",)),
    Mutant("V14", "only the first layer is compared", "seams.py",
           "        for layer in layers:\n            module = modules",
           '        for layer in [one for one in layers if ".0." in one.path]:\n            module = modules', (ONE_OFF,)),
    Mutant("V15", "the shards run as one rank", "values.py",
           "self.ranks = shards.ranks\n        self.names = tuple(shards.tensors)",
           "self.ranks = 1\n        self.names = tuple(shards.tensors)\n"
           "        self.layout = lambda name: Layout.replicated(shards.tensors[name].shape, 1)\n"
           "        self.held = lambda name, rank: everything(self, name)", (ONE_OFF,)),
    Mutant("V16", "what the checkpoint lacks is random, alike on both sides", "models.py",
           "        if missing:\n            what = f\"the checkpoint", "        if False:\n            what = f\"the checkpoint",
           (V + "test_a_tensor_that_the_checkpoint_lacks_is_not_made_up",)),
    Mutant("V17", "dropout is on", "models.py", "return module.eval()", "return module.train()",
           (F + "test_what_is_right_passes[gpt2@2]",)),
    Mutant("V18", "the gradients are those of a sum", "sections.py",
           "[torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in first]",
           "[torch.ones_like(t) for t in first]", (BACK,)),
    Mutant("V19", "gradients that no rank has are skipped", "sections.py",
           "    for d in found:\n", "    for d in found:\n        if d.apart == d.size:\n            continue\n", (BACK,)),
    Mutant("V20", "a million times the tolerance", "record.py", "TOLERANCE = 1e-10", "TOLERANCE = 1e-4", (NO_NAN,)),
    Mutant("V21", "only shapes are compared", "record.py",
           "        return float(\"inf\"), True\n    if not want.numel():", "        return float(\"inf\"), True\n    if True:",
           (NO_NAN,)),
    Mutant("V22", "the error is a mean over all positions", "record.py",
           "torch.maximum(of_rows.max(), apart.norm() / rows.norm())", "apart.norm() / rows.norm()", (NO_NAN,)),
    Mutant("V23", "what was not decided counts as passed", "report.py",
           "all(verdict is Verdict.PASS for verdict in counted)", "all(verdict is not Verdict.FAIL for verdict in counted)",
           (WORST,)),
    Mutant("V24", "bytes are compared as numbers", "weights.py",
           "if rank not in self.findings and not np.array_equal(actual, expected):",
           "if rank not in self.findings and not np.array_equal(actual.view(np.float32), expected.view(np.float32), equal_nan=True):",
           (V + "test_bytes_are_compared_and_not_numbers",)),
    Mutant("V25", "an old verdict is used again", "run.py",
           "def verify(request: Request)", "@__import__(\"functools\").cache\ndef verify(request: Request)",
           (V + "test_a_verdict_is_not_kept",)),
    Mutant("E01", "a rank's own part alone decides", "record.py",
           "return [seam for seam in self.seams if seam.what != OWN_PART] if self.moved else self.seams", "return self.seams",
           (V + "test_cells_that_moved_together_are_told_and_their_function_is_equal",)),
    Mutant("E01", "a rank's own part never decides, even where the whole differs", "record.py",
           "if not self.followed or any(seam.what != OWN_PART for seam in wrong):", "if not self.followed:", (ONE_OFF,)),
    Mutant("Q07", "a weight's numbers come with the source's scales", "logical.py",
           "self._read(weight, companion, holder, part)",
           "self._read(weight, companion, holder if companion.part == 'numbers' else WHOLE, part)",
           (Q + "test_numbers_of_any_region",)),
    Mutant("Q06", "the outputs in a word of AWQ are in ascending order", "dequantise.py",
           "AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)", "AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
           (Q + "test_numbers_of_any_region[awq]",)),
    Mutant("Q03", "scales may be anybody's, if there are enough", "companions.py",
           "if not np.array_equal(have, need):", "if len(have) != len(need):", (Q + "test_companions_astray_are_found",)),
    Mutant("Q04", "a cut inside a group counts as right", "companions.py",
           "if len(cells) != covered.sum():", "if False:", (Q + "test_companions_astray_are_found",)),
]  # fmt: skip


class Copy:
    """A copy of the package and its tests, to be changed and changed back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("tpshard", "tests", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def red_test(self, mutant: Mutant | None, tests: Sequence[str]) -> str | None:
        """The first test that fails with the mutant planted, if one does. Raises where the tests cannot be run."""
        path = self.folder / "tpshard/verify" / (mutant.file if mutant else "run.py")
        before = path.read_text("utf-8")
        if mutant:
            if before.count(mutant.old) != 1:
                raise ValueError(
                    f"{mutant.id}: '{mutant.old}' stands {before.count(mutant.old)} times in {mutant.file}"
                )
            path.write_text(before.replace(mutant.old, mutant.new), "utf-8")
        try:
            code, said = self._run(tests)
        finally:
            path.write_text(before, "utf-8")
        if code == 0:
            return None
        failed = re.search(r"^FAILED (\S+?::\S+)", said, re.MULTILINE)
        if code != 1 or not failed:
            raise RuntimeError(f"{mutant.id if mutant else 'no mutant'}: pytest ended with {code}\n{said}")
        return failed[1]

    def _run(self, tests: Sequence[str]) -> tuple[int, str]:
        """pytest in a child that has torch and transformers already, which take longer to import than the tests."""
        said = self.folder / "said"
        child = os.fork()
        if child == 0:
            code = 2
            try:
                with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    try:
                        code = self._pytest(tests)
                    except BaseException:
                        traceback.print_exc()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text("utf-8")

    def _pytest(self, tests: Sequence[str]) -> int:
        import pytest

        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "tpshard")]:
            del sys.modules[name]
        here = str(ROOT)
        sys.path[:] = [str(self.folder), *(entry for entry in sys.path if os.path.abspath(entry) != here)]
        quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported already
        sys.dont_write_bytecode = True
        os.chdir(self.folder)
        return int(
            pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", *quiet, *tests])
        )


def main(ids: Sequence[str]) -> int:
    import pytest  # noqa: F401 - for the children
    import torch  # noqa: F401
    import transformers  # noqa: F401

    wanted = [mutant for mutant in MUTANTS if not ids or mutant.id in ids]
    survived = 0
    with tempfile.TemporaryDirectory(prefix="tpshard-mutants-") as scratch:
        copy = Copy(Path(scratch))
        for mutant in wanted:
            red = copy.red_test(mutant, mutant.tests)
            survived += red is None
            print(
                f"{'red' if red else 'ALIVE':<6} {mutant.id}  {mutant.what:<58} {mutant.file:<13} {red or '-'}",
                flush=True,
            )
        red = copy.red_test(None, sorted({test for mutant in wanted for test in mutant.tests}))
    print(f"\n{len(wanted) - survived} of {len(wanted)} turn a test red; without them, {red or 'none'} is")
    return 1 if survived or red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
