"""Faults, planted into what split writes: ``python -m tests.faults`` prints which check caught each of them.

Ids are those of the literature list that the project keeps: W wrong but invertible layouts, R wrong bytes, M wrong
manifest or folder, E equivalent (must not alarm in the forward).
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tampering import Folder
from tests.tiny_models import save_model
from tpshard.convert import plan_split, run
from tpshard.layout import Layout, Shard, Span
from tpshard.plan import Item
from tpshard.roles import Role
from tpshard.verify.report import Report, Verdict
from tpshard.verify.request import Level, Request
from tpshard.verify.run import verify

KEY_VALUE_HEADS = 2  # of six heads: dealt at tp 2, replicated at 4 and 6


@dataclasses.dataclass(frozen=True)
class Fault:
    """``plant`` makes the wrong shard folder; ``named`` must stand in a finding of one of the checks ``caught_by``.

    ``against``: whether the source is at hand for verify. ``level``: the deepest check to run (None: all).
    """

    id: str
    what: str
    model: str
    tp: int
    plant: Callable[[Path, Path, int], None]
    caught_by: frozenset[str]
    named: str
    against: bool = True
    level: Level | None = None


def policy_fault(rules: str, base: str) -> Callable[[Path, Path, int], None]:
    """Split by a policy that is wrong in ``rules`` and otherwise the built-in one."""

    def plant(source: Path, target: Path, tp: int) -> None:
        policy = target.parent / "wrong.yaml"
        policy.write_text(f"name: wrong\nextends: {base}\nrules:\n" + "".join(f"  {r}\n" for r in rules.split("\n")))
        run(plan_split(source, target, tp, str(policy)))

    return plant


def layout_fault(
    part_of_name: str, change: Callable[[Layout], Layout], role: Role | None = None
) -> Callable[[Path, Path, int], None]:
    """Split with the layout (and role) of all tensors whose name holds ``part_of_name`` changed, and recorded so."""

    def plant(source: Path, target: Path, tp: int) -> None:
        conversion = plan_split(source, target, tp)
        hit = [item.stored.name for item in conversion.plan.items if part_of_name in item.stored.name]
        assert hit, part_of_name
        items = tuple(
            Item(item.stored, change(item.want)) if item.stored.name in hit else item for item in conversion.plan.items
        )
        roles = {name: role if role and name in hit else old for name, old in conversion.roles.items()}
        plan = dataclasses.replace(conversion.plan, items=items)
        run(dataclasses.replace(conversion, plan=plan, roles=roles))

    return plant


def folder_fault(change: Callable[[Folder], None], reseal: bool) -> Callable[[Path, Path, int], None]:
    """Split rightly, then change the folder; ``reseal``: and make manifest and digests agree with what was done."""

    def plant(source: Path, target: Path, tp: int) -> None:
        run(plan_split(source, target, tp))
        folder = Folder(target)
        change(folder)
        if reseal:
            folder.reseal()

    return plant


def reverse(layout: Layout) -> Layout:
    return Layout(layout.shape, layout.shards[::-1])


def same(layout: Layout) -> Layout:
    return layout


def like_a_column(layout: Layout) -> Layout:
    """Cut a one-dimensional tensor evenly."""
    size, ranks = layout.shape[0], layout.ranks
    edges = [size * rank // ranks for rank in range(ranks + 1)]
    runs = [(Span(a, b),) for a, b in itertools.pairwise(edges)]
    return Layout.along(layout.shape, 0, runs, [b - a for a, b in itertools.pairwise(edges)])


def last_rank_takes_more(layout: Layout) -> Layout:
    """Cut the first axis so that the last rank has the remainder."""
    size, ranks = layout.shape[0], layout.ranks
    edges = [size // ranks * rank for rank in range(ranks)] + [size]
    runs = [(Span(a, b),) for a, b in itertools.pairwise(edges)]
    return Layout.along(layout.shape, 0, runs, [b - a for a, b in itertools.pairwise(edges)])


def modulo_heads(layout: Layout) -> Layout:
    """Six ranks, two heads: rank r gets head r % 2 instead of r // 3."""
    whole: list[Shard | None] = [layout.shards[3 * (rank % 2)] for rank in range(6)]
    return Layout(layout.shape, tuple(whole))


def overlapping_row(layout: Layout) -> Layout:
    """Rank 0 of two also holds the first row of rank 1."""
    size = layout.shape[0]
    half = (size + 1) // 2
    return Layout.along(layout.shape, 0, [(Span(0, half + 1),), (Span(half, size),)], [half + 1, size - half])


MODEL = frozenset({"layout", "forward"})
LAYOUT = frozenset({"layout"})  # the forward computes the same, rightly
FORWARD = frozenset({"forward"})  # rows and columns are in place; what is done with them is not

