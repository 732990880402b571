"""The report of verify in all its forms: text, JSON and its schema, JUnit XML, the step summary of GitHub Actions."""

from __future__ import annotations

import copy
import html
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests import report_schema
from tests.report_schema import SCHEMA, VALIDATOR, printed
from tests.tampering import Folder
from tpshard.cli.junit import report_xml
from tpshard.cli.main import _run
from tpshard.cli.markdown import escaped, report_markdown
from tpshard.cli.report_text import MOST_FINDINGS, MOST_ROWS, report_text
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.demo import make_checkpoint
from tpshard.errors import TpshardError
from tpshard.verify.report import CheckResult, Finding, Report, Table, Verdict, error_size
from tpshard.verify.request import LEVELS

WHERE = Path("shards")
Capture = pytest.CaptureFixture[str]

# Everything that XML 1.0 forbids, one of each kind, and what Markdown, HTML and terminals take for orders.
FORBIDDEN = "".join(map(chr, [*range(9), 11, 12, *range(14, 32), 0xD800, 0xDFFF, 0xFFFE, 0xFFFF]))
HOSTILE = f"a{FORBIDDEN}\r\n\t\x1b[2J\u202e\x85]]><b a='\"'>&amp;|`*_x_*`[l](u)![i](u)~~s~~$m$ @me :+1: #1 \\| é 层"


def errors_by_layer(rows: int) -> Table:
    cells = tuple((f"layers.{n}", "row", f"{n}.0e-15") for n in range(rows))
    return Table("errors by layer", ("layer", "task", "error"), cells)


def passed(name: str = "files", **more: Any) -> CheckResult:
    return CheckResult(name, covered={"tensors": 1234, "ranks": 4}, **more)


def failed(name: str = "forward", **more: Any) -> CheckResult:
    finding = Finding(
        "its output is not the unsharded model's", layer="layers.7", rank=2, error=3.1e-2, tolerance=1e-10
    )
    return passed(name, findings=(finding,), **more)


def undecided(name: str = "layout") -> CheckResult:
    return CheckResult(name, unproven="nothing is known about it")


HOSTILE_CHECK = CheckResult(
    "forward",
    (Finding(HOSTILE, tensor=HOSTILE, rank=1), Finding(HOSTILE, file=HOSTILE), Finding(HOSTILE, layer=HOSTILE)),
    {"tensors": 1},
    notes=(HOSTILE,),
    figures={"worst": math.inf, "all": [math.nan, 1.0, {"deep": -math.inf}], "name": HOSTILE},
    tables=(Table(HOSTILE, (HOSTILE, "b"), ((HOSTILE, HOSTILE),)),),
)
REPORTS = {
    "pass": Report((passed(), passed("forward", tables=(errors_by_layer(30),)))),
    "fail": Report((passed(), undecided(), failed(tables=(errors_by_layer(30),), seconds=1234.5))),
    "excused": Report((passed(), undecided(), passed("forward"))),
    "undecided": Report((passed(), undecided("forward"), passed("layers"))),
    "nothing covered": Report((CheckResult("files", covered={"files": 0}),)),
    "not finite": Report((CheckResult("forward", (Finding("bad", error=math.inf, tolerance=1e-10),), {"ranks": 2}),)),
    "hostile": Report((HOSTILE_CHECK, CheckResult("layers", unproven=HOSTILE))),
}
each_report = pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)

# ------------------------------------------------------------------------------------------ values


def test_a_table_has_as_many_cells_in_each_row_as_columns() -> None:
    with pytest.raises(ValueError, match="row 1 of table 'sizes' has 1 cells, its head has 2"):
        Table("sizes", ("a", "b"), (("1", "2"), ("3",)))
    with pytest.raises(ValueError, match="table 'sizes' has no columns"):
        Table("sizes", (), ())


def test_an_error_has_its_tolerance() -> None:
    with pytest.raises(ValueError, match=r"error is 0\.5, tolerance is None: give both or neither"):
        Finding("wrong", error=0.5)
    assert str(failed().findings[0]) == (
        "layers.7, rank 2: its output is not the unsharded model's: 3.1e-02, 3e+08 times the tolerance"
    )
    assert error_size(1e-10, 1e-10) == "1.0e-10, tolerance 1e-10"
    assert error_size(math.nan, 1e-10) == error_size(math.inf, 1e-10) == "not finite, tolerance 1e-10"


