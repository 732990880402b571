"""Proof by megatron-core itself, on CPU: load rank files with strict=True over gloo ranks, run them, return the logits.

    logits = logits_of(folder, config, token_ids, tp=2)          # a Megatron folder, or rank*.safetensors

Each rank is a process (tp * pp * ep of them); names may be those of megatron-core's local or Transformer Engine layers.
`python -m tests.engines.megatron_samples FOLDER` proves the oracle for every family and cut, and keeps the samples.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import socket
import traceback
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch


def shim() -> None:
    """What keeps megatron-core 0.16 from running without a GPU; nothing here touches a weight or an activation."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)  # a name it forgets to define without TE
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    tensor_parallel.random.get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()


def transformer_config(config: dict[str, Any], tp: int, pp: int, ep: int = 1, grouped: bool = False) -> Any:
    import torch.nn.functional as functional
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    from tests.engines.megatron_oracle import LLAMA_LIKE, Shape

    shape = Shape.of(config)
    llama = shape.kind in LLAMA_LIKE
    epsilon = config.get("rms_norm_eps") or config.get("layer_norm_eps") or config.get("layer_norm_epsilon")
    more: dict[str, Any] = {}
    if shape.experts:
        more = {
            "num_moe_experts": shape.experts,
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": shape.ffn,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": grouped,
        }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=epsilon,
        gated_linear_unit=llama,
        activation_func=functional.silu
        if llama
        else partial(functional.gelu, approximate="tanh")
        if shape.kind == "gpt2"
        else functional.gelu,
        add_bias_linear=not llama,
        add_qkv_bias=shape.kind == "qwen2",
        qk_layernorm=shape.kind == "qwen3",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        pipeline_dtype=torch.float32,
        attention_backend=AttnBackend.local,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **more,
    )


def build(config: dict[str, Any], tp: int, pp: int, padded: int, p: int = 0, ep: int = 1, grouped: bool = False) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.engines.megatron_oracle import LLAMA_LIKE, Shape

    shape = Shape.of(config)
    settings = transformer_config(config, tp, pp, ep, grouped)
    rope = config.get("rope_parameters") or {}
    spec = get_gpt_layer_local_spec(
        num_experts=shape.experts or None,
        moe_grouped_gemm=grouped,
        qk_layernorm=shape.kind == "qwen3",
        normalization="RMSNorm" if shape.kind in LLAMA_LIKE else None,
    )
    return GPTModel(
        settings,
        spec,
        vocab_size=padded,
        max_sequence_length=config.get("max_position_embeddings") or config["n_positions"],
        pre_process=p == 0,
        post_process=p == pp - 1,
        parallel_output=False,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="learned_absolute" if shape.kind == "gpt2" else "rope",
        rotary_percent=config.get("rotary_pct") or rope.get("partial_rotary_factor", 1.0),
        rotary_base=config.get("rope_theta") or rope.get("rope_theta", 10000.0),
    ).eval()


def place_name(t: int, p: int, e: int, pp: int, ep: int) -> str:
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")


def save_legacy(model: Any, home: Path, args: Any) -> None:
    """What save_checkpoint with `--ckpt-format torch` writes of a model; `_extra_state` entries (None) and all."""
    home.mkdir(parents=True)
    record = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
    record["model"] = model.state_dict_for_save_checkpoint()
    torch.save(record, home / "model_optim_rng.pt")


def local_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformer Engine's names as the local layers', which are all that runs without a GPU; the tensors are the same."""
    out = {}
    for name, tensor in state.items():
        name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
        name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
        name = re.sub(r"\.experts\.(linear_fc[12]\.weight)(\d+)$", r".experts.local_experts.\2.\1", name)
        out[name] = tensor
    return out


def read_rank(folder: Path, t: int, p: int, pp: int, e: int = 0, ep: int = 1) -> dict[str, torch.Tensor]:
    tracker = folder / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        word = tracker.read_text().strip()
        home = folder / (word if word == "release" else f"iter_{int(word):07d}")
        record = torch.load(
            home / place_name(t, p, e, pp, ep) / "model_optim_rng.pt", map_location="cpu", weights_only=False
        )
        assert record["checkpoint_version"] == 3.0
        return local_names(record["model"])
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return load_file(files[t + p * (len(files) // pp)])


def forward(model: Any, tokens: torch.Tensor, tp: int, pp: int, p: int, hidden: int) -> torch.Tensor | None:
    """Stage by stage over the real pipeline ranks; the last stage's rank 0 has the logits."""
    import torch.distributed as dist

    rank, length = dist.get_rank(), tokens.shape[1]
    # DotProductAttention makes its own causal mask only in a fused kernel; True is "may not see".
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    ids = torch.arange(length)[None].expand_as(tokens)
    with torch.no_grad():
        if p > 0:
            incoming = torch.empty(length, tokens.shape[0], hidden)
            dist.recv(incoming, rank - tp)
            model.set_input_tensor(incoming)
        out = model(tokens, ids, mask)
        if p < pp - 1:
            dist.send(out.contiguous(), rank + tp)
            return None
    return out


