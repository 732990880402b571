"""Faults, planted into what split writes: ``python -m tests.faults`` prints which checks caught each of them.

``python -m tests.faults W01 gpt2`` plants those whose id, model or description holds one of the words.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.fault_list import NOT_PLANTED, REFUSALS, Equivalent, Fault, Refusal, all_faults, clean, equivalents
from tests.planting import make_model
from tpshard.verify.report import Report, Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify


class Models:
    """Tiny models on disk, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, key: str) -> Path:
        source = self._folder / key.replace("/", "-")
        if not source.exists():
            make_model(key, source)
        return source


def try_fault(fault: Fault | Equivalent, source: Path, scratch: Path) -> Report:
    """Plant a fault into a fresh split and verify it."""
    target = scratch / "shards"
    against = fault.plant(source, target, fault.tp) or source
    if isinstance(fault, Equivalent):
        return verify(Request(target, against=against, workers=1))
    return verify(Request(target, against=against if fault.against else None, level=fault.level, workers=1))


def failing(report: Report) -> list[str]:
    return [check.name for check in report.checks if check.verdict is Verdict.FAIL]


def is_named(fault: Fault, report: Report) -> bool:
    """Whether one of the checks that should names the right tensor, layer or file."""
    checks = [check for check in report.checks if check.name in fault.caught_by]
    said = [str(finding) + (finding.layer or "") for check in checks for finding in check.findings]
    return any(fault.named in text for text in said)


def was_caught(fault: Fault, report: Report) -> bool:
    """Failed, by the checks that should, with the right tensor, layer or file named."""
    return fault.caught_by <= set(failing(report)) and is_named(fault, report)


def alarms(equivalent: Equivalent, report: Report) -> list[str]:
    """The checks that fail and should not, do not fail and should, or prove nothing."""
    wrong = set(failing(report)) ^ equivalent.failing
    unproven = {check.name for check in report.checks if check.verdict is Verdict.INCONCLUSIVE}
    return sorted(wrong | (unproven if "files" not in equivalent.failing else set()))


def was_refused(refusal: Refusal, source: Path, scratch: Path) -> bool:
    try:
        refusal.attempt(source, scratch)
    except refusal.error as error:
        return refusal.named in str(error)
    return False


# ---------------------------------------------------------------------------------------------- the tables


def main(words: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="tpshard-faults-") as scratch:
        models = Models(Path(scratch))
        wrong = [*_faults(models, words), *_equivalents(models, words), *_refusals(models, words)]
    print("\nNot planted:")
    for ids, reason in NOT_PLANTED.items():
        print(f"{ids:<16}  {reason}")
    return 1 if any(wrong) else 0


def _wanted(words: Sequence[str], *of: str) -> bool:
    return not words or any(word in text for word in words for text in of)


@contextmanager
def _place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="tpshard-faults-"))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _faults(models: Models, words: Sequence[str]) -> Iterator[bool]:
    print(f"{'':<6} {'id':<4} {'what':<52} {'model':<14} tp  caught by; whether rightly named")
    count, missed, by = Counter[str](), 0, Counter[str]()
    for fault in all_faults():
        if not _wanted(words, fault.id, fault.model, fault.what):
            continue
        with _place() as place:
            report = try_fault(fault, models(fault.model), place)
        caught, checks = was_caught(fault, report), failing(report)
        count[fault.id[0]] += 1
        missed += not caught
        by.update(checks)
        names = "named" if is_named(fault, report) else "NOT NAMED"
        mark = "caught" if caught else "MISSED"
        print(
            f"{mark} {fault.id:<4} {fault.what:<52} {fault.model:<14} {fault.tp}   {' '.join(checks) or '-'}; {names}",
            flush=True,
        )
        yield not caught
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(count.items()))
    print(f"\n{count.total() - missed} of {count.total()} caught and named ({kinds})")
    print("by " + ", ".join(f"{check} {number}" for check, number in by.most_common()))


def _equivalents(models: Models, words: Sequence[str]) -> Iterator[bool]:
    print(f"\n{'':<6} {'id':<4} {'equivalent, or right':<52} {'model':<14} tp  failing (as it should)")
    count = false = 0
    for equivalent in [*equivalents(), *(case for case, _ in clean())]:
        if not _wanted(words, equivalent.id or "clean", equivalent.model, equivalent.what):
            continue
        with _place() as place:
            report = try_fault(equivalent, models(equivalent.model), place)
        wrong = alarms(equivalent, report)
        count, false = count + 1, false + bool(wrong)
        mark, checks = "ALARM" if wrong else "right", " ".join(failing(report)) or "-"
        print(
            f"{mark:<6} {equivalent.id or '-':<4} {equivalent.what:<52} {equivalent.model:<14} {equivalent.tp}   {checks}",
            flush=True,
        )
        yield bool(wrong)
    print(f"\n{false} false alarms in {count}")


def _refusals(models: Models, words: Sequence[str]) -> Iterator[bool]:
    print(f"\n{'':<7} {'id':<4} refused before anything is planted")
    for refusal in REFUSALS:
        if _wanted(words, refusal.id, refusal.what):
            with _place() as place:
                refused = was_refused(refusal, models("qwen2"), place)
            print(f"{'refused' if refused else 'TAKEN'} {refusal.id:<4} {refusal.what}")
            yield not refused


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
