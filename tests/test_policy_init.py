"""``policy init``: drafts of policies for architectures that have none, decided by running the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import tiny_models
from tpshard.cli.main import _run
from tpshard.conversion import run
from tpshard.convert import plan_split
from tpshard.library import builtin_policies, policies_of_text
from tpshard.policy_draft import draft
from tpshard.policy_init import Source, make_policy
from tpshard.policy_names import part_of
from tpshard.policy_search import likeliest, search
from tpshard.policy_text import Head, keys_for, policy_text
from tpshard.policy_ways import Drafted
from tpshard.verify.report import Verdict
from tpshard.verify.request import Request
from tpshard.verify.run import verify

Capture = pytest.CaptureFixture[str]

CTRL = {"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"], "vocab_size": 1003, "n_embd": 96, "n_head": 6,
        "n_layer": 3, "n_positions": 40, "dff": 112}  # fmt: skip
XLM = {"model_type": "xlm", "architectures": ["XLMWithLMHeadModel"], "emb_dim": 96, "n_heads": 6, "n_layers": 3,
       "vocab_size": 1003, "n_words": 1003, "max_position_embeddings": 40}  # fmt: skip
DIFFLLAMA = {"model_type": "diffllama", "architectures": ["DiffLlamaForCausalLM"], "hidden_size": 96,
             "intermediate_size": 112, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2,
             "vocab_size": 1003}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def drafted(words: list[str], capsys: Capture) -> tuple[int, dict[str, Any]]:
    code = _run(["policy", "init", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def rules(shown: dict[str, Any]) -> dict[str, str]:
    """The lines of the draft, without remarks."""
    lines = shown["text"].partition("rules:\n")[2].splitlines()
    return dict(line.partition("  #")[0].strip().rpartition(": {")[::2] if "{rule" in line else  # type: ignore[misc]
                line.partition("  #")[0].strip().split(": ") for line in lines)  # fmt: skip


# ---------------------------------------------------------------------------------------------- unknown architectures


def test_a_decoder_with_names_of_its_own() -> None:
    """CTRL: Wq, Wk, Wv and a feed-forward whose layers are numbers; the lookup is scaled in place."""
    made = _own_draft(CTRL)
    assert (made.unsure, made.share, made.rejected) == (0, 1.0, ())
    assert rules({"text": made.text()}) == {
        "transformer.w": "rule: row, dims: io}",
        "multi_head_attention.{Wq,Wk,Wv}": "rule: column, heads: H}",
        "multi_head_attention.dense": "rule: row, heads: H}",
        "ffn.0": "column",
        "ffn.2": "row",
        '"{layernorm1,layernorm2,layernorm}"': "replicate",
        "lm_head.bias": "rule: column, gather: true}",
    }
    assert made.fit.legal == (1, 2, 3, 6)


def test_an_encoder_with_names_of_its_own(tmp_path: Path, capsys: Capture) -> None:
    """XLM: modules in parallel lists, attentions.0.q_lin beside ffns.0.lin1."""
    code, shown = drafted([str(write(tmp_path, XLM))], capsys)
    assert (code, shown["verdict"], shown["unsure"]) == (0, "PASS", [])
    assert shown["share_cut"] > 0.9


def test_what_no_cut_is_right_for_is_replicated() -> None:
    """DiffLlama pairs each head with one half the heads away: no run of heads is whole by itself. The rest is cut."""
    made = _own_draft(DIFFLLAMA)
    unsure = [path.rpartition(".")[2] for path, rule in made.rules.items() if rule.unsure]
    assert unsure == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "  # unsure: no way of cutting it was found right (96 x 96)" in made.text()
    assert rules({"text": made.text()})["mlp.down_proj"] == "row"
    assert made.rejected == ("attention of model.layers.*.self_attn",)
    assert made.tried > 1


@pytest.mark.parametrize(("groups", "form"), [(1, "parts: [H, 1, 1]"), (3, "heads: K")])
def test_how_query_key_and_value_are_fused_is_found_by_trying(
    groups: int, form: str, tmp_path: Path, capsys: Capture
) -> None:
    """Falcon's two ways, one key-value head and groups: the shapes alone do not tell the second from [H, K, K]."""
    config = {"model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 96, "vocab_size": 1003,
              "num_attention_heads": 6, "num_hidden_layers": 2, "alibi": False, "bias": False, "parallel_attn": True,
              "multi_query": groups == 1, "new_decoder_architecture": groups > 1,
              **({"num_kv_heads": groups} if groups > 1 else {})}  # fmt: skip
    made = _own_draft(config)
    assert f"self_attention.query_key_value: {{rule: column, {form}}}" in made.text()
    assert made.share == 1.0


