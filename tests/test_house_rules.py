"""Rules of the house that a reader would otherwise have to trust: floors, imports, sizes, names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tpshard"

# From the ground up: a module imports from floors below it, or from those before it on its own floor.
FAMILIES = tuple(f"verify.families.{path.stem}" for path in sorted((PACKAGE / "verify/families").glob("[a-z]*.py")))
FLOORS: list[tuple[str, ...]] = [
    ("__init__", "errors"),
    ("layout", "views", "expressions", "patterns", "document", "digest", "roles", "turns", "windows", "launch", "mesh"),
    ("pickle_machine", "pickles", "zips", "chunks"),
    ("stores.__init__", "stores.store", "stores.failures", "stores.path", "stores.ranges"),
    ("stores.objects", "stores.filesystems"),
    ("stages", "header", "frames", "file_digest", "torch_tensors", "torch_files", "torch_state"),
    ("pickle_writing", "torch_frames", "partition", "folder", "manifest", "manifest_parsing", "adapter"),
    (
        "containers",
        "keras_names",
        "keras_hdf5",
        "keras_files",
        "tensorflow_index",
        "tensorflow_files",
    ),
    (
        "container_files",
        "keras_graph",
        "keras_policy",
    ),
    ("dcp_metadata", "dcp_names"),
    ("policy", "policy_parsing", "library", "policy_schema", "assignment", "checkpoint", "adapter_layout"),
    ("adapter_folder",),
    ("grid", "companions", "policy_check", "plan", "slabs"),
    ("policy_names", "policy_heads", "policy_layers", "policy_ways", "policy_draft"),
    ("policy_text", "policy_search", "policy_init"),
    ("journal", "staging", "sources", "quantised_layer", "quantised_packed", "quantised_formats", "quantised"),
    ("reframing",),
    (
        "dcp",
        "dcp_writing",
    ),
    ("torch_dist",),
    ("share", "outputs", "stores.writing", "dealing", "execute", "carrying", "copies"),
    ("fingerprint", "shares", "meeting", "crew", "running", "conversion"),
    (
        "engines.__init__",
        "engines.names",
        "engines.orders",
        "engines.profile",
        "engines.profile_parsing",
        "engines.shelf",
    ),
    ("engines.joints", "engines.rules", "engines.inference"),
    (
        "engines.unrecorded",
        "engines.readers.__init__",
        "engines.readers.kind",
        "engines.readers.pieces",
        "engines.readers.reading",
    ),
    ("engines.readers.samples", "engines.readers.cuts", "engines.readers.rows"),
    (
        "engines.readers.deepspeed_steps",
        "engines.readers.deepspeed_map",
        "engines.readers.dcp",
        "engines.readers.deepspeed",
    ),
    ("engines.readers.deepspeed_universal", "engines.readers.deepspeed_inference"),
    ("engines.readers.nanotron_config", "engines.readers.nanotron", "engines.readers.of"),
    ("engines.settings.__init__", "engines.settings.kind", "engines.settings.rope", "engines.settings.reading"),
    ("engines.settings.meta", "engines.settings.trtllm", "engines.settings.deepseek"),
    ("engines.settings.megatron", "engines.settings.of"),
    ("engines.files", "engines.finding", "engines.bytewise", "engines.dealt"),
    ("engines.opening", "engines.whole", "engines.writing"),
    ("convert", "summary", "demo", "fetch", "joining", "statement"),
    ("verify.report", "verify.slots", *FAMILIES, "verify.families.__init__"),
    ("verify.axes", "verify.differences", "verify.ties", "verify.siblings", "verify.layout", "verify.grid_layout"),
    ("verify.adapter_layout_check",),
    ("verify.folding", "verify.files", "verify.engine_files", "verify.weights", "verify.companions", "verify.request"),
    ("verify.values", "verify.dequantise", "verify.logical"),
    ("verify.blocks", "verify.block_tensor", "verify.block_products", "verify.block_operations", "verify.generic"),
    ("verify.adapter_weights",),
    (
        "verify.inputs",
        "verify.models",
        "verify.factory_model",
        "verify.keras_layers",
        "verify.keras_plain",
        "verify.keras_recurrent",
        "verify.keras_model",
        "verify.placement",
        "verify.gradients",
    ),
    (
        "verify.lockstep",
        "verify.recurrent",
        "verify.record",
        "verify.features",
        "verify.seams",
        "verify.sections",
        "verify.execution",
    ),
    ("verify.preparation", "verify.native", "verify.loss", "verify.forward"),
    ("verify.canaries", "verify.sensitivity", "verify.layers"),
    ("verify.smaller", "verify.blueprint", "verify.policy_proof", "verify.policy_drafting"),
    ("verify.model_checks", "verify.disk_names", "verify.adapter_checks"),
    ("verify.processes", "verify.together", "verify.run", "verify.__init__"),
    ("api",),
    ("cli.__init__", "cli.options", "cli.render", "cli.carry_out"),
    ("cli.report_text", "cli.junit", "cli.markdown", "cli.report_files"),
    (
        "cli.split",
        "cli.merge",
        "cli.reshard",
        "cli.fetch",
        "cli.join",
        "cli.verify",
        "cli.inspect",
        "cli.statement",
        "cli.engines",
        "cli.demo",
    ),
    ("cli.policy_check", "cli.policy_init", "cli.policy"),
    ("cli.main", "__main__"),
]
ORDER = {module: place for place, module in enumerate(module for floor in FLOORS for module in floor)}
WITH_TORCH = {name for name in ORDER if name.startswith("verify.")} - {
    "verify.report", "verify.slots", *FAMILIES, "verify.families.__init__",
    "verify.axes", "verify.differences", "verify.ties", "verify.siblings", "verify.layout", "verify.grid_layout",
    "verify.folding", "verify.companions", "verify.adapter_layout_check",
    "verify.files", "verify.engine_files", "verify.weights", "verify.request", "verify.run", "verify.__init__", "verify.smaller",
}  # fmt: skip


def modules() -> dict[str, Path]:
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> Iterator[str]:
    """Every import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_floor() -> None:
    assert set(modules()) == set(ORDER)