def rank_main(rank: int, jobs: list[dict[str, Any]], port: int, tp: int, pp: int, ep: int, queue: Any) -> None:
    try:
        torch.set_num_threads(1)
        import torch.distributed as dist
        from megatron.core import parallel_state as mpu

        shim()
        world = tp * pp * ep
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        mpu.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=tp)
        t, p = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
        e = mpu.get_expert_model_parallel_rank()
        for number, job in enumerate(jobs):
            queue.put((number, (t, p, e), one_job(job, t, p, e, tp, pp, ep)))
        dist.barrier()
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
    except BaseException:
        queue.put((-1, (rank, 0, 0), traceback.format_exc()))
        raise


def one_job(job: dict[str, Any], t: int, p: int, e: int, tp: int, pp: int, ep: int) -> dict[str, Any]:
    from tests.engines.megatron_oracle import Shape

    config = job["config"]
    state = read_rank(Path(job["folder"]), t, p, pp, e, ep) if job.get("folder") else None
    padded = job.get("padded_vocab_size")
    if padded is None and state is not None and "embedding.word_embeddings.weight" in state:
        padded = state["embedding.word_embeddings.weight"].shape[0] * tp
    elif padded is None and state is not None and "output_layer.weight" in state:
        padded = state["output_layer.weight"].shape[0] * tp
    model = build(config, tp, pp, padded or config["vocab_size"], p, ep, job.get("grouped", False))
    # Read before the load: names and shapes are the model's own, not the file's. Torch-spec norms have no extra state.
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if v is not None}
    answer: dict[str, Any] = {"shapes": own}
    if state is not None or job.get("dist"):
        if state is not None:
            model.load_state_dict(state, strict=True)
        else:
            load_torch_dist(model, Path(job["dist"]))
        if job.get("save_legacy"):
            save_legacy(model, Path(job["save_legacy"]) / place_name(t, p, e, pp, ep), job.get("args"))
        if job.get("save"):
            save_torch_dist(model, Path(job["save"]), job.get("metadata"), job.get("args"))
        out = forward(model, torch.tensor(job["tokens"]), tp, pp, p, Shape.of(config).hidden)
        if out is not None and t == 0:
            answer["logits"] = out.numpy().copy()
    return answer


def save_torch_dist(model: Any, folder: Path, metadata: dict[str, Any] | None, args: Any = None) -> None:
    """A torch_dist folder by megatron's own writer, with what training puts beside the model."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state

    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    group = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    record = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
    record["model"] = model.sharded_state_dict(metadata=group | (metadata or {}))
    dist_checkpointing.save(record, str(folder), content_metadata=metadata or {})


def load_torch_dist(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    group = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    content = dist_checkpointing.load_content_metadata(str(folder)) or {}
    record = dist_checkpointing.load(
        {"model": model.sharded_state_dict(metadata=group | content)}, str(folder), strict="raise_all"
    )
    model.load_state_dict(record["model"], strict=True)


def run_jobs(
    jobs: list[dict[str, Any]], tp: int, pp: int = 1, ep: int = 1
) -> list[dict[tuple[int, int, int], dict[str, Any]]]:
    """Every job on the same ranks: {(t, p, e): {"shapes": …, "logits": … on the last stage's t=0}} for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    world = tp * pp * ep
    ranks = [context.Process(target=rank_main, args=(r, jobs, port, tp, pp, ep, queue)) for r in range(world)]
    for process in ranks:
        process.start()
    answers: list[dict[tuple[int, int, int], dict[str, Any]]] = [{} for _ in jobs]
    try:
        for _ in range(world * len(jobs)):
            number, place, answer = queue.get(timeout=300)
            if number < 0:
                raise RuntimeError(f"rank {place[0]}:\n{answer}")
            answers[number][place] = answer
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return answers


def logits_of(
    folder: Path, config: dict[str, Any], token_ids: list[list[int]], tp: int, pp: int = 1, ep: int = 1
) -> Any:
    """Logits [batch, position, padded vocabulary] that megatron-core computes from a folder of rank files."""
    job = {"folder": str(folder), "config": config, "tokens": token_ids}
    (answer,) = run_jobs([job], tp, pp, ep)
    return answer[0, pp - 1, 0]["logits"]
