"""The command line: what it prints, its exit codes, and one line for whatever goes wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.build import POLICY, Tensor, config, save, tensor, tree
from tests.sessions import normal
from tpshard import __version__
from tpshard.cli import main as cli
from tpshard.cli.main import _run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(capsys: Capture, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = _run(list(words))
    return code, *capsys.readouterr()


def refused(capsys: Capture, code: int, *words: str) -> str:
    """The one line of a command that fails, without its beginning; nothing on stdout."""
    got, out, err = call(capsys, *words)
    assert (got, out) == (code, ""), err
    assert err.startswith("tpshard: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("tpshard: error: ").rstrip("\n")


SPLIT = ("split", "source", "shards", "--tp", "3", "--policy", "tiny.yaml")

# ---------------------------------------------------------------------------------------------- what is printed


def test_split_merge_reshard(source: Path, policy: str, capsys: Capture) -> None:
    code, out, err = call(capsys, *SPLIT)
    assert (code, err) == (0, "")
    assert normal(out) == normal(
        "split source -> shards\n"
        "  51 tensors, 537.9 kB read; 3 ranks, 3 files, 564.4 kB written, policy tiny\n"
        "  0.01 s (84.9 MB/s), then 0.00 s until the disk had it\n"
    ).replace("537.9 kB", f"{(source / 'model.safetensors').stat().st_size / 1000:.1f} kB")
    code, out, err = call(capsys, "reshard", "shards", "six", "--tp", "6")
    assert (code, err) == (0, "")
    assert out.startswith("reshard shards -> six\n  51 tensors, 564.4 kB read; 6 ranks, 6 files, ")
    code, out, err = call(capsys, "merge", "six", "merged")
    assert (code, err) == (0, "")
    assert out.startswith("merge six -> merged\n  51 tensors, ")
    assert "read; full checkpoint, 1 file, " in out
    assert tree(Path("merged")) == tree(source)


def test_dry_run_shows_the_plan_and_writes_nothing(source: Path, policy: str, tmp_path: Path, capsys: Capture) -> None:
    before = tree(tmp_path)
    code, out, err = call(capsys, *SPLIT, "--dry-run")
    assert (code, err) == (0, "")
    assert out == (
        "rule            pattern                                          tensors      size  per rank  padding\n"
        "row             embed_tokens                                           1  176.5 kB   59.0 kB        -\n"
        "column          self_attn.q_proj                                       6   32.4 kB   10.8 kB        -\n"
        "column          self_attn.{k_proj,v_proj}                             12   32.4 kB   10.8 kB        -\n"
        "row             self_attn.o_proj                                       6   32.2 kB   11.1 kB        -\n"
        "column          mlp.{gate_proj,up_proj}                               12   56.2 kB   19.4 kB        -\n"
        "row             mlp.down_proj                                          6   28.0 kB   10.0 kB        -\n"
        "replicate       {input_layernorm,post_attention_layernorm,norm}        7    1.2 kB    1.2 kB        -\n"
        "column, gather  lm_head                                                1  176.5 kB   59.1 kB    880 B\n"
        "\n"
        "policy tiny, 3 ranks, 51 tensors, 3 files\n"
        "per rank    179.7 kB to 181.5 kB (imbalance 0.7%)\n"
        "replicated  4.6 kB beyond one copy\n"
        "padding     880 B\n"
        "disk        540.9 kB needed; nothing was written\n"
    )
    code, out, err = call(capsys, *SPLIT, "--dry-run", "--json")
    plan = json.loads(out)["plan"]
    # By hand: 3 x 336 words of 44 numbers, 1003 of which are there.
    assert plan["padding_bytes"] == (3 * 336 - 1003) * 44 * 4
    # Norms (7 x 44) and the row layers' biases (6 x 44) are there three times.
    assert plan["replicated_bytes"] == 2 * (7 + 6) * 44 * 4
    assert tree(tmp_path) == before


def test_inspect_shards(source: Path, policy: str, capsys: Capture) -> None:
    call(capsys, "split", "source", "shards", "--tp", "6", "--policy", "tiny.yaml")
    code, out, err = call(capsys, "inspect", "shards", "--filter", "layers.1.{mlp.down_proj,self_attn.k_proj}")
    assert (code, err) == (0, "")
    assert out == (
        "tensor                                  dtype  shape    size  held\n"
        "model.layers.1.mlp.down_proj.bias       F32    44      176 B  whole on each of 6 ranks\n"
        "model.layers.1.mlp.down_proj.weight     F32    44x52  9.2 kB  row, axis 1: 0-8 | 9-17 | 18-26 | ... 44-51\n"
        "model.layers.1.self_attn.k_proj.bias    F32    30      120 B  column, axis 0: 0-9 | 0-9 | 10-19 | ... 20-29\n"
        "model.layers.1.self_attn.k_proj.weight  F32    30x44  5.3 kB  column, axis 0: 0-9 | 0-9 | 10-19 | ... 20-29\n"
        "\n"
        "4 tensors, 14.7 kB; 6 ranks, policy tiny\n"
    )


def test_inspect_as_json(source: Path, policy: str, capsys: Capture) -> None:
    call(capsys, *SPLIT)
    _, out, _ = call(capsys, "inspect", "shards", "--filter", "lm_head", "--json")
    (found,) = json.loads(out)["tensors"]
    assert (found["dtype"], found["shape"], found["bytes"], found["rule"]) == (
        "F32",
        [1003, 44],
        1003 * 44 * 4,
        "column",
    )
    assert [shard["spans"]["0"] for shard in found["shards"]] == [[[0, 336]], [[336, 672]], [[672, 1003]]]
    assert [shard["shape"] for shard in found["shards"]] == [[336, 44]] * 3
    assert found["files"] == [f"rank-{rank:05d}-of-00003.safetensors" for rank in range(3)]


def test_verify_tells_what_is_not_proven(source: Path, policy: str, capsys: Capture) -> None:
    call(capsys, *SPLIT)
    code, out, err = call(capsys, "verify", "shards", "--against", "source")
    assert (code, err) == (4, "")
    assert out.splitlines()[-1] == "INCONCLUSIVE  shards"
    assert "layout   INCONCLUSIVE nothing is known apart from the policy about a model of model_type 'tiny'" in out
    assert "forward  INCONCLUSIVE config.json names no architecture (name the model with --model)" in out
    code, out, err = call(capsys, "verify", "shards", "--against", "source", "--level", "weights", "-q")
    assert (code, out, err) == (0, "", "")


def test_demo_does_the_whole_job(capsys: Capture) -> None:
    code, out, err = call(capsys, "demo", "--tp", "6", "--keep", "kept")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "the merged checkpoint is the original, byte for byte"
    assert "\nPASS  kept/tp6\n" in out
    assert re.search(r"^forward +PASS", out, re.MULTILINE)
    code, out, err = call(capsys, "demo", "--json")
    assert json.loads(out)["identical"] is True
    assert "exists" in refused(capsys, 2, "demo", "--keep", "kept")


def test_quiet_and_json(source: Path, policy: str, capsys: Capture) -> None:
    assert call(capsys, *SPLIT, "-q") == (0, "", "")
    code, out, err = call(capsys, "merge", "shards", "merged", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["command"], found["ranks"], found["policy"]) == ("merge", 1, None)
    (file,) = found["written"]["files"]
    assert file["size"] == Path("merged/model.safetensors").stat().st_size


def test_warnings_go_to_stderr_and_are_errors_with_strict(source: Path, policy: str, capsys: Capture) -> None:
    Path(policy).write_text(POLICY + "  nothing.like_this: row\n")
    line = "tiny.yaml:15:3: rule 'nothing.like_this' matches no tensor"
    assert f"{line} (--strict makes warnings errors)" == refused(capsys, 2, *SPLIT, "--strict")
    assert not Path("shards").exists()
    code, _, err = call(capsys, *SPLIT)
    assert (code, err) == (0, f"tpshard: warning: {line}\n")


def test_version_and_help(capsys: Capture) -> None:
    assert call(capsys, "--version") == (0, f"tpshard {__version__}\n", "")
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    for command in cli.COMMANDS:
        assert f"\n  {command} " in out
        assert call(capsys, command, "--help")[0] == 0


# ---------------------------------------------------------------------------------------------- progress


class Terminal:
    """A stderr that is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("words", "ci", "shown"), [((), "", True), (("-q",), "", False), ((), "1", False), (("--json",), "", False)]
)
def test_a_bar_on_a_terminal_only(
    words: tuple[str, ...], ci: str, shown: bool, source: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("CI", ci)
    assert _run([*SPLIT, *words]) == 0
    assert ("split" in terminal.text and "B/s" in terminal.text) == shown


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_errors_are_json_too(source: Path, policy: str, capsys: Capture) -> None:
    code, out, err = call(capsys, "split", "source", "shards", "--tp", "4", "--policy", "tiny.yaml", "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"], error["kind"]) == (2, 2, "policy")
    assert err == f"tpshard: error: {error['message']} ({error['hint']})\n"
    assert error["hint"] == "--tp that works for this checkpoint: 1, 3, 6; or set uneven: true in the rule"


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def change_config(**fields: object) -> None:
    write("source/config.json", json.dumps(config(**fields)))  # type: ignore[arg-type]


