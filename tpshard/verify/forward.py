"""Checks 4 and 5, forward and backward: the model itself, unsharded and sharded, in float64, compared seam by seam.

R copies of the unmodified model and the reference run in lock step. Rank r's copy has rank r's own bytes at their
global places among zeros, so that no head count, view or mask of the model's code has to change; partial sums meet
after row layers and parts at gather. A valid cut never lets a position that a rank owns depend on one that it does
not, so zeros elsewhere do no harm; where a cut is not valid, the numbers differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tpshard.errors import printable
from tpshard.verify.execution import Outcome, Subject
from tpshard.verify.models import one_line
from tpshard.verify.native import NativeFigures
from tpshard.verify.preparation import never_called
from tpshard.verify.record import TOLERANCE, Record, Seam
from tpshard.verify.report import CheckResult, Finding, Table, error_size
from tpshard.verify.sections import Gradient
from tpshard.verify.siblings import by_expert, shares
from tpshard.verify.values import Weights, layer_of


def forward_result(
    subject: Subject, weights: Weights, outcome: Outcome, isolate: bool, native: NativeFigures | str | None
) -> CheckResult:
    """What the comparison at every seam amounts to; ``native``: figures to tell beside, or why there are none."""
    record = outcome.record
    idle = never_called(subject, record.visited)
    cut = {layer.name for layer in subject.layers if layer.cut is not None}
    unreached = [name for name in idle if name in cut]
    reason = _unlike_the_reached(subject, weights, outcome)
    if unreached:
        reason = (
            f"the input did not reach {len(unreached)} cut layers: {', '.join(unreached[:5])} (give inputs that do, by "
            "--model; layers have to be called, not only their weights read)"
        )
    return CheckResult(
        "forward",
        findings=tuple(_findings(outcome, isolate)),
        covered={
            "tensors": len(weights.names) - len(subject.model.unused),
            "ranks": weights.ranks,
            "layers": len(record.visited),
            "seams": len(record.seams),
            "positions": record.positions,
        },
        notes=(
            *_notes(subject, record, [name for name in idle if name not in cut]),
            *_idle_experts(outcome),
            *([native] if isinstance(native, str) else []),
        ),
        tables=(_layer_table(subject, record), *([native.table()] if isinstance(native, NativeFigures) else [])),
        unproven=reason,
        figures={
            "worst_relative_error": record.worst,
            "tolerance": TOLERANCE,
            "gathers": record.gathers,
            "first_diverging": next((seam.layer for seam in record.counted if seam.wrong), None),
            "native": native.as_json() if isinstance(native, NativeFigures) else None,
        },
    )


def _layer_table(subject: Subject, record: Record) -> Table:
    """Every layer's largest error, the worst first; where some are wrong, those, in the order of execution."""
    tasks = {layer.name: layer.task for layer in subject.layers}
    worst: dict[str, float] = {}
    for seam in record.counted:
        worst[seam.layer] = max(seam.error, worst.get(seam.layer, 0.0))
    wrong = {seam.layer for seam in record.counted if seam.wrong}
    ordered = [item for item in worst.items() if item[0] in wrong] or sorted(worst.items(), key=lambda item: -item[1])
    rows = tuple((name, tasks.get(name, "-"), error_size(error, TOLERANCE)) for name, error in ordered)
    title = "wrong, in the order of execution" if wrong else "largest errors"
    return Table(title, ("layer", "task", "relative error"), rows)


def _gradient_table(subject: Subject, gradients: Sequence[Gradient]) -> Table:
    worst: dict[tuple[str, str], float] = {}
    for gradient in gradients:
        recipe = subject.model.recipes.get(gradient.parameter)
        name = recipe.names[0] if recipe else gradient.parameter or "its input"
        worst[gradient.section, name] = max(gradient.error, worst.get((gradient.section, name), 0.0))
    ordered = sorted(worst.items(), key=lambda item: -item[1])
    rows = tuple((section, name, error_size(error, TOLERANCE)) for (section, name), error in ordered)
    return Table("largest errors", ("section", "gradient of", "relative error"), rows)


def backward_result(
    subject: Subject, weights: Weights, outcome: Outcome, loss: tuple[str, Outcome | str] | None
) -> CheckResult:
    """What the comparison of all gradients amounts to; ``loss``: a loss's name, and what its gradients showed or why
    there are none."""
    recipes = subject.model.recipes
    gradients = _counted(outcome.gradients, outcome, subject)
    met = {gradient.parameter for gradient in outcome.gradients if gradient.parameter}
    idle = sorted({recipes[name].names[0] for name in recipes if name not in met} - _of(recipes, met))
    worst = max((gradient.error for gradient in gradients), default=0.0)
    notes = [f"largest relative error {worst:.1e}, tolerance {TOLERANCE:.0e}, float64, random cotangents"]
    if idle:
        notes.append(f"no gradient reaches {_some(idle)}")
    findings = [_gradient_finding(gradient, subject) for gradient in gradients if gradient.wrong]
    of_loss = None
    match loss:
        case (name, str() as why):
            notes.append(f"no figure of a real loss ({name}): {why}")
        case (name, Outcome() as through):
            by_loss = _counted(through.gradients, outcome, subject)
            of_loss = max((gradient.error for gradient in by_loss), default=0.0)
            notes.append(f"of a real loss ({name}, through the whole model): {of_loss:.1e}")
            findings = findings or [_gradient_finding(g, subject) for g in by_loss if g.wrong]
    if outcome.failure is not None and not findings:
        findings = [_broken(outcome)]
    unproven = None if outcome.is_right else "gradients mean nothing where the forward differs already"
    return CheckResult(
        "backward",
        findings=tuple(findings),
        unproven=unproven,
        covered={
            "parameters": len(met),
            "ranks": weights.ranks,
            "gradients": len(gradients),
            "sections": len({gradient.section for gradient in gradients}),
        },
        notes=tuple(notes),
        tables=(_gradient_table(subject, gradients),),
        figures={
            "worst_relative_error": worst,
            "tolerance": TOLERANCE,
            "loss": {"name": loss[0], "worst_relative_error": of_loss} if loss else None,
        },
    )


