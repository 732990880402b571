"""The docs say what is so: sessions are run, generated pages are fresh, every command and key is there."""

from __future__ import annotations

import inspect
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import docs_pages, engine_table, sessions
from tests.stores.servers import azurite
from tpshard.engines.shelf import engines

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", sessions.PAGES, ids=lambda page: page.name)
def test_sessions_print_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    if page.name == "keras.md" and find_spec("keras") is None:
        pytest.skip("keras is not installed")
    if page.name == "stores.md" and azurite() is None:
        pytest.skip("azurite is not installed")
    found = [step for block in sessions.blocks(page) for step in sessions.steps(block[0])]
    assert found
    sessions.write_files(page, tmp_path)
    with sessions.surroundings(page) as more:
        for step in found:
            assert sessions.normal(sessions.run(step, tmp_path, more)) == sessions.normal(step.output), step.command


def test_generated_pages_are_fresh() -> None:
    assert (ROOT / "docs/cli.md").read_text("utf-8") == docs_pages.cli_page(), "run: python -m tests.docs_pages"
    assert (ROOT / "docs/errors.md").read_text("utf-8") == docs_pages.errors_page(), "run: python -m tests.docs_pages"
    page = docs_pages.quantised_page()
    assert (ROOT / "docs/quantised.md").read_text("utf-8") == page, "run: python -m tests.docs_pages"
    assert (ROOT / "docs/faults.md").read_text("utf-8") == docs_pages.faults_page(), "run: python -m tests.docs_pages"
    assert (ROOT / "docs/engines.md").read_text("utf-8") == engine_table.page(), "run: python -m tests.engine_table"
    assert all(engine.proof for engine in engines().values())


def test_every_command_has_an_example() -> None:
    for context in docs_pages.commands():
        name, text = context.command_path, f"{context.command.help}\n"
        assert f"{name} " in text or f"{name}\n" in text, name


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ci = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    command, *_ = [line for line in ci if " -m pytest" in line]
    assert command in (ROOT / "README.md").read_text("utf-8")


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_manifest_matches_its_schema(tmp_path: Path) -> None:
    import jsonschema

    from tests.tiny_models import save_model
    from tpshard.conversion import run
    from tpshard.convert import plan_split

    save_model("qwen2", tmp_path / "model", kv_heads=2)
    run(plan_split(tmp_path / "model", tmp_path / "shards", 2))
    schema = json.loads((ROOT / "docs/manifest.schema.json").read_text("utf-8"))
    manifest = json.loads((tmp_path / "shards/tpshard.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    manifest["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def test_the_python_in_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("57 tensors, ")
    assert out[1] == "PASS"
    assert out[-1].startswith("model.layers.0.self_attn.k_proj.weight BF16 (48, 312) ")


def test_the_api_page_names_every_function() -> None:
    from tpshard import api

    page = (ROOT / "docs/api.md").read_text("utf-8")
    for name, function in vars(api).items():
        public = getattr(function, "__module__", "") == api.__name__ and not name.startswith("_")
        if public and not isinstance(function, type):
            named = set(re.findall(r"\w+", re.findall(rf"`{name}\((.*?)\)`", page)[0].replace('"', "")))
            assert set(inspect.signature(function).parameters) <= named, name


def test_the_policy_in_the_readme_works(tmp_path: Path) -> None:
    from tpshard.convert import plan_split
    from tpshard.demo import make_checkpoint

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "policy.yaml").write_text(block)
    make_checkpoint(tmp_path / "model")
    own = plan_split(tmp_path / "model", tmp_path / "shards", 2, str(tmp_path / "policy.yaml"))
    built_in = plan_split(tmp_path / "model", tmp_path / "shards", 2)
    assert [item.want for item in own.plan.items] == [item.want for item in built_in.plan.items]


def test_json_keys_are_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tpshard.cli.main import _run
    from tpshard.demo import make_checkpoint

    page = (ROOT / "docs/json.md").read_text("utf-8")
    make_checkpoint(tmp_path / "model")
    model, shards = str(tmp_path / "model"), str(tmp_path / "shards")
    lines = [
        ["split", model, shards, "--tp", "2"],
        ["inspect", shards, "--filter", "lm_head"],
        ["verify", shards, "--level", "files"],
        ["merge", shards, str(tmp_path / "again")],
        ["reshard", shards, str(tmp_path / "four"), "--tp", "4"],
        ["fetch", model, str(tmp_path / "one"), "--tp", "1", "--rank", "0"],
        ["join", str(tmp_path / "one")],
        ["policy", "list"],
        ["policy", "show", "phi3"],
        ["policy", "check", "llama", model, "--tp", "2,5"],
        ["split", model, shards, "--tp", "2"],  # exists by now: an error
    ]
    for line in lines:
        _run([*line, "--json"])
        for key in keys(json.loads(capsys.readouterr().out)):
            assert f"`{key}`" in page or f"`{key}[]`" in page, f"{line[0]}: {key}"


def keys(value: object) -> set[str]:
    """Every key of nested JSON, but for tables whose keys are data."""
    if isinstance(value, dict):
        found = set(value)
        for key, item in value.items():
            if key not in ("covered", "figures", "spans", "for", "documents", "digests"):
                found |= keys(item)
        return found
    return set().union(*map(keys, value)) if isinstance(value, list) else set()
