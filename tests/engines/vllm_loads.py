"""What the real vLLM says after loading a folder: the proof that it accepts a folder, and that each rank holds the right weights.

    python vllm_loads.py FOLDER TP [--sharded] [--tokens N]

Run by the Python of an environment that has vLLM for CPUs. Prints one line of JSON: greedy token ids, and the log
probability of each, for a few fixed prompts. The same model from its Hugging Face folder and from a sharded_state
folder must give the same line. Attention on a CPU wants heads of 32, 64, 80, 96, 112, 128, 192 or 256.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

PROMPTS = [1, 5, 9, 13, 2], [7, 3, 3, 8, 11, 20], [100, 50, 25]


def prepare(tp: int) -> None:
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_HOST_IP="127.0.0.1",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="|".join(str(core % (os.cpu_count() or 1)) for core in range(tp)),
    )


def generate(folder: str, tp: int, sharded: bool, tokens: int) -> dict[str, Any]:
    import vllm

    engine = vllm.LLM(
        folder,
        tensor_parallel_size=tp,
        load_format="sharded_state" if sharded else "auto",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=32,
        max_num_seqs=4,
        distributed_executor_backend="mp" if tp > 1 else None,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=1, ignore_eos=True, detokenize=False)
    prompts = [vllm.inputs.TokensPrompt(prompt_token_ids=list(ids)) for ids in PROMPTS]
    answers = [answer.outputs[0] for answer in engine.generate(prompts, sampling, use_tqdm=False)]
    return {
        "vllm": vllm.__version__,
        "tp": tp,
        "sharded": sharded,
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs or [], strict=True)]
            for answer in answers
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("tp", type=int)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--tokens", type=int, default=6)
    arguments = parser.parse_args()
    prepare(arguments.tp)
    print(json.dumps(generate(arguments.folder, arguments.tp, arguments.sharded, arguments.tokens)), flush=True)


if __name__ == "__main__":
    main()