def test_time_is_no_part_of_what_was_found() -> None:
    assert passed(seconds=1.0) == passed(seconds=2.0)
    assert passed(seconds=1.23456).as_json()["seconds"] == 1.235


def test_only_layout_is_excused_and_only_by_a_forward_that_passed() -> None:
    report = REPORTS["excused"]
    assert [report.excuses(check) for check in report.checks] == [False, True, False]
    assert not Report((undecided(), undecided("forward"))).excuses(undecided())
    assert not Report((undecided("weights"), passed("forward"))).excuses(undecided("weights"))
    assert not Report((failed("layout"), passed("forward"))).excuses(failed("layout"))


# ------------------------------------------------------------------------------------------ text


def test_text_says_what_was_covered_where_it_is_wrong_and_by_how_much() -> None:
    many = tuple(Finding("is missing", file=f"f{n}") for n in range(MOST_FINDINGS + 2))
    forward = failed(
        notes=("2 gathers hide the layouts of their own layers",), tables=(errors_by_layer(3),), seconds=1234.56
    )
    report = Report((CheckResult("files", many, {"files": 12}), passed("weights", seconds=0.99), undecided(), forward))
    assert report_text(WHERE, report).splitlines() == [
        "files    FAIL         12 files",
        *(f"  - f{n}: is missing" for n in range(MOST_FINDINGS)),
        "  - and 2 more (--json lists all)",
        "weights  PASS         1,234 tensors, 4 ranks",
        "layout   INCONCLUSIVE nothing is known about it",
        "forward  FAIL         1,234 tensors, 4 ranks (1,234.6 s)",
        "  - layers.7, rank 2: its output is not the unsharded model's: 3.1e-02, 3e+08 times the tolerance",
        "    2 gathers hide the layouts of their own layers",
        "    errors by layer",
        "    layer     task  error",
        "    layers.0  row   0.0e-15",
        "    layers.1  row   1.0e-15",
        "    layers.2  row   2.0e-15",
        "FAIL  shards",
    ]  # fmt: skip


def test_verdicts_stand_below_each_other() -> None:
    report = Report((passed(), passed("self-test")))
    assert [line.index("PASS") for line in report_text(WHERE, report).splitlines()[:2]] == [10, 10]


@pytest.mark.parametrize("name", ["pass", "fail"])
def test_a_long_table_is_cut_and_shorter_where_all_is_well(name: str) -> None:
    report = REPORTS[name]
    lines, most = report_text(WHERE, report).splitlines(), 3 if name == "pass" else MOST_ROWS
    assert sum(line.startswith("    layers.") for line in lines) == most
    assert f"    and {30 - most} more (--json lists all)" in lines


def test_a_table_without_rows_is_not_shown() -> None:
    assert "errors" not in report_text(WHERE, Report((passed(tables=(errors_by_layer(0),)),)))


@each_report
def test_text_cannot_steer_a_terminal(report: Report) -> None:
    assert all(line.isprintable() for line in report_text(WHERE, report).split("\n"))


# ------------------------------------------------------------------------------------------ JSON


def test_the_schema_is_one_and_knows_all_verdicts_and_checks() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["verdict"]["enum"] == [verdict.value for verdict in Verdict]
    assert {*LEVELS, "layers"} <= set(SCHEMA["$defs"]["check"]["properties"]["check"]["enum"])


@each_report
def test_every_report_is_valid(report: Report) -> None:
    report_schema.check(report)