WRONG_POLICIES = [
    ("W01", "qkv cut into equal blocks", "gpt2", 2, "attn.c_attn: {rule: column, dims: io}", MODEL, "h.0.attn.c_attn"),
    ("W01", "qkv cut into equal blocks", "phi3", 2, "qkv_proj: column", MODEL, "layers.0.self_attn.qkv_proj"),
    ("W02", "qkv cut per head", "gpt2", 3, "attn.c_attn: {rule: column, dims: io, heads: H}", MODEL, "h.0.attn.c_attn"),
    ("W03", "qkv cut by groups", "phi3", 2, "qkv_proj: {rule: column, heads: K}", MODEL, "layers.0.self_attn.qkv_proj"),
    ("W07", "gate_up cut into equal blocks", "phi3", 2, "gate_up_proj: column", MODEL, "layers.0.mlp.gate_up_proj"),
    ("W09", "gate_up cut as interleaved", "phi3", 2, "gate_up_proj: {rule: column, unit: 2}", MODEL, "mlp.gate_up_proj"),
    ("W12", "key-value cut inside a head", "qwen2", 6, '"{k_proj,v_proj}": column', MODEL, "self_attn.k_proj"),
    ("W13", "head size guessed", "qwen2", 4, "q_proj: {rule: column, unit: 5}\no_proj: {rule: row, unit: 5}", MODEL, "q_proj"),
    ("W21", "qkv bias cut apart from its weight", "gpt2", 2, "attn.c_attn.bias: column", MODEL, "h.0.attn.c_attn"),
    ("W22", "o_proj cut as a column", "qwen2", 2, "o_proj: {rule: column, unit: 2}", MODEL, "layers.0.self_attn.o_proj"),
    ("W22", "attention output a column", "bert", 3, "attention.output.dense: column", MODEL, "layer.0.attention.output.dense"),
    ("W23", "q_proj cut as a row", "qwen2", 2, "q_proj: {rule: row, unit: 2}", LAYOUT, "layers.0.self_attn.q_proj"),
    ("W23", "query cut as a row", "bert", 2, "attention.self.query: row", LAYOUT, "layer.0.attention.self.query"),
    ("W24", "Conv1D taken for a Linear", "gpt2", 2, "mlp.c_fc: column", MODEL, "h.0.mlp.c_fc"),
    ("W24", "Conv1D taken for a Linear", "gpt2", 2, "mlp.c_proj: row", MODEL, "h.0.mlp.c_proj"),
    ("W25", "down_proj whole, its input cut", "qwen2", 2, "down_proj: replicate", MODEL, "layers.0.mlp.down_proj"),
    ("W25", "output whole, its input cut", "bert", 3, "layer.*.output.dense: replicate", MODEL, "layer.0.output.dense"),
    ("W25", "attention output whole", "gpt2", 2, "attn.c_proj: replicate", MODEL, "h.0.attn.c_proj"),
    ("W27", "down_proj a column without gather", "qwen2", 2, "down_proj: column", MODEL, "layers.0.mlp.down_proj"),
    ("W28", "norm cut", "qwen2", 2, "input_layernorm: column", MODEL, "layers.0.input_layernorm"),
    ("W28", "norm cut", "bert", 2, "attention.output.LayerNorm: column", MODEL, "layer.0.attention.output.LayerNorm"),
    ("W28", "norm cut", "gpt2", 2, "ln_f: column", MODEL, "ln_f"),
    ("W29", "norm over all heads, q and k not gathered", "olmo2", 2, "self_attn.q_proj: {rule: column, heads: H}\nself_attn.k_proj: {rule: column, heads: K}", FORWARD, "layers.0.self_attn"),
    ("W31", "per-head norm cut inside the head", "qwen3", 2, "q_norm: column", MODEL, "layers.0.self_attn.q_norm"),
    ("W44", "embedding cut on hidden, not gathered", "qwen2", 2, "embed_tokens: {rule: column, dims: io}", MODEL, "embed"),
    ("W44", "embedding cut on hidden, not gathered", "bert", 2, "word_embeddings: {rule: column, dims: io}", MODEL, "word"),
    ("W46", "head not gathered", "qwen2", 2, "lm_head: column", FORWARD, "lm_head"),
]  # fmt: skip

BASES = {"gpt2": "gpt2", "phi3": "phi3", "olmo2": "olmo2", "qwen2": "llama", "qwen3": "llama", "bert": "bert"}


