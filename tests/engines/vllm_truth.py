"""What every rank of vLLM holds of a Hugging Face folder, by vLLM's own model classes: before it repacks anything for its kernels.

    python vllm_truth.py HF_FOLDER TP OUT_DIR [HF_FOLDER TP OUT_DIR ...]

Run by the Python of an environment that has vLLM for CPUs; nothing of tpshard is imported. One process plays each
rank in turn: only the size and the rank of vLLM's groups are changed, so that no rank needs a core of its own.

It writes ``truth-rank-{r}.safetensors``, which holds exactly the names that ``load_format="sharded_state"`` asks for
(those of the model before anything is loaded, after ``ShardedStateLoader._filter_subtensors``), and ``truth.json``:
versions, the class of the model, and for each rank ``constants`` (what loading never touched: buffers such as
``attn._k_scale``), ``unwritten`` (cells that no tensor of the folder reached: memory that nobody set), ``aliases``
(names left out, as they share another's memory), ``new`` and ``gone`` (names that loading made or took away: such a
model cannot come from a sharded_state folder).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
)

import torch
import vllm
from safetensors.torch import save_file
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

Tensors = dict[str, torch.Tensor]
_GROUPS = "_TP", "_ETP", "_EP"  # which split by tensors, engram tables and experts; the others keep one rank


def accept_any_kernel() -> None:
    """No kernel runs here, so neither the sizes of the test models nor their numbers need suit those of this processor."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.platforms.interface import PlatformEnum

    for name, kernels in vars(linear).items():
        if name.startswith("_POSSIBLE_"):
            kernels[PlatformEnum.CPU] = [*kernels.get(PlatformEnum.CPU, []), *kernels.get(PlatformEnum.CUDA, [])]
            for kernel in kernels[PlatformEnum.CPU]:
                kernel.is_supported = classmethod(lambda *_, **__: (True, None))
                kernel.can_implement = classmethod(lambda *_, **__: (True, None))
    for found in (*vars(cpu_moe).values(), modular_kernel.FusedMoEExperts):
        if isinstance(found, type) and "is_supported_config" in vars(found):
            found.is_supported_config = staticmethod(lambda *_: (True, None))


def inspect_here() -> None:
    """vLLM looks at a model's class in a process of its own, lest it start a GPU: half a minute each, for nothing on a CPU."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def configure(folder: Path, tp: int) -> VllmConfig:
    """As the sharded loader sees it: with any other format vLLM unties an lm_head that the folder happens to hold."""
    arguments = EngineArgs(
        model=str(folder),
        tensor_parallel_size=tp,
        load_format="sharded_state",
        dtype=os.environ.get("TRUTH_DTYPE", "auto"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=16,
        distributed_executor_backend="mp" if tp > 1 else None,
        trust_remote_code=False,
    )
    return arguments.create_engine_config()


def play(rank: int, tp: int) -> None:
    for name in _GROUPS:
        if (group := getattr(parallel_state, name)) is not None:
            group.world_size, group.rank_in_group = tp, rank
            group.ranks = list(range(tp))


def initialise(config: VllmConfig) -> None:
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file:///tmp/vllm-truth-{os.getpid()}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)


def clone(model: torch.nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


def loaded(config: VllmConfig) -> tuple[torch.nn.Module, Tensors]:
    """The model as the folder filled it, and what it held before. Memory that nothing set is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    model_config = config.model_config
    with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
        model = initialize_model(vllm_config=config)
    before = clone(model)
    with set_current_vllm_config(config):
        DefaultModelLoader(LoadConfig()).load_weights(model, model_config)
    return model, before


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    facts: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.numel() and not tensor.is_complex():
        values = tensor.double().unique()
        facts["values"] = [repr(value) for value in values.tolist()] if len(values) < 4 else f"{len(values)} different"
    return facts


def unwritten(name: str, tensor: torch.Tensor) -> int:
    if tensor.dtype.is_floating_point:
        return int(tensor.float().isnan().sum())
    return 0


def dump(folder: Path, tp: int, out: Path) -> dict[str, Any]:
    config = configure(folder, tp)
    initialise(config)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"vllm": vllm.__version__, "torch": torch.__version__, "tp": tp, "ranks": []}
    try:
        for rank in range(tp):
            play(rank, tp)
            config.compilation_config.static_forward_context.clear()
            model, before = loaded(config)
            report["class"] = type(model).__name__
            state: Mapping[str, torch.Tensor] = model.state_dict()
            kept = ShardedStateLoader._filter_subtensors({name: state[name] for name in state if name in before})
            wanted = {name: tensor.detach().clone().contiguous() for name, tensor in sorted(kept.items())}
            save_file(wanted, out / f"truth-rank-{rank}.safetensors", {"format": "pt"})
            report["ranks"].append(
                {
                    "constants": {
                        name: describe(tensor)
                        for name, tensor in wanted.items()
                        if name in before and same(before[name], tensor)
                    },
                    "unwritten": {name: count for name, tensor in wanted.items() if (count := unwritten(name, tensor))},
                    "aliases": sorted(set(state) & set(before) - set(kept)),
                    "new": sorted(set(state) - set(before)),
                    "gone": sorted(set(before) - set(state)),
                }
            )
            del model
    finally:
        play(0, 1)
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    (out / "truth.json").write_text(json.dumps(report, indent=1))
    return report


def main(arguments: list[str]) -> int:
    accept_any_kernel()
    inspect_here()
    failed = 0
    for folder, tp, out in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        try:
            report = dump(Path(folder), int(tp), Path(out))
        except Exception as problem:  # one folder that vLLM refuses must not hide what it says of the others
            failed += 1
            print(f"FAILED {folder} tp={tp}: {type(problem).__name__}: {str(problem)[:2000]}", flush=True)
            if os.environ.get("TRACEBACK"):
                raise
        else:
            print(f"ok {folder} tp={tp}: {report['class']}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