def test_what_is_not_finite_is_text() -> None:
    (hostile, _) = printed(REPORTS["hostile"])["checks"]
    assert hostile["figures"]["worst"] == "inf"
    assert hostile["figures"]["all"] == ["nan", 1.0, {"deep": "-inf"}]
    (forward,) = printed(REPORTS["not finite"])["checks"]
    assert forward["findings"] == [{"what": "bad", "error": "inf", "tolerance": 1e-10}]


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every object of nested JSON with its place, but for those whose keys are data."""
    if isinstance(value, dict):
        yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if key not in ("covered", "figures"):
            yield from objects(child, (*path, key))


def test_the_schema_refuses_a_key_more_and_a_key_less() -> None:
    optional = {"tensor", "layer", "rank", "file"}
    report = printed(Report((failed(tables=(errors_by_layer(2),)),)))
    places = [path for path, _ in objects(report)]
    assert len(places) == 4  # the report, its check, that one's finding and table
    for place in places:
        changed = copy.deepcopy(report)
        (found,) = [item for path, item in objects(changed) if path == place]
        found["surprise"] = 1
        assert not VALIDATOR.is_valid(changed), place
        del found["surprise"]
        for key in [*found]:
            value = found.pop(key)
            assert VALIDATOR.is_valid(changed) == (key in optional), (place, key)
            found[key] = value
        assert VALIDATOR.is_valid(changed)


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "PASS"},  # with a finding
        {"verdict": "INCONCLUSIVE"},
        {"verdict": "fail"},
        {"check": "backwards"},
        {"reason": "why"},
        {"findings": []},
        {"covered": {"tensors": -1}},
        {"seconds": -0.1},
        {"seconds": "1"},
        {"tables": [{"title": "t", "head": [], "rows": []}]},
        {"tables": [{"title": "t", "head": ["a"], "rows": [[1]]}]},
        {"findings": [{"what": "w", "rank": -1}]},
        {"findings": [{"what": "w", "error": 1.0}]},
    ],
    ids=str,
)
def test_the_schema_refuses_what_cannot_be(change: dict[str, Any]) -> None:
    report = printed(Report((failed(),)))
    VALIDATOR.validate(report)
    report["checks"][0].update(change)
    assert not VALIDATOR.is_valid(report)


def test_the_schema_refuses_a_pass_on_nothing_and_a_verdict_that_the_checks_do_not_give() -> None:
    report = printed(REPORTS["pass"])
    report["checks"][0]["covered"] = {}
    assert not VALIDATOR.is_valid(report)
    report = printed(REPORTS["fail"])
    report["verdict"] = "PASS"
    assert not VALIDATOR.is_valid(report)
    report = printed(REPORTS["pass"])
    report["verdict"] = "FAIL"
    assert not VALIDATOR.is_valid(report)


# ------------------------------------------------------------------------------------------ JUnit


def parsed(text: str) -> ET.Element:
    """The only suite of a JUnit file, its counts compared with what is in it."""
    root = ET.fromstring(text.encode("utf-8"))
    assert root.tag == "testsuites"
    (suite,) = root
    cases = suite.findall("testcase")
    counts = {"tests": len(cases)}
    for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        counts[key] = len(suite.findall(f"testcase/{tag}"))
    for element in (root, suite):
        assert {key: int(element.attrib[key]) for key in counts} == counts
        times = [float(case.attrib["time"]) for case in cases]
        assert float(element.attrib["time"]) == pytest.approx(sum(times), abs=0.001 * len(times))  # each is rounded
    return suite


@each_report
def test_junit_is_red_where_the_exit_code_is_not_0(report: Report) -> None:
    suite = parsed(report_xml(WHERE, report))
    red = int(suite.attrib["failures"]) + int(suite.attrib["errors"]) > 0
    assert red == (report.verdict.exit_code != 0)
    assert [case.attrib["name"] for case in suite.iter("testcase")] == [check.name for check in report.checks]


def test_junit_has_findings_reasons_and_tables() -> None:
    suite = parsed(report_xml(WHERE, REPORTS["fail"]))
    assert suite.attrib["name"] == "tpshard verify shards"
    files, layout, forward = suite.iter("testcase")
    assert "1,234 tensors, 4 ranks" in (files.findtext("system-out") or "")
    (error,) = layout
    assert (error.tag, error.attrib["message"]) == ("error", "nothing is known about it")
    (failure,) = forward
    assert failure.tag == "failure"
    assert failure.attrib["message"] == str(failed().findings[0])
    assert "\n    layers.0   row   0.0e-15\n" in (failure.text or "")
    assert forward.attrib["time"] == "1234.500"


def test_junit_skips_what_is_excused() -> None:
    (skipped,) = parsed(report_xml(WHERE, REPORTS["excused"])).findall("testcase")[1]
    assert (skipped.tag, skipped.attrib["message"]) == ("skipped", "nothing is known about it")


def test_junit_counts_findings_beyond_the_first() -> None:
    check = CheckResult("files", tuple(Finding("is missing", file=f"f{n}") for n in range(1500)), {"files": 1500})
    (failure,) = parsed(report_xml(WHERE, Report((check,)))).iter("failure")
    assert failure.attrib["message"] == "f0: is missing (and 1,499 more)"
    assert "\n  - f999: is missing\n  - and 500 more" in (failure.text or "")


def test_junit_holds_no_character_that_xml_forbids() -> None:
    folder = Path(os.fsdecode(b"shards-\xff\x01"))
    text = report_xml(folder, REPORTS["hostile"])
    assert not set(FORBIDDEN) & set(text)
    failure, error = (case[0] for case in parsed(text).iter("testcase"))
    for said in (failure.attrib["message"], failure.text or "", error.attrib["message"]):
        assert r"a\x00\x01" in said
        assert r"\ud800\udfff\ufffe\uffff" in said
        assert "]]><b a='\"'>&amp;|`*_x_*`" in said


# ------------------------------------------------------------------------------------------ Markdown


@each_report
def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_head(report: Report) -> None:
    for block in report_markdown(WHERE, report).rstrip().split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.split("\n")}) == 1, block


def test_markdown_shows_hostile_names_as_they_are() -> None:
    text = escaped(HOSTILE)
    assert not set("\\`*_[]<>|~!$@\n\r\x1b\u202e") & set(text)
    assert not re.search(r"&(?!#\d+;)", text)
    assert "\\n" in html.unescape(text)
    assert html.unescape(text).endswith(HOSTILE[HOSTILE.index("]]>") :])
    whole = report_markdown(Path(HOSTILE.replace("\0", "")), REPORTS["hostile"])
    tags = set(re.findall(r"<[^>]*>", whole))
    assert tags == {"<br>", "<details>", "</details>", "<summary>", "</summary>"}


def test_markdown_has_the_verdict_checks_findings_and_tables() -> None:
    many = tuple(Finding("is missing", file=f"f{n}") for n in range(MOST_FINDINGS + 2))
    report = Report(
        (CheckResult("files", many, {"files": 12}), failed(tables=(errors_by_layer(30),), notes=("a note",)))
    )
    text = report_markdown(WHERE, report)
    assert text.startswith(
        "## tpshard verify: FAIL\n\nShards: shards\n\n| check | verdict | covered |\n| --- | --- | --- |\n"
    )
    assert "\n| forward | FAIL | 1,234 tensors, 4 ranks<br>a note |\n" in text
    assert "\n| f9&#58; is missing |\n| and 2 more |\n" in text
    assert "f10" not in text
    assert "3.1e-02, 3e+08 times the tolerance |" in text
    assert "<details><summary>forward: errors by layer</summary>" in text
    assert "\n\n| layer | task | error |\n| --- | --- | --- |\n| layers.0 | row | 0.0e-15 |\n" in text
    assert text.endswith("| layers.19 | row | 19.0e-15 |\n\nand 10 more\n\n</details>\n")


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, and its shards: ``right``, and ``wrong`` with a bit flipped."""
    folder = tmp_path_factory.mktemp("demo")
    make_checkpoint(folder / "model")
    for name in ("right", "wrong"):
        run(plan_split(folder / "model", folder / name, 2))
    Folder(folder / "wrong").flip_bit("model.layers.1.mlp.up_proj.weight", 1, 7)
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def as_json(capsys: Capture, *words: str) -> tuple[int, Any]:
    code = _run(["verify", *words, "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    VALIDATOR.validate(found)
    return code, found


@pytest.mark.parametrize(("name", "code"), [("right", 0), ("wrong", 1)])
def test_the_same_folder_gives_the_same_json_but_for_the_time(
    name: str, code: int, demo: Path, capsys: Capture
) -> None:
    words = (str(demo / name), "--against", str(demo / "model"))
    found = [as_json(capsys, *words, "--workers", workers) for workers in ("1", "3")]
    assert [got for got, _ in found] == [code, code]
    for _, report in found:
        assert all(check.pop("seconds") >= 0 for check in report["checks"])
    assert found[0] == found[1]


def test_json_of_what_cannot_be_checked_is_valid_too(demo: Path, capsys: Capture) -> None:
    code, found = as_json(capsys, str(demo / "model"))
    assert (code, found["error"]["kind"]) == (3, "input")
    code, found = as_json(capsys, str(demo / "right"), "--model", "nothing")
    assert (code, found["error"]["kind"]) == (2, "usage")


@pytest.mark.parametrize(("name", "code"), [("right", 0), ("wrong", 1)])
def test_junit_is_written_whatever_the_verdict(name: str, code: int, demo: Path, capsys: Capture) -> None:
    words = ["verify", str(demo / name), "--level", "weights", "--junit", "out.xml"]
    Path("real.xml").write_text("older")
    Path("out.xml").symlink_to("real.xml")
    assert _run(words) == code
    assert capsys.readouterr().err == ""
    suite = parsed(Path("out.xml").read_text("utf-8"))
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", str(2 * code))
    assert Path("out.xml").is_symlink()
    assert sorted(path.name for path in Path().iterdir()) == ["out.xml", "real.xml"]


def test_an_older_junit_does_not_pass_for_a_run_that_broke_off(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.xml").write_text("older")
    assert _run(["verify", str(demo / "model"), "--junit", "out.xml"]) == 3
    (error,) = parsed(Path("out.xml").read_text("utf-8")).iter("error")
    assert "has no tpshard.json" in error.attrib["message"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tpshard.cli.verify.run_checks", interrupted)
    assert _run(["verify", str(demo / "right"), "--junit", "out.xml"]) == 130
    (error,) = parsed(Path("out.xml").read_text("utf-8")).iter("error")
    assert error.attrib["message"] == "KeyboardInterrupt"
    assert [path.name for path in Path().iterdir()] == ["out.xml"]


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("absent/out.xml", 5, "absent/out.xml: absent is not a folder (make it first)"),
        ("file/out.xml", 5, "file/out.xml: file is not a folder (make it first)"),
        ("folder", 5, "folder: is not a regular file (give the name of a file)"),
        ("/dev/null", 5, "/dev/null: is not a regular file (give the name of a file)"),
        ("circle", 5, "circle: is not a regular file"),
        ("x" * 300, 5, "File name too long"),
        ("shards/out.xml", 2, "shards/out.xml: lies inside shards (give a file elsewhere: DST has to stay as it is)"),
        ("linked/out.xml", 2, "linked/out.xml: lies inside shards"),
    ],
)
def test_a_junit_file_that_cannot_be_written_is_told_before_anything_is_checked(
    path: str, code: int, said: str, demo: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    Path("circle").symlink_to("circle")
    Path("shards").symlink_to(demo / "right")
    Path("linked").symlink_to(demo / "right")
    monkeypatch.setattr("tpshard.cli.verify.run_checks", lambda _: pytest.fail("checked"))
    before = sorted(Path().rglob("*"))
    assert _run(["verify", "shards", "--junit", path]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert sorted(Path().rglob("*")) == before
    assert not (demo / "right/out.xml").exists()


def test_a_disk_that_is_full_leaves_the_older_junit(
    demo: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    Path("out.xml").write_text("older")
    monkeypatch.setattr("os.fsync", full)
    assert _run(["verify", str(demo / "right"), "--level", "files", "--junit", "out.xml"]) == 5
    assert capsys.readouterr().err == "tpshard: error: out.xml: No space left on device (make room, then run again)\n"
    assert Path("out.xml").read_text() == "older"
    assert [path.name for path in Path().iterdir()] == ["out.xml"]


def test_the_step_summary_is_appended(demo: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("summary.md").write_text("of an earlier step")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    for name in ("right", "wrong"):
        _run(["verify", str(demo / name), "--level", "weights"])
    text = Path("summary.md").read_text("utf-8")
    assert text.startswith("of an earlier step\n## tpshard verify: PASS\n")
    assert text.count("\n## tpshard verify: FAIL\n") == 1
    assert "model.layers.1.mlp.up&#95;proj.weight, rank 1" in text
    assert capsys.readouterr().err == ""


def test_a_summary_that_cannot_be_written_is_a_warning(
    demo: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "absent/summary.md")
    words = ["verify", str(demo / "right"), "--level", "files"]
    assert _run(words) == 0
    what = "absent/summary.md: No such file or directory; the step summary (GITHUB_STEP_SUMMARY) was not written"
    assert capsys.readouterr().err == f"tpshard: warning: {what}\n"
    assert _run([*words, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "")
    assert _run(words) == 0
    assert capsys.readouterr().err == ""


def test_a_stray_file_cannot_write_to_the_terminal(demo: Path, tmp_path: Path, capsys: Capture) -> None:
    run(plan_split(demo / "model", tmp_path / "shards", 2))
    (tmp_path / "shards/\x1b[2J\n.bin").touch()
    assert _run(["verify", "shards", "--level", "files", "--junit", "out.xml"]) == 1
    assert r"  - \x1b[2J\n.bin: is not in the manifest" in capsys.readouterr().out
    (failure,) = parsed(Path("out.xml").read_text("utf-8")).iter("failure")
    assert failure.attrib["message"] == r"\x1b[2J\n.bin: is not in the manifest"


def test_every_error_is_a_kind_that_the_schema_can_say() -> None:
    for cls in TpshardError.__subclasses__():
        error = {"kind": cls.kind, "message": "m", "hint": None, "exit_code": cls.exit_code}
        VALIDATOR.validate({"command": "verify", "error": error})
