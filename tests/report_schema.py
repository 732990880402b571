"""What verify prints as JSON, held to its published schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

from tpshard.cli.verify import FORMAT, VERSION
from tpshard.verify.report import Report

SCHEMA = json.loads((Path(__file__).parent.parent / "docs/verify.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def printed(report: Report) -> Any:
    """The report as --json prints it, read by a strict reader: no infinity, no NaN."""
    head = {"command": "verify", "format": FORMAT, "version": VERSION, "target": "shards"}
    return json.loads(json.dumps({**head, **report.as_json()}, allow_nan=False))


def check(report: Report) -> None:
    """Raises ValidationError or ValueError where the schema does not allow what the report says."""
    VALIDATOR.validate(printed(report))