def generic_result(subject: Subject, weights: Weights, outcome: Outcome) -> CheckResult:
    """The same comparisons with numbers that hide nothing; what was found is told as for the real ones."""
    record, gradients = outcome.record, outcome.gradients
    worst = max((gradient.error for gradient in gradients), default=0.0)
    findings = [*_findings(outcome, False), *(_gradient_finding(g, subject) for g in gradients if g.wrong)]
    return CheckResult(
        "generic",
        findings=tuple(findings),
        covered={
            "ranks": weights.ranks,
            "layers": len(record.visited),
            "seams": len(record.seams),
            "positions": record.positions,
            **({"gradients": len(gradients)} if gradients else {}),
        },
        notes=(
            "weights random by name and place: no zero bias, no norm of ones, no equal heads",
            *([f"{len(subject.skipped)} blocks of a make that was run are skipped"] if subject.skipped else []),
            *_idle_experts(outcome),
        ),
        figures={"worst_relative_error": max(worst, record.worst), "tolerance": TOLERANCE},
    )


def _counted(gradients: Sequence[Gradient], outcome: Outcome, subject: Subject) -> list[Gradient]:
    """Those that decide: where cells changed places together, gradients of cut layers' parameters did so with them."""
    cut = {layer.path for layer in subject.layers if layer.cut is not None} if outcome.record.moved else set()
    return [gradient for gradient in gradients if layer_of(gradient.parameter) not in cut]


def _of(recipes: object, names: set[str]) -> set[str]:
    return {recipe.names[0] for name, recipe in recipes.items() if name in names}  # type: ignore[attr-defined]


def _gradient_finding(gradient: Gradient, subject: Subject) -> Finding:
    error = gradient.error
    if not gradient.parameter:
        what = "the gradient of its input, added up over the ranks, is not the unsharded model's"
        return Finding(what, layer=gradient.section, error=error, tolerance=TOLERANCE)
    recipe = subject.model.recipes.get(gradient.parameter)
    tensor = recipe.names[0] if recipe else gradient.parameter
    what = "the ranks' gradients do not add up to the unsharded model's"
    return Finding(what, tensor=tensor, error=error, tolerance=TOLERANCE)


def _broken(outcome: Outcome) -> Finding:
    assert outcome.failure is not None
    at = outcome.failure.key or "its beginning"
    what = f"the rank's model broke down after {at}: {one_line(outcome.failure.cause)}"
    return Finding(what, layer=at, rank=max(0, outcome.failure.run - 1))


def _findings(outcome: Outcome, isolate: bool) -> Iterator[Finding]:
    """The first seam that differs, in the order of execution (with ``isolate`` one of each layer); and a rank whose
    model broke down."""
    seen: set[str] = set()
    for seam in outcome.record.counted:
        if seam.wrong and seam.layer not in seen and (isolate or not seen):
            seen.add(seam.layer)
            yield Finding(_sentence(seam), layer=seam.layer, rank=seam.rank, error=seam.error, tolerance=TOLERANCE)
    if outcome.failure is not None:
        yield _broken(outcome)


def _notes(subject: Subject, record: Record, idle: Sequence[str]) -> Iterator[str]:
    yield f"largest relative error {record.worst:.1e}, tolerance {TOLERANCE:.0e}, float64"
    if record.gathers:
        yield f"{record.gathers} gathers hide the layouts of their own layers from this check"
    for what, names in (("not used by the model", subject.model.unused), ("not reached, whole on every rank", idle)):
        if names:
            yield f"{what}: {_some(names)}"
    if record.moved:
        yield (
            f"other numbers than the reference's at the same places in {_some(record.moved)}, but all that is whole is "
            "the same: the bytes differ, the function is equal"
        )


def _idle_experts(outcome: Outcome) -> Iterator[str]:
    """Matrices of a stack that no token was sent to."""
    for name, reached in outcome.reached.items():
        idle = [number for number in range(reached.count) if number not in reached.numbers]
        if idle:
            which = f"{', '.join(map(str, idle[:3]))}{', ...' if len(idle) > 3 else ''}"
            yield f"{name}: {len(idle)} of {reached.count} experts were not reached ({which})"


def _unlike_the_reached(subject: Subject, weights: Weights, outcome: Outcome) -> str | None:
    """What no token reached is proven by a sibling that one did, if it is cut alike; else it is not proven."""
    for name, reached in outcome.reached.items():
        of_expert = by_expert(subject.model.recipes[name].names, reached.count)
        ways = {e: tuple(shares(weights.layout(tensor)) for tensor in names) for e, names in of_expert.items()}
        proven = {way for e, way in ways.items() if e in reached.numbers}
        unproven = [e for e, way in ways.items() if way not in proven]
        if unproven:
            tensor = printable(of_expert[unproven[0]][0])
            return (
                f"no token reached {tensor} ({len(unproven)} experts of {name}), and it is cut otherwise than those met"
            )
    return None


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''}"


def _sentence(seam: Seam) -> str:
    if seam.what == "input":
        cut = f" (cut by {', '.join(seam.producers)})" if seam.producers else ""
        return f"its input is not whole{cut}, but the layer wants all of it"
    if seam.layer == "the model's output":
        cut = f": cut by {', '.join(seam.producers)} and not gathered" if seam.producers else ""
        return f"{seam.what} is not the unsharded model's{cut}"
    return f"its {seam.what} is not the unsharded model's"
