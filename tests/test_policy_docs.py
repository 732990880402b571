"""The policy reference: every key is there, every example cuts a real model rightly, every error is one that exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import sessions, tiny_models
from tests.architectures.experts import DBRX
from tpshard.cli.main import _run
from tpshard.conversion import run
from tpshard.convert import plan_merge, plan_split
from tpshard.library import read_policies
from tpshard.policy import KINDS, POLICY_KEYS, RULE_KEYS
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/policy.md"
TEXT = PAGE.read_text("utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

FALCON = {
    "vocab_size": 1003, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_hidden_size": 52,
    "alibi": False, "bias": False, "parallel_attn": True, "multi_query": False, "new_decoder_architecture": False,
    "tie_word_embeddings": False,
}  # fmt: skip
MAMBA2 = {
    "vocab_size": 1003, "hidden_size": 44, "num_hidden_layers": 2, "state_size": 7, "expand": 2, "num_heads": 8,
    "head_dim": 11, "n_groups": 4, "chunk_size": 8,
}  # fmt: skip
LLAMA = tiny_models.SIZES["llama"]

# Each example's name, the model to cut by it and the ranks.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "my-phi3": ("phi3", tiny_models.SIZES["phi3"], 2),
    "my-gpt2": ("gpt2", tiny_models.SIZES["gpt2"], 3),
    "my-cohere": ("cohere", tiny_models.SIZES["cohere"], 2),
    "gpt-oss": ("gpt_oss", tiny_models.FREE | {"num_local_experts": 5, "num_experts_per_tok": 2}, 2),
    "mamba2": ("mamba2", MAMBA2, 4),
    "my-dbrx": ("dbrx", DBRX, 2),
    "my-olmo2": ("olmo2", tiny_models.SIZES["olmo2"], 2),
    "llama-by-group": ("llama", LLAMA | {"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 70}, 4),
    "llama-padded": ("llama", LLAMA, 2),
    "my-mixtral": ("mixtral", tiny_models.FREE | {"num_local_experts": 5, "num_experts_per_tok": 2}, 2),
    "falcon-rw": ("falcon", FALCON, 3),
    "falcon-7b": ("falcon", FALCON | {"multi_query": True}, 3),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3}, 3),
    "llama-heads-only": ("llama", LLAMA, 6),
    "cohere-in-stages": ("cohere", tiny_models.SIZES["cohere"], 2),
}


def test_every_key_has_its_section() -> None:
    headings = set(re.findall(r"^### `(\w+)`$", TEXT, re.MULTILINE))
    assert headings == {*RULE_KEYS, *POLICY_KEYS}
    for kind in KINDS:
        assert f"| `{kind}` |" in TEXT
    written = " ".join(EXAMPLES)
    for key in (*RULE_KEYS, *POLICY_KEYS):
        assert re.search(rf"\b{key}:", written), f"no example of {key}"


def test_every_example_is_tried() -> None:
    assert re.findall(r"^name: (.+)$", "\n".join(EXAMPLES), re.MULTILINE) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_examples_cut_real_models_rightly(name: str, tmp_path: Path) -> None:
    """Each is read from the page; the forward check passes, and what is merged is what was there."""
    (example,) = [text for text in EXAMPLES if re.search(rf"^name: {name}$", text, re.MULTILINE)]
    policy, source, shards, merged = (tmp_path / part for part in ("policy.yaml", "source", "shards", "merged"))
    policy.write_text(example)
    model_type, sizes, tp = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    tiny_models.build(config, tiny_models.word_head(config)).save_pretrained(source)
    conversion = plan_split(source, shards, tp, str(policy))
    assert conversion.policy is not None
    assert conversion.policy.name == name
    replaced = r"falcon.*rule 'self_attention.*' matches no tensor"  # a base's rule that the policy has its own for
    assert [text for text in conversion.warnings if not re.search(replaced, name + text)] == []
    run(conversion)
    report = verify(Request(shards, against=source, workers=1))
    forward = next(check for check in report.checks if check.name == "forward")
    assert Verdict.FAIL not in [check.verdict for check in report.checks], report
    assert forward.figures["worst_relative_error"] <= 1e-12
    run(plan_merge(shards, merged))
    assert (merged / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_examples_are_read_one_by_one(tmp_path: Path) -> None:
    for number, example in enumerate(EXAMPLES):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example)
        assert read_policies(path)


def test_the_errors_are_those_that_exist() -> None:
    """Each quoted message stands in the source, so that it can be found by what the terminal says."""
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "tpshard").glob("*.py"))
    table = TEXT[TEXT.index("## Errors") :]
    quoted = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(quoted) > 10
    for message in quoted:
        assert message in source


def test_the_session(tmp_path: Path) -> None:
    found = [step for block in sessions.blocks(PAGE) for step in sessions.steps(block[0])]
    assert len(found) == 10
    sessions.write_files(PAGE, tmp_path)
    for step in found:
        assert sessions.normal(sessions.run(step, tmp_path)) == sessions.normal(step.output), step.command


@pytest.mark.parametrize("pattern", re.findall(r"^(\| `.+`.*\.weight`.*) \|$", TEXT, re.MULTILINE))
def test_patterns_meet_what_the_page_says(pattern: str) -> None:
    from tpshard.patterns import parse_patterns

    key, met, unmet = (re.findall(r"`([^`]+)`", cell) for cell in pattern.strip("|").split(" | "))
    patterns = parse_patterns(key[0])

    def meets(name: str) -> bool:
        return any(p.matches(name) or p.matches(name.rpartition(".")[0]) for p in patterns)

    assert all(map(meets, met))
    assert not any(map(meets, unmet))


def test_show_prints_what_can_be_used_as_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["policy", "show", "phi3"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert [policy.name for policy in read_policies(tmp_path / "mine.yaml")] == ["phi3"]