@pytest.mark.parametrize("name", sorted(ORDER))
def test_imports_go_down_only(name: str) -> None:
    for imported in imports(modules()[name]):
        if imported.partition(".")[0] != "tpshard":
            continue
        path = imported.removeprefix("tpshard").removeprefix(".")
        target = next((m for m in (path, path.rpartition(".")[0], f"{path}.__init__") if m in ORDER), "__init__")
        assert ORDER[target] < ORDER[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(set(ORDER) - WITH_TORCH))
def test_torch_and_transformers_belong_to_the_model_side_of_verify(name: str) -> None:
    assert not {"torch", "transformers"} & {imported.partition(".")[0] for imported in imports(modules()[name])}


def test_only_execution_opens_files_for_tensors() -> None:
    """Whoever else wants bytes in a file asks the staging folder."""
    writing = {
        name
        for name, path in modules().items()
        if any(
            call in path.read_text("utf-8")
            for call in ("pwrite", '.open("xb"', '.open("x+b"', '.open("wb"', "write_bytes")
        )
    }
    assert writing == {"outputs", "staging", "demo"}


@pytest.mark.parametrize("name", sorted(ORDER))
def test_files_and_functions_are_short(name: str) -> None:
    text = modules()[name].read_text("utf-8")
    assert len(text.splitlines()) <= 330
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - (node.body[0].lineno if len(node.body) == 1 else node.body[1].lineno) + 1
            assert lines <= 45, f"{name}.{node.name} has {lines} lines"


def test_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "common", "helpers", "misc", "tools"} & {
        part for name in ORDER for part in name.split(".")
    }


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["split", "--help"],
        ["verify", "--help"],
        ["split", "model", "shards", "--tp", "2"],
        ["reshard", "shards", "four", "--tp", "4"],
        ["merge", "four", "merged"],
        ["inspect", "shards"],
        ["policy", "check", "auto", "model"],
        ["verify", "shards", "--level", "layout"],
    ],
)
def test_nothing_but_the_model_checks_imports_torch(words: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tpshard.demo import make_checkpoint; from tpshard import api\n"
        "from tpshard.cli.main import _run\n"
        "if sys.argv[1] != '--help': make_checkpoint(Path('model'))\n"
        "if sys.argv[1] in ('reshard', 'merge', 'inspect', 'verify'): api.split('model', 'shards', tp=2)\n"
        "if sys.argv[1] == 'merge': api.reshard('shards', 'four', tp=4)\n"
        "code = _run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'exit {code}, {heavy}' if code or heavy else 0)\n"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_that_takes_time() -> None:
    script = (
        "import sys; from tpshard.cli.main import _run; _run(['--help']); "
        "sys.exit(str({'numpy', 'yaml', 'safetensors', 'tqdm', 'torch'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
