"""The group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import difflib
import gc
import importlib
import json
import os
import signal
import sys
from typing import NoReturn

import click

from tpshard import __version__
from tpshard.errors import TpshardError, UsageError, printable
from tpshard.launch import launched

COMMANDS = {
    "split": "Cut a full checkpoint for tensor parallelism.",
    "merge": "Rebuild the full checkpoint from shards.",
    "reshard": "Recut shards for another number of ranks.",
    "fetch": "Cut one rank alone, straight from a full checkpoint.",
    "join": "Make one folder of ranks that were fetched one by one.",
    "verify": "Prove that shards are right, or find out where they are wrong.",
    "inspect": "Show the tensors of a checkpoint or shard folder.",
    "statement": "Print an in-toto Statement of a shard folder, for signing.",
    "engines": "List the engines whose folders are read and written.",
    "policy": "List, show, check and draft policies.",
    "demo": "See the main job done on a small model made on the spot.",
}
INTERRUPTED = 130
INTERNAL = 70


class LazyGroup(click.Group):
    """Commands are imported when they are run, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"tpshard.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"commands: {', '.join(COMMANDS)}"
            raise UsageError(f"there is no command '{printable(args[0], 40)}'", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tpshard", message="%(prog)s %(version)s")
def tpshard() -> None:
    """Cut safetensors checkpoints for tensor parallelism, rebuild them, recut them, and prove the result.

    \b
    tpshard split   llama-8b llama-8b-tp4 --tp 4
    tpshard verify  llama-8b-tp4 --against llama-8b
    tpshard merge   llama-8b-tp4 llama-8b-again
    tpshard reshard llama-8b-tp4 llama-8b-tp2 --tp 2

    Exit codes: 0 done or verified, 1 shards wrong, 2 usage or policy, 3 bad input, 4 inconclusive, 5 disk, memory
    or permissions.
    """


def main() -> NoReturn:
    """Run the command line and exit."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _terminated)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads: 30 ms to start, and nothing for them
    gc.set_threshold(100_000)  # plans are millions of small objects without cycles: a third of their time went into it
    code = _run(sys.argv[1:])
    if "torch.distributed" in sys.modules and is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # all is said; torch's threads of a group may abort the process when it ends in the ordinary way
    sys.exit(code)


def is_one_of_several() -> bool:
    try:
        return launched() is not None
    except UsageError:
        return False


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    try:
        outcome = tpshard.main(args=arguments, prog_name="tpshard", standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except TpshardError as error:
        return _fail(error, arguments)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"see: {context.command_path} --help" if context else None
        return _fail(UsageError(error.format_message().replace("\n", " "), hint=hint), arguments)
    except (KeyboardInterrupt, click.Abort) as error:
        said = error.__cause__ if isinstance(error, click.Abort) else error
        click.echo(f"tpshard: interrupted; {str(said or '') or 'nothing was left behind'}", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        return _report("storage", f"{where}{error.strerror or error}", None, 5, arguments)
    except Exception as error:
        if isinstance(error, MemoryError) or str(error) == "can't start new thread":
            return _report("storage", "not enough memory", "run with fewer --workers", 5, arguments)
        if os.environ.get("TPSHARD_TRACEBACK"):
            raise
        what = f"internal error: {type(error).__name__}: {error}"
        return _report("internal", what, "please report it; TPSHARD_TRACEBACK=1 shows more", INTERNAL, arguments)


def _fail(error: TpshardError, arguments: list[str]) -> int:
    return _report(error.kind, error.message, error.hint, error.exit_code, arguments)


def _report(kind: str, message: str, hint: str | None, code: int, arguments: list[str]) -> int:
    """One line on stderr; with --json an object on stdout as well."""
    line = f"{message} ({hint})" if hint else message
    click.echo(f"tpshard: error: {printable(line, 4000)}", err=True)
    if "--json" in arguments:
        command = next((word for word in arguments if word in COMMANDS), None)
        error = {"kind": kind, "message": message, "hint": hint, "exit_code": code}
        click.echo(json.dumps({"command": command, "error": error}))
    return code
