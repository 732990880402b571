"""``tpshard demo``."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import click

from tpshard.cli import options, render
from tpshard.cli.report_text import report_text
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.demo import make_checkpoint
from tpshard.errors import UsageError
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify as run_checks


@click.command()
@click.option("--tp", type=options.Count(), default=4, show_default=True, metavar="N", help="Number of ranks.")
@click.option("--keep", type=options.FOLDER, metavar="DIR", help="Work in this new folder, and leave it there.")
@options.as_json
def demo(tp: int, keep: Path | None, as_json: bool) -> int:
    """Make a small Llama (BF16, grouped heads), split it, run it sharded, merge it, and compare every byte.

    \b
    tpshard demo
    tpshard demo --tp 3 --keep demo
    """
    if keep is not None and keep.exists():
        raise UsageError(f"{keep}: exists", hint="give a new folder")
    with tempfile.TemporaryDirectory(prefix="tpshard-demo-") as scratch:
        return _main_job(keep or Path(scratch) / "demo", tp, as_json)


def _main_job(folder: Path, tp: int, as_json: bool) -> int:
    say = (lambda text: None) if as_json else click.echo
    model, shards, again = folder / "model", folder / f"tp{tp}", folder / "merged"
    total = make_checkpoint(model)
    say(f"made a Llama of {render.size(total)} in {model}\n\n$ tpshard split {model} {shards} --tp {tp}")
    conversion = plan_split(model, shards, tp)
    say(render.done_text("split", conversion, run(conversion)))
    say(f"\n$ tpshard verify {shards} --against {model}")
    report = run_checks(Request(shards, against=model))
    say(report_text(shards, report))
    say(f"\n$ tpshard merge {shards} {again}")
    conversion = plan_merge(shards, again)
    say(render.done_text("merge", conversion, run(conversion)))
    say("\n$ sha256sum model/*.safetensors merged/*.safetensors")
    digests = {file: [_sha256(where / file) for where in (model, again)] for file in _weights(model)}
    for file, (before, after) in digests.items():
        say(f"{before}  model/{file}\n{after}  merged/{file}")
    same = all(before == after for before, after in digests.values())
    say(f"\nthe merged checkpoint is {'the original, byte for byte' if same else 'NOT the original'}")
    if as_json:
        render.emit({"command": "demo", "ranks": tp, "identical": same, "digests": digests, **report.as_json()})
    return report.verdict.exit_code if same else Verdict.FAIL.exit_code


def _weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