def wrong_layouts() -> Iterator[Fault]:
    for id_, what, model, tp, rules, caught, named in WRONG_POLICIES:
        yield Fault(id_, what, model, tp, policy_fault(rules, BASES[model]), caught, named)
    recorded = [
        ("W15", "o_proj shards in reverse rank order", "qwen2", "0.self_attn.o_proj.weight", reverse, None, MODEL),
        ("W16", "down_proj shards in reverse rank order", "qwen2", "1.mlp.down_proj.weight", reverse, None, MODEL),
        ("W16", "output shards in reverse rank order", "bert", "layer.1.output.dense.weight", reverse, None, MODEL),
        ("W17", "everything in reverse rank order", "qwen2", "", reverse, None, LAYOUT),
        ("W20", "row bias cut as a column's", "bert", "layer.0.output.dense.bias", like_a_column, None, LAYOUT),
        ("W41", "vocabulary dealt by another rounding", "qwen2", "embed_tokens", last_rank_takes_more, None, LAYOUT),
        ("W63", "no sum after attention", "qwen2", "0.self_attn.o_proj.weight", same, Role("replicate"), FORWARD),
        ("R09", "one word on two ranks", "qwen2", "embed_tokens", overlapping_row, None, frozenset({"weights", "layout"})),
        ("R09", "one channel on two ranks", "qwen2", "0.mlp.up_proj", overlapping_row, None, LAYOUT),
    ]  # fmt: skip
    for id_, what, model, part, change, role, caught in recorded:
        yield Fault(id_, what, model, 2, layout_fault(part, change, role), caught, part.removesuffix(".weight"))
    six = layout_fault("layers.0.self_attn.v_proj", modulo_heads)
    yield Fault("W11", "key-value heads dealt modulo", "qwen2", 6, six, MODEL, "layers.0.self_attn.v_proj")


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


def wrong_bytes() -> Iterator[Fault]:
    """Each twice: as an accident (digests tell), and resealed, so that only the source or other ranks can tell."""
    changes: list[tuple[str, str, Callable[[Folder], None], str, str]] = [
        ("R01", "one mantissa bit flipped", lambda f: f.flip_bit(Q, 1, 40), Q, "weights"),
        ("R03", "NaN payload changed", lambda f: f.set_bytes(NORM, 1, 0, b"\x01\x00\xc0\x7f"), NORM, "weights"),
        ("R04", "dtype F32 became F64", lambda f: f.cast(Q, "F64"), Q, "weights"),
        ("R05", "dtype F32 became F16", lambda f: f.cast(Q, "F16"), Q, "weights"),
        ("R07", "every rank has rank 0's rows", lambda f: f.copy_rank(Q, 0, 1), Q, "weights"),
        ("R11", "two layers' tensors exchanged", lambda f: f.exchange(Q, Q.replace("1", "2")), Q, "weights"),
        ("W61", "two layers exchanged by name", lambda f: f.rename_layers(1, 2), "layers.1", "weights"),
        ("R12", "rank files exchanged", lambda f: f.exchange_files(0, 1), "rank-0000", "files"),
        ("R13", "tensor missing from all ranks", lambda f: f.drop(Q), Q, "weights"),
        ("R13", "tensor missing from one rank", lambda f: f.drop_from_rank(Q, 1), Q, "files"),
        ("R14", "tensor extra in one rank", lambda f: f.add_to_rank("extra.weight", 1), "extra.weight", "files"),
        ("R15", "shape turned round, same bytes", lambda f: f.turn_shape(Q, 0), Q, "files"),
        ("R17", "a rank's tensor is zeros", lambda f: f.fill(Q, 1, 0), Q, "weights"),
        ("R17", "a rank's tensor is random", lambda f: f.randomise(Q, 1), Q, "weights"),
        ("R18", "a replica differs", lambda f: f.flip_bit(NORM, 1, 3), NORM, "weights"),
        ("R20", "big-endian bytes", lambda f: f.swap_bytes(Q, 0), Q, "weights"),
    ]
    for id_, what, change, named, check in changes:
        accident = frozenset({"files"})
        yield Fault(
            id_, what, "qwen2", 2, folder_fault(change, reseal=False), accident, "", against=False, level="weights"
        )
        yield Fault(id_, what + ", resealed", "qwen2", 2, folder_fault(change, reseal=True), frozenset({check}), named)
    cut = folder_fault(lambda f: f.truncate(1), reseal=False)
    yield Fault("R22", "file shorter by a byte", "qwen2", 2, cut, frozenset({"files"}), "rank-00001", level="weights")
    tail = folder_fault(lambda f: f.zero_tail(1), reseal=False)
    yield Fault("R22", "the tail is zeros", "qwen2", 2, tail, frozenset({"files"}), "rank-00001", level="files")