def drop(name: str) -> None:
    Path(name).unlink()


def weights(content: bytes) -> Callable[[], None]:
    return lambda: write("source/model.safetensors", content)


def without(key: str) -> None:
    """The policy lacks the lines that begin with a key."""
    lines = Path("tiny.yaml").read_text().splitlines(keepends=True)
    Path("tiny.yaml").write_text("".join(line for line in lines if not line.lstrip().startswith(key)))


def in_policy(old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        text = Path("tiny.yaml").read_text()
        assert old in text
        Path("tiny.yaml").write_text(text.replace(old, new))

    return change


def pickles() -> None:
    drop("source/model.safetensors")
    write("source/pytorch_model.bin", b"\x80\x02}q\x00.")


def quantised() -> None:
    change_config(quantization_config={"quant_method": "nobody-knows"})


# The rows of the list of hostile inputs that the project keeps: number, what is done to it, exit code, what is said.
HOSTILE: list[tuple[str, Callable[[], Any], int, str]] = [
    ("1 an empty file", weights(b""), 3, "has 0 bytes"),
    ("2 seven bytes", weights(b"1234567"), 3, "has 7 bytes"),
    ("3 header length 0", weights(bytes(16)), 3, "does not begin with '{'"),
    ("4 header length 2^64-1", weights(b"\xff" * 16), 3, "the format allows 100000000"),
    ("6 header longer than the file", weights(b"\x40" + bytes(7) + b"{}"), 3, "promises 64 bytes"),
    ("8 header not JSON", weights(b"\x02" + bytes(7) + b"{]"), 3, "is not JSON"),
    ("25 70 dimensions", lambda: save(Path("source/model.safetensors"), {"w": tensor("U8", (1,) * 70)}), 3, "70 dimensions"),
    ("22 a name that is a path", lambda: save(Path("source/model.safetensors"), {"../x": tensor("U8", (1,))}), 3, "is a path"),
    ("22 a name with an escape", lambda: save(Path("source/model.safetensors"), {"\x1b[2J": tensor("U8", (1,))}), 3, r"'\x1b[2J' holds control"),
    ("28 no tensors", lambda: save(Path("source/model.safetensors"), {}), 3, "holds no tensors"),
    ("29 a Git LFS pointer", weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), 3, "git lfs pull"),
    ("31 pickles only", pickles, 3, "pytorch_model.bin"),
    ("32 an unfinished download", lambda: Path("source/model.safetensors").rename("source/model.safetensors.incomplete"), 3, "unfinished download"),
    ("33 a folder for a file", lambda: (drop("source/model.safetensors"), Path("source/model.safetensors").mkdir()), 3, "not a regular file"),
    ("33 a pipe for a file", lambda: (drop("source/model.safetensors"), os.mkfifo("source/model.safetensors")), 3, "not a regular file"),
    ("38 units that do not divide", in_policy("heads: K", "heads: 7"), 2, "7 heads do not divide an axis of 30"),
    ("40 an empty policy", lambda: write("tiny.yaml", ""), 2, "is empty"),
    ("40 a policy of comments", lambda: write("tiny.yaml", "# nothing\n---\n"), 2, "is empty"),
    ("41 two documents that both apply", lambda: write("tiny.yaml", f"{POLICY}---\n{POLICY.replace('tiny', 'two', 1)}"), 2, "several tiny.yaml apply"),
    ("42 a key twice", lambda: write("tiny.yaml", POLICY + "  lm_head: column\n"), 2, "appears twice"),
    ("43 010", in_policy("pad: 8", "pad: 010"), 2, "'010' is not a plain whole number"),
    ("44 an unknown key", in_policy("rule: row, dims", "rule: row, dimz"), 2, "did you mean 'dims'"),
    ("44 a version of its own", lambda: write("tiny.yaml", "version: 2\n" + POLICY), 2, "version"),
    ("45 an alias", lambda: write("tiny.yaml", "name: &a x\nrules: {a: *a}\n"), 2, "anchors and aliases"),
    ("46 a tag", lambda: write("tiny.yaml", "name: !!python/object/apply:os.system [ls]\n"), 2, "tags and directives"),
    ("47 deep nesting", lambda: write("tiny.yaml", "[" * 10_000), 2, "nested deeper"),
    ("48 a huge policy", lambda: write("tiny.yaml", "#" * 300_000), 2, "has 300000 bytes"),
    ("49 a pattern that is none", in_policy("lm_head:", '"lm_[head":'), 2, "only * ** and {a,b} are special"),
    ("50 two rules for a tensor", lambda: write("tiny.yaml", POLICY + "  \"*_head\": column\n"), 2, "2 rules match"),
    ("50 no rule for a tensor", lambda: without("mlp.down_proj"), 2, "has no rule for 6 tensors"),
    ("52 a policy that is a folder", lambda: (drop("tiny.yaml"), Path("tiny.yaml").mkdir()), 2, "is not a regular file"),
    ("52 a policy that is a pipe", lambda: (drop("tiny.yaml"), os.mkfifo("tiny.yaml")), 2, "is not a regular file"),
    ("52 no policy", lambda: drop("tiny.yaml"), 2, "is not there"),
    ("53 no config", lambda: drop("source/config.json"), 2, "there is no config.json"),
    ("53 a config that is a list", lambda: write("source/config.json", "[]"), 3, "JSON list, not an object"),
    ("53 a config of 5000 digits", lambda: write("source/config.json", '{"a": ' + "9" * 5000 + "}"), 3, "4300 digits"),
    ("53 a config 100,000 deep", lambda: write("source/config.json", '{"a":' * 100_000), 3, "nested too deeply"),
    ("54 heads 0", lambda: change_config(num_attention_heads=0), 2, "is 0, must be at least 1"),
    ("54 heads negative", lambda: change_config(num_attention_heads=-6), 2, "is -6, must be at least 1"),
    ("54 heads a fraction", lambda: change_config(num_attention_heads=6.5), 2, "6.5"),
    ("54 heads huge", lambda: change_config(num_attention_heads=10**30), 2, "heads"),
    ("57 an empty index", lambda: write("source/model.safetensors.index.json", '{"weight_map": {}}'), 3, "weight_map is missing or empty"),
    ("59 an absent file", lambda: write("source/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'), 3, "model.safetensors"),
    ("57 an index that leads away", lambda: write("source/model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}'), 3, "is not a file name"),
    ("64 a dangling link", lambda: (drop("source/model.safetensors"), os.symlink("../blobs/x", "source/model.safetensors")), 3, "is a link to a file that is not there"),
    ("64 a circle of links", lambda: (drop("source/model.safetensors"), os.symlink("model.safetensors", "source/model.safetensors")), 5, "model.safetensors: "),
    ("66 a target in use", lambda: write("shards/other", "x"), 2, "exists and is not empty"),
    ("66 a target that is a file", lambda: write("shards", "x"), 2, "exists and is not a folder"),
    ("66 a target that is a link", lambda: os.symlink("elsewhere", "shards"), 2, "is a symbolic link"),
    ("79 a quantised checkpoint", quantised, 3, "is quantised (nobody-knows)"),
    ("79 packed weights", lambda: save(Path("source/model.safetensors"), {"a.qweight": tensor("I32", (4,))}), 3, "a.qweight belongs to a quantised"),
    ("80 an adapter", lambda: Path("source/model.safetensors").rename("source/adapter_model.safetensors"), 3, "holds an adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "said"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_inputs(
    change: Callable[[], Any], code: int, said: str, source: Path, policy: str, tmp_path: Path, capsys: Capture
) -> None:
    """One line, the right exit code, and everything as it was."""
    change()
    before = tree(tmp_path)
    assert said in refused(capsys, code, *SPLIT)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("tp", ["010", "2.0", '"2"', "true", "0", "-1", "1e1", "٣", "", "1 000"])
def test_rank_counts_that_are_none(tp: str, source: Path, policy: str, capsys: Capture) -> None:
    said = refused(capsys, 2, "split", "source", "shards", f"--tp={tp}", "--policy", "tiny.yaml")
    assert "is not a whole number from 1, in plain decimal" in said


def test_a_billion_ranks(source: Path, policy: str, capsys: Capture) -> None:
    assert "--tp must be from 1 to 4096" in refused(capsys, 2, *SPLIT[:3], "--tp", "1000000000", *SPLIT[5:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("splt",), "there is no command 'splt' (did you mean 'split'?)"),
        (("nothing",), "there is no command 'nothing' (commands: split, merge,"),
        (("split", "source"), "Missing argument 'DST'. (see: tpshard split --help)"),
        (("split", "source", "shards"), "Missing option '--tp'. (see: tpshard split --help)"),
        (("split", "source", "shards", "--tp", "3", "--what"), "No such option"),
        ((*SPLIT, "--max-shard-size", "5XB"), "'5XB' is not a size such as 5GB, 500MB or 4GiB"),
        ((*SPLIT, "--max-shard-size", "0"), "must be at least one byte"),
        ((*SPLIT, "--digest", "md5"), "'md5' is not one of"),
        ((*SPLIT, "--workers", "0"), "is not a whole number from 1"),
        (("split", "source", "source/inside", *SPLIT[3:]), "lies inside the source"),
        (("split", "source", "absent/shards", *SPLIT[3:]), "absent: is not a folder (make it first)"),
        (("split", "source", "shards", "--tp", "3", "--policy", "lama"), "no built-in policy is called 'lama' (did you mean 'llama'?)"),
        (("split", "source", "shards", "--tp", "3"), "none of the built-in policies applies to model_type 'tiny'"),
        (("inspect", "source", "--filter", "{"), "--filter '{' has a '{' without its '}'"),
        (("inspect", "source", "--filter", "absent"), "no tensor of source is like 'absent'"),
        (("verify", "source", "--level", "all"), "'all' is not one of"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly(words: tuple[str, ...], said: str, source: Path, policy: str, capsys: Capture) -> None:
    assert said in refused(capsys, 2, *words)
    assert not Path("shards").exists()


@pytest.mark.parametrize("command", ["merge", "reshard", "verify"])
def test_a_folder_that_is_no_shard_folder(command: str, source: Path, capsys: Capture) -> None:
    words = {"merge": ("merge", "source", "x"), "reshard": ("reshard", "source", "x", "--tp", "2")}
    said = refused(capsys, 3, *words.get(command, (command, "source")))
    assert "tpshard.json" in said
    assert "split" in said


def test_a_folder_that_is_not_there(capsys: Capture) -> None:
    for words in (("split", "a", "b", "--tp", "2"), ("inspect", "a"), ("merge", "a", "b"), ("verify", "a")):
        assert "a" in refused(capsys, 3, *words)


def test_names_from_files_cannot_write_to_the_terminal(source: Path, policy: str, capsys: Capture) -> None:
    change_config(model_type="\x1b[2J\u202e")
    said = refused(capsys, 2, "split", "source", "shards", "--tp", "3")
    assert r"\x1b[2J\u202e" in said


def test_nan_weights_are_copied_and_not_proven(capsys: Capture, tmp_path: Path) -> None:
    nan = Tensor("F32", (2, 3), b"\x00\x00\xc0\x7f" * 6)
    Path("source").mkdir()
    save(Path("source/model.safetensors"), {"w.weight": nan})
    write("p.yaml", "name: p\nrules: {w: column}\n")
    assert call(capsys, "split", "source", "shards", "--tp", "2", "--policy", "p.yaml")[0] == 0
    assert call(capsys, "verify", "shards", "--against", "source")[0] == 4


# ---------------------------------------------------------------------------------------------- the error boundary


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "\ntpshard: interrupted; nothing was left behind\n"),
        (MemoryError(), 5, "tpshard: error: not enough memory (run with fewer --workers)\n"),
        (
            RuntimeError("can't start new thread"), 5,
            "tpshard: error: not enough memory (run with fewer --workers)\n",
        ),
        (OSError(28, "No space left on device", "x"), 5, "tpshard: error: x: No space left on device\n"),
        (
            ZeroDivisionError("by zero"), 70,
            "tpshard: error: internal error: ZeroDivisionError: by zero (please report it; TPSHARD_TRACEBACK=1 shows more)\n",
        ),
    ],
)  # fmt: skip
def test_no_traceback_whatever_happens(
    error: BaseException,
    code: int,
    line: str,
    source: Path,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    split = importlib.import_module("tpshard.cli.split")
    monkeypatch.setattr(split, "plan_split", raising(error))
    assert call(capsys, *SPLIT) == (code, "", line)


def test_a_reader_that_goes_away(source: Path) -> None:
    """``tpshard inspect … | head -1`` ends without a word."""
    command = f"{sys.executable} -m tpshard inspect source | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tensor ")


def test_paths_that_are_not_utf8(source: Path, policy: str) -> None:
    command = [sys.executable, "-m", "tpshard", "split", "source", b"shards-\xff", *SPLIT[3:], "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    path = os.fsdecode(b"shards-\xff")
    same = json.loads(done.stdout)["target"] == path
    assert same, "not compared here: no report could print it"
    assert os.path.isdir(path)
