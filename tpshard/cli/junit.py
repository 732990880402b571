"""The report of verify as JUnit XML, which continuous integration shows as tests: a test for each check.

What turns a build red is exactly what makes verify's exit code other than 0. An undecided check is an error, since
what is not proven must not look green; the one that may stay undecided is skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from tpshard.cli.report_text import check_lines
from tpshard.errors import printable
from tpshard.verify.report import LONGEST, CheckResult, Report, Verdict

MOST_FINDINGS = 1000  # readers of JUnit hold it all in memory


def report_xml(folder: Path, report: Report) -> str:
    """The whole file. Characters that XML forbids are escaped as on a terminal: names come from files."""
    cases = [_case(report, check) for check in report.checks]
    return _file(folder, report.verdict.value, report.seconds, cases)


def error_xml(folder: Path, error: BaseException) -> str:
    """Where the checks could not be run at all: an older report must not be taken for this one."""
    case = ET.Element("testcase", classname="tpshard.verify", name="verify", time="0.000")
    what = str(error) or type(error).__name__
    ET.SubElement(case, "error", type=type(error).__name__, message=printable(what, LONGEST))
    return _file(folder, Verdict.INCONCLUSIVE.value, 0.0, [case])


def _file(folder: Path, verdict: str, seconds: float, cases: list[ET.Element]) -> str:
    counts = {tag: sum(case.find(tag) is not None for case in cases) for tag in ("failure", "error", "skipped")}
    numbers = {
        "tests": str(len(cases)),
        "failures": str(counts["failure"]),
        "errors": str(counts["error"]),
        "skipped": str(counts["skipped"]),
        "time": f"{seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "tpshard verify", **numbers})
    name = f"tpshard verify {printable(str(folder), LONGEST)}"
    suite = ET.SubElement(root, "testsuite", {"name": name, **numbers})
    properties = ET.SubElement(suite, "properties")
    ET.SubElement(properties, "property", name="verdict", value=verdict)
    suite.extend(cases)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _case(report: Report, check: CheckResult) -> ET.Element:
    case = ET.Element("testcase", classname="tpshard.verify", name=check.name, time=f"{check.seconds:.3f}")
    text = "\n".join(check_lines(check, most_findings=MOST_FINDINGS))
    if check.verdict is Verdict.FAIL:
        more = f" (and {len(check.findings) - 1:,} more)" if len(check.findings) > 1 else ""
        ET.SubElement(case, "failure", type="FAIL", message=f"{check.findings[0]}{more}").text = text
    elif check.verdict is Verdict.INCONCLUSIVE:
        tag = "skipped" if report.excuses(check) else "error"
        ET.SubElement(case, tag, type="INCONCLUSIVE", message=printable(check.coverage, LONGEST)).text = text
    else:
        ET.SubElement(case, "system-out").text = text
    return case