def wrong_folders() -> Iterator[Fault]:
    files = frozenset({"files"})
    changes: list[tuple[str, str, Callable[[Folder], None], bool, str]] = [
        ("M01", "manifest edited", lambda f: f.edit(lambda m: m["tensors"][0].update(part=0, source=0, dtype="F16")), False, "tpshard.json"),
        ("M02", "a file of another rank lies there", lambda f: f.write("rank-00002-of-00004.safetensors"), False, "rank-00002-of-00004"),
        ("M03", "a rank's file is missing", lambda f: f.remove(1), False, "rank-00001"),
        ("M03", "a rank is listed twice", lambda f: f.edit(lambda m: m["files"].append(m["files"][0])), True, "tpshard.json"),
        ("M04", "a stale shard of an older run", lambda f: f.write("old/rank-00000-of-00002.safetensors"), False, "old/rank"),
        ("M05", "manifest names a file that is not there", lambda f: f.edit(lambda m: m["files"][0].update(name="x.safetensors")), True, "x.safetensors"),
        ("M16", "manifest says that it is verified", lambda f: f.edit(lambda m: m.update(verified=True)), False, "tpshard.json"),
        ("M19", "a newer version", lambda f: f.edit(lambda m: m.update(version=2)), True, "tpshard.json"),
        ("M20", "config of another model", lambda f: f.edit_config(num_attention_heads=4), False, "config.json"),
        ("M21", "manifest lists no tensors", lambda f: f.edit(lambda m: m.update(tensors=[])), True, "tpshard.json"),
        ("M22", "rank is -1", lambda f: f.edit(lambda m: m["files"][0].update(rank=-1)), True, "tpshard.json"),
        ("M23", "a path with ..", lambda f: f.edit(lambda m: m["files"][0].update(name="../x.safetensors")), True, "tpshard.json"),
        ("M24", "carried file changed", lambda f: f.write("config.json", "{}"), False, "config.json"),
    ]  # fmt: skip
    for id_, what, change, reseal, named in changes:
        yield Fault(id_, what, "qwen2", 2, folder_fault(change, reseal), files, named, level="weights")
    tied = folder_fault(lambda f: f.edit_config(tie_word_embeddings=True), reseal=True)
    yield Fault("W45", "tied flag changed, resealed", "qwen2", 2, tied, frozenset({"weights"}), "config.json")
    config = folder_fault(lambda f: f.edit_config(rope_theta=500.0), reseal=True)
    yield Fault("W38", "config field changed, resealed", "qwen2", 2, config, frozenset({"weights"}), "config.json")
    other = folder_fault(lambda f: f.edit_config(num_attention_heads=12, head_dim=5), reseal=True)
    yield Fault(
        "M20", "config of another model, resealed", "qwen2", 2, other, frozenset({"weights", "layout"}), "k_proj"
    )


CLEAN = [("qwen2", 1), ("qwen2", 2), ("qwen2", 6), ("qwen3", 2), ("phi3", 2), ("gpt2", 2), ("gpt2", 3), ("bert", 2), ("bert", 6)]  # fmt: skip


def all_faults() -> list[Fault]:
    return [*wrong_layouts(), *wrong_bytes(), *wrong_folders()]


def try_fault(fault: Fault, source: Path, scratch: Path) -> Report:
    """Plant a fault into a fresh split and verify it."""
    target = scratch / "shards"
    fault.plant(source, target, fault.tp)
    return verify(Request(target, against=source if fault.against else None, level=fault.level, workers=1))


def was_caught(fault: Fault, report: Report) -> bool:
    """Failed, by the checks that should, with the right tensor, layer or file named."""
    failing = {check.name: check.findings for check in report.checks if check.verdict is Verdict.FAIL}
    said = [str(finding) + (finding.layer or "") for name in fault.caught_by for finding in failing.get(name, ())]
    return fault.caught_by <= set(failing) and any(fault.named in text for text in said)


def split_rightly(source: Path, target: Path, tp: int) -> None:
    run(plan_split(source, target, tp))


def main() -> None:
    caught = alarms = 0
    faults = all_faults()
    with tempfile.TemporaryDirectory(prefix="tpshard-faults-") as scratch:

        def report_on(fault: Fault) -> Report:
            source = Path(scratch) / fault.model
            if not source.exists():
                save_model(fault.model, source, KEY_VALUE_HEADS)
            place = Path(scratch) / "try"
            place.mkdir()
            report = try_fault(fault, source, place)
            shutil.rmtree(place)
            return report

        for fault in faults:
            report = report_on(fault)
            failing = [check.name for check in report.checks if check.verdict is Verdict.FAIL]
            caught += was_caught(fault, report)
            mark = "caught" if was_caught(fault, report) else "MISSED"
            print(
                f"{mark}  {fault.id}  {fault.model:<6} tp={fault.tp}  {fault.what:<44} by {', '.join(failing) or '-'}"
            )
        for model, tp in CLEAN:
            report = report_on(Fault("", "clean", model, tp, split_rightly, frozenset(), ""))
            alarms += report.verdict is not Verdict.PASS
    print(f"{caught} of {len(faults)} caught, with the right tensor named")
    print(f"{alarms} false alarms on {len(CLEAN)} that are right")


if __name__ == "__main__":
    main()
