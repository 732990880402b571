"""``policy check --config``: a policy proven on the architecture alone, at its own head counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors import safe_open

from tests import tiny_models
from tpshard.cli.main import _run
from tpshard.errors import InconclusiveError, InputError
from tpshard.library import builtin_text
from tpshard.policy_check import in_runs
from tpshard.verify.blueprint import Architecture
from tpshard.verify.smaller import Scale, divisors, require_sane, scaled

Capture = pytest.CaptureFixture[str]

# As they stand in the models' own config.json, without what says nothing of sizes.
LLAMA_3_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 8192,
    "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
QWEN_2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256,
    "eos_token_id": 50256, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
BERT_BASE: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"], "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
    "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30522,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


def found(words: list[str], capsys: Capture) -> tuple[int, dict[str, Any]]:
    code = _run(["policy", "check", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


# 64 and 8 heads: what divides 64, up to 64 (a row layer may not replicate). 28 and 4: of what divides 28 (1, 2, 4, 7,
# 14, 28), what divides 4 or is a multiple of it. 12: its divisors.
@pytest.mark.parametrize(
    ("config", "legal", "tensors"),
    [
        (LLAMA_3_70B, [1, 2, 4, 8, 16, 32, 64], 3 + 80 * 9),
        (QWEN_2_5_7B, [1, 2, 4, 28], 3 + 28 * 12),
        (GPT2, [1, 2, 3, 4, 6, 12], 4 + 12 * 12),
        (BERT_BASE, [1, 2, 3, 4, 6, 12], 5 + 12 * 16 + 5),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_real_configs(config: dict[str, Any], legal: list[int], tensors: int, tmp_path: Path, capsys: Capture) -> None:
    code, shown = found(["auto", "--config", write(tmp_path, config), "--tp", "2"], capsys)
    assert code == 0
    assert shown["legal_tp"] == legal
    assert shown["tensors"] == tensors
    (trial,) = shown["trials"]
    assert trial["verdict"] == "PASS"
    assert {check["check"]: check["verdict"] for check in trial["checks"]} == dict.fromkeys(
        ("layout", "forward", "backward", "self-test"), "PASS"
    )
    assert 0 < trial["worst_relative_error"] < 1e-11


def test_why_not(tmp_path: Path, capsys: Capture) -> None:
    """28 query heads and 4 of keys and values: grouped by the rules that are against it."""
    code, shown = found(["auto", "--config", write(tmp_path, QWEN_2_5_7B), "--tp", "7"], capsys)
    assert code == 2
    assert "4 units cannot be dealt to 7 ranks" in shown["trials"][0]["problem"]
    why = {tp: [rule["pattern"] for rule in group["rules"]] for group in shown["refusals"] for tp in group["tp"]}
    assert sorted(why) == [tp for tp in range(1, 129) if tp not in shown["legal_tp"]]
    assert why[7] == why[14] == ["self_attn.{k_proj,v_proj}"]
    assert why[56] == ["self_attn.o_proj"]
    assert why[3] == ["self_attn.q_proj", "self_attn.{k_proj,v_proj}", "self_attn.o_proj"]
    assert why[8] == ["self_attn.q_proj", "self_attn.o_proj"]
    said = {group["tp"][0]: group["problem"] for group in shown["refusals"]}
    assert said[7] == "7, 14: self_attn.{k_proj,v_proj}: 4 heads"
    assert said[56] == "56, 84, 112: self_attn.o_proj: 28 heads, and a row rule may not replicate"


def test_numbers_in_runs() -> None:
    assert in_runs([1, 2, 3, 5, 7, 8], 3) == "1-3, 5, 7-8"
    assert in_runs([1, 3, 5, 7, 9], 3) == "1, 3, 5, ..."
    assert in_runs([1, 3, 5, 7], 3) == "1, 3, 5, 7"


SMALL_GPT2 = GPT2 | {"n_embd": 96, "n_head": 6, "n_positions": 64, "vocab_size": 1003}
SMALL_LLAMA = LLAMA_3_70B | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192, "vocab_size": 1003}


@pytest.mark.parametrize(
    ("name", "change", "config", "first"),
    [
        ("gpt2", ("parts: [H, H, H]}  # q", "heads: H}  # q"), SMALL_GPT2, "transformer.h.0.attn.c_proj"),
        ("llama", ("lm_head: {rule: column, gather: true}", "lm_head: column"), SMALL_LLAMA, "the model's output"),
        ("llama", ("mlp.down_proj: row", "mlp.down_proj: replicate"), SMALL_LLAMA, "model.layers.0.mlp.down_proj"),
    ],
    ids=["qkv as one block", "forgotten gather", "forgotten row"],
)
def test_a_wrong_policy_fails_and_the_layer_is_named(
    name: str, change: tuple[str, str], config: dict[str, Any], first: str, tmp_path: Path, capsys: Capture
) -> None:
    text = builtin_text(name)
    assert change[0] in text
    (tmp_path / "wrong.yaml").write_text(text.replace(*change).replace(f"name: {name}", "name: wrong"))
    words = [str(tmp_path / "wrong.yaml"), "--config", write(tmp_path, config), "--tp", "3"]
    assert _run(["policy", "check", *words]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--tp 3 ")]
    assert line.startswith(f"--tp 3    FAIL  {first}")
    assert "times the tolerance" in line


def test_without_tp_the_fewest_ranks_that_work(tmp_path: Path, capsys: Capture) -> None:
    config = SMALL_LLAMA | {"num_attention_heads": 9, "hidden_size": 288}
    code, shown = found(["llama", "--config", str(Path(write(tmp_path, config)).parent)], capsys)
    assert code == 0
    assert [trial["tp"] for trial in shown["trials"]] == [3]


def test_a_policy_that_works_at_no_other_count_proves_nothing(tmp_path: Path, capsys: Capture) -> None:
    text = builtin_text("gpt2").replace("name: gpt2", "name: odd").replace("H: n_head", "H: 1")
    (tmp_path / "odd.yaml").write_text(text)
    assert _run(["policy", "check", str(tmp_path / "odd.yaml"), "--config", write(tmp_path, SMALL_GPT2)]) == 2
    assert "policy odd works at no --tp from 2 to 128" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- names on disk

MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 26, "shared_expert_intermediate_size": 28}


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt2", tiny_models.SIZES["gpt2"]),  # tied
        ("bert", tiny_models.SIZES["bert"]),  # tied, with a loose bias
        ("qwen2_moe", tiny_models.BOUND | MOE),  # experts stacked in the module, one by one on disk
        ("mixtral", tiny_models.BOUND | {"num_local_experts": 3}),  # and called otherwise
        ("gpt_neox", tiny_models.ENCODER),  # embed_out
    ],
)
def test_names_and_shapes_are_those_that_transformers_saves(
    model_type: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    tiny_models.build(config, tiny_models.word_head(config)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert Architecture(json.loads((tmp_path / "config.json").read_text())).real().shapes == saved


# ---------------------------------------------------------------------------------------------- the smaller model


def test_widths_are_divided_and_heads_kept() -> None:
    small = scaled(LLAMA_3_70B, Scale(16, 2, 8))
    assert next(divisors(LLAMA_3_70B)) == 16  # heads of 128 become heads of 8
    assert {key: (LLAMA_3_70B[key], small[key]) for key in small if small[key] != LLAMA_3_70B[key]} == {
        "hidden_size": (8192, 512), "intermediate_size": (28672, 1792), "num_hidden_layers": (80, 2),
        "max_position_embeddings": (8192, 130), "vocab_size": (128256, 64 * 9),
        "bos_token_id": (128000, small["bos_token_id"]), "eos_token_id": (128001, small["eos_token_id"]),
    }  # fmt: skip
    assert small["vocab_size"] % 64 == 0
    assert small["bos_token_id"] != small["eos_token_id"]
    assert max(small["bos_token_id"], small["eos_token_id"]) < small["vocab_size"] < 700


def test_kinds_of_layers_survive() -> None:
    """Of six kinds in turn the last is the odd one; three dense layers stand before the experts."""
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
             "hidden_size": 1152, "head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144}  # fmt: skip
    small = next(Architecture(gemma).smaller(2))
    assert small.config["num_hidden_layers"] == 6
    assert (small.config["num_attention_heads"], small.config["head_dim"]) == (4, 8)
    jamba = {"model_type": "jamba", "num_hidden_layers": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
             "hidden_size": 64, "intermediate_size": 96, "num_experts": 6, "vocab_size": 503,
             "attn_layer_period": 8, "attn_layer_offset": 4, "use_mamba_kernels": False}  # fmt: skip
    small = next(Architecture(jamba).smaller(2))
    assert small.config["num_hidden_layers"] == 5
    assert any("self_attn" in name for name in small.shapes)
    assert any(".experts." in name for name in small.shapes)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("{", 3, "config.json"),
        ("[]", 3, "config.json"),
        ("{}", 3, "names no model_type"),
        ('{"model_type": "nothing_like_it"}', 4, "does not know model_type 'nothing_like_it'"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', 3, "num_hidden_layers is 1000000000"),
        ('{"model_type": "llama", "num_labels": 1000000000}', 3, "num_labels is 1000000000"),
        ('{"model_type": "mixtral", "num_hidden_layers": 900, "num_local_experts": 90000}', 3, "experts"),
        ('{"model_type": "stablelm", "num_hidden_layers": 900, "num_attention_heads": 90000}', 3, "heads are more"),
        ('{"model_type": "llama", "hidden_size": 10000000000000000}', 3, "hidden_size is 1000"),
        ('{"model_type": "llama", "hidden_size": 8589934592, "intermediate_size": 8589934592}', 4, "cannot be made"),
        ('{"model_type": "llama", "num_attention_heads": "many"}', 4, "cannot read config.json"),
        ('{"model_type": "llama", "architectures": ["os"]}', 4, "does not know os"),
    ],
)
def test_a_config_that_is_none(text: str, code: int, said: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(text)
    assert _run(["policy", "check", "llama", "--config", str(tmp_path / "config.json")]) == code
    shown, error = capsys.readouterr()
    assert shown == ""
    assert error.count("\n") == 1
    assert said in error


def test_one_of_checkpoint_and_config(tmp_path: Path, capsys: Capture) -> None:
    assert _run(["policy", "check", "llama"]) == 2
    assert _run(["policy", "check", "llama", str(tmp_path), "--config", write(tmp_path, GPT2)]) == 2
    assert capsys.readouterr().err.count("one of the two") == 2


def test_a_policy_that_has_no_rules_for_it(tmp_path: Path, capsys: Capture) -> None:
    assert _run(["policy", "check", "gpt2", "--config", write(tmp_path, LLAMA_3_70B)]) == 2
    assert "policy gpt2 has no rule for 722 tensors" in capsys.readouterr().err


def test_sizes_inside_other_tables_are_bounded_too() -> None:
    with pytest.raises(InputError, match=r"text_config\.num_hidden_layers is 1001"):
        require_sane({"text_config": {"num_hidden_layers": 1001}})
    require_sane({"text_config": {"num_hidden_layers": 1000}, "bos_token_id": 10**6, "vocab_size": 10**7})


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model"}, "architectures": ["Own"]}
    with pytest.raises(InconclusiveError, match="is never run"):
        Architecture(config)