def _own_draft(config: dict[str, Any]) -> Any:
    """As ``init`` drafts, were there no built-in policies."""
    from tpshard.policy_init import _own
    from tpshard.verify.blueprint import Architecture
    from tpshard.verify.policy_proof import Candidates, ForwardJudge

    architecture = Architecture(config)
    real = architecture.real()
    source = Source(real.shapes, config, architecture.full, real.classes, architecture.plan)
    judge = ForwardJudge(architecture, Candidates(architecture.smaller(6)), wholly=True)
    return _own(source, draft(source.shapes, config, source.full, source.modules, source.plan), judge)


def test_a_builtin_policy_that_fits_is_extended(tmp_path: Path, capsys: Capture) -> None:
    """A model type that nobody knows a policy for, with names that are Llama's."""
    config = {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], "hidden_size": 96, "vocab_size": 1003,
              "intermediate_size": 112, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2,
              "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    code, shown = drafted([str(write(tmp_path, config))], capsys)
    assert (code, shown["verdict"]) == (0, "PASS")
    assert shown["extends"] in builtin_policies()
    assert len(rules(shown)) <= 2
    assert shown["share_cut"] > 0.9


def test_a_draft_of_a_checkpoint_cuts_it_rightly(tmp_path: Path, capsys: Capture) -> None:
    config = transformers.AutoConfig.for_model(**{key: value for key, value in CTRL.items() if key != "architectures"})
    tiny_models.build(config, "CTRLLMHeadModel").save_pretrained(tmp_path / "source")
    draft_file = tmp_path / "ctrl.yaml"
    assert _run(["policy", "init", str(tmp_path / "source"), "-o", str(draft_file)]) == 0
    shown = capsys.readouterr().out
    assert f"next: tpshard split SRC DST --tp 2 --policy {draft_file}" in shown
    conversion = plan_split(tmp_path / "source", tmp_path / "shards", 2, str(draft_file))
    assert conversion.warnings == ()
    run(conversion)
    report = verify(Request(tmp_path / "shards", against=tmp_path / "source", workers=1))
    assert report.verdict is Verdict.PASS


# ---------------------------------------------------------------------------------------------- where nothing is proven


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path, capsys: Capture) -> None:
    """By the checkpoint's names and shapes alone, and said to be unproven."""
    tiny_models.save_model("gpt2", tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    write(tmp_path / "source", config | {"model_type": "own", "architectures": ["Own"]})
    assert _run(["policy", "init", str(tmp_path / "source")]) == 4
    shown, said = capsys.readouterr()
    assert "NOT PROVEN" in shown
    (policy,) = policies_of_text(shown, "draft")
    assert policy.extends == "gpt2"
    assert "transformers" in said.splitlines()[-1]
    assert "does not know model_type 'own'" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("{", 3, "config.json"),
        ('{"model_type": "nothing_like_it"}', 4, "does not know model_type"),
        ('{"model_type": "ctrl", "n_layer": 1000000000}', 3, "n_layer is 1000000000"),
    ],
)
def test_a_config_that_is_none(text: str, code: int, said: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(text)
    assert _run(["policy", "init", str(tmp_path / "config.json"), "-o", str(tmp_path / "out.yaml")]) == code
    shown, error = capsys.readouterr()
    assert (shown, error.count("\n")) == ("", 1)
    assert said in error
    assert not (tmp_path / "out.yaml").exists()


def test_a_source_that_is_not_there_or_has_no_config(tmp_path: Path, capsys: Capture) -> None:
    assert _run(["policy", "init", str(tmp_path / "absent")]) == 3
    assert _run(["policy", "init", str(tmp_path)]) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert "absent: is not there" in first
    assert "config.json: is not there" in second


def test_nothing_is_overwritten(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    assert _run(["policy", "init", str(write(tmp_path, CTRL)), "-o", str(tmp_path / "mine.yaml")]) == 2
    assert "mine.yaml: is already there" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_without_torch(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _run(["policy", "init", str(write(tmp_path, CTRL))]) == 4
    assert "torch is not installed" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("layers.*.self_attn.q_proj", "q"),
        ("layer.*.attention.self.key", "k"),
        ("attentions.*.v_lin", "v"),
        ("h.*.attn.c_attn", "qkv"),
        ("blocks.*.attn.Wqkv", "qkv"),
        ("layers.*.self_attn.kv_proj", "kv"),
        ("layers.*.self_attn.kv_a_proj_with_mqa", "latent"),
        ("layers.*.self_attn.kv_b_proj", "kv"),
        ("layer.*.attention.output.dense", "out"),
        ("h.*.attn.c_proj", "out"),
        ("h.*.mlp.c_proj", "down"),
        ("layer.*.output.dense", "down"),
        ("layer.*.intermediate.dense", "up"),
        ("layers.*.mlp.gate_proj", "up"),
        ("layers.*.mlp.gate", "router"),
        ("block.*.layer.*.DenseReluDense.wo", "down"),
        ("block.*.layer.*.SelfAttention.o", "out"),
    ],
)
def test_parts_by_name(path: str, part: str) -> None:
    assert part_of(path) == part


PLAIN = {
    "embed.weight": (1003, 44), "h.0.attn.q_proj.weight": (60, 44), "h.0.attn.k_proj.weight": (20, 44),
    "h.0.attn.v_proj.weight": (20, 44), "h.0.attn.o_proj.weight": (44, 60), "h.0.ffn.fc_b.weight": (44, 52),
    "h.0.ffn.fc_a.weight": (52, 44), "h.0.norm.weight": (44,), "odd.weight": (9, 7), "lm_head.weight": (1003, 44),
}  # fmt: skip
SIZES = {"vocab_size": 1003, "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2}


def test_a_draft_by_names_and_shapes_alone() -> None:
    """The feed-forward's two layers are told by their shapes; what has neither name nor place is unsure."""
    found = draft(PLAIN, SIZES, SIZES, {}, {})
    made = found.rules(likeliest(found))
    assert {path.rpartition(".")[2]: rule.kind for path, rule in made.items() if rule.kind != "replicate"} == {
        "embed": "row", "q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row", "fc_b": "row",
        "fc_a": "column", "lm_head": "column",
    }  # fmt: skip
    assert [path for path, rule in made.items() if rule.unsure] == ["odd"]
    assert made["h.*.attn.k_proj"].options == (("heads", "K"),)


def test_the_search_keeps_what_is_right_and_leaves_the_rest() -> None:
    """One block's ways are all wrong, another's second way is right."""
    found = draft(PLAIN, SIZES, SIZES, {}, {})
    attention = next(block for block in found.blocks if block.name.startswith("attention"))

    def right(rules: Any) -> bool:
        cut = rules["h.*.ffn.fc_a"].kind == "column"
        return not cut and rules["h.*.attn.q_proj"] in (
            attention.ways[1]["h.*.attn.q_proj"], found.whole["h.*.attn.q_proj"]
        )  # fmt: skip

    kept = search(found, right)
    assert kept.chosen[attention.name] == attention.ways[1]
    assert kept.rejected == ("feed-forward of h.*.ffn",)


def test_keys_meet_their_layers_and_no_others() -> None:
    column, row = Drafted("column"), Drafted("row")
    layers = dict.fromkeys(("layer.*.attention.output.dense", "layer.*.output.dense", "x.bias"), ("weight", "bias"))
    made = dict(zip(layers, (column, row, row), strict=True))
    assert keys_for(made, layers) == {
        "attention.output.dense": "layer.*.attention.output.dense",
        "layer.*.output.dense": "layer.*.output.dense",
        "x.bias": "x.bias",
    }


def test_text_is_read_back_whatever_the_names_are() -> None:
    head = Head("my-no", "drafted for: no", "no", {"H": "n_head", "Q": "unused"}, remarks=("a remark",))
    rules = {"h.*.a": Drafted("column", (("heads", "H"),), "why"), "h.*.b": Drafted("replicate", unsure="because")}
    text = policy_text(head, rules, dict.fromkeys(rules, ("weight",)))
    (policy,) = policies_of_text(text, "draft")
    assert policy.applies({"model_type": "no"})
    assert policy.variables == {"H": "n_head"}
    assert {rule.key: rule.kind for rule in policy.rules} == {"h.*.a": "column", "h.*.b": "replicate"}
    assert "  # unsure: because\n" in text
    assert text.startswith("# a remark\nname: my-no\n")


def test_without_a_model_the_likeliest_is_written() -> None:
    made = make_policy(Source(PLAIN, SIZES, SIZES), None)
    assert made.share > 0.9
    assert made.tried == 0
