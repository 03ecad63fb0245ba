"""Parity with a server: what is compared, how servers are asked, and what is said of the difference."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import hybrid
from hybrid.cli import main
from hybrid.serve.parity import Decoded, compare, greedy, parity, random_prompts
from hybrid.serve.servers import MLX, from_content, get_server


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        layout="LS",
        hidden_size=32,
        vocab_size=61,
        mixers={"S": {"num_heads": 4}, "L": {"num_heads": 2}},
    )
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def test_greedy_is_what_generate_gives(model):
    loaded = hybrid.HybridForCausalLM.from_pretrained(model).eval()
    loaded.generation_config.eos_token_id = None
    (prompt,) = random_prompts(61, (9,), 0)
    found = greedy(loaded, prompt, 6)
    ids = torch.tensor([prompt])
    expected = loaded.generate(ids, max_new_tokens=6, do_sample=False)[0, 9:].tolist()
    assert found.tokens == expected
    logits = loaded(torch.tensor([prompt + expected])).logits[0, 8:-1]
    scores = logits.log_softmax(-1).gather(1, torch.tensor(expected)[:, None])[:, 0]
    assert found.logprobs == pytest.approx(scores.tolist(), abs=1e-5)


SAME = Decoded([1, 2, 3], [-1.0, -2.0, -3.0])
CASES = {
    "the same": (SAME, [], 0.0),
    "rounding": (Decoded([1, 2, 3], [-1.0, -2.00005, -3.0]), [], 5e-5),
    "a score": (
        Decoded([1, 2, 3], [-1.0, -2.0, -3.5]),
        ["prompt of 2 tokens: log-probabilities differ by 5.0e-01"],
        0.5,
    ),
    "a token": (
        Decoded([1, 7, 3], [-1.0, -2.0, -9.0]),
        ["prompt of 2 tokens: token 2 is 2 here and 7 there (0.0e+00 before)"],
        0.0,
    ),
    "the first token": (
        Decoded([4, 2, 3], [-1.5, -2.0, -3.0]),
        ["prompt of 2 tokens: token 1 is 1 here and 4 there (0.0e+00 before)"],
        0.0,
    ),
    "fewer": (Decoded([1, 2], [-1.0, -2.0]), ["prompt of 2 tokens: 2 tokens there, 3 here"], 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_compare(case):
    found, lines, largest = CASES[case]
    said, most = compare([[5, 6]], [SAME], [found], 1e-4)
    assert said == lines
    assert most == pytest.approx(largest, rel=1e-3)


def test_nan_differs():
    found = Decoded([1, 2, 3], [-1.0, float("nan"), -3.0])
    lines, largest = compare([[5], [5]], [SAME, SAME], [found, SAME], 1e-4)
    assert lines == ["prompt of 1 tokens: log-probabilities differ by nan"]
    assert largest != largest


@contextmanager
def serving(answer):
    """The base URL of a server that answers completions by a function of the request."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def _send(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self._send(200, {"data": [{"id": "tiny"}]})

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send(*answer(asked[-1]))

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ours_answers(folder, change=lambda tokens, scores: None):
    loaded = hybrid.HybridForCausalLM.from_pretrained(folder).eval()

    def answer(request):
        tokens, scores = greedy(loaded, request["prompt"], request["max_tokens"])
        change(tokens, scores)
        logprobs = {"tokens": [f"token_id:{i}" for i in tokens], "token_logprobs": scores}
        return 200, {"choices": [{"logprobs": logprobs}]}

    return answer


def test_an_openai_server_that_agrees(model, capsys):
    with serving(ours_answers(model)) as (url, asked):
        assert main(["parity", str(model), "--server", url, "--tokens", "4"]) == 0
    assert len(asked) == 6
    assert len({len(request["prompt"]) for request in asked}) == 6
    assert all(request["temperature"] == 0 and request["max_tokens"] == 4 for request in asked)
    assert f"hybrid in {url}/v1 (tiny): identical" in capsys.readouterr().out


def test_the_form_of_llama_cpp(model):
    plain = ours_answers(model)

    def answer(request):
        status, value = plain(request)
        found = value["choices"][0]["logprobs"]
        pairs = zip(found["tokens"], found["token_logprobs"], strict=True)
        content = [{"id": int(token[9:]), "logprob": score} for token, score in pairs]
        return status, {"choices": [{"logprobs": {"content": content}}]}

    with serving(answer) as (url, _):
        assert parity(model, url, tokens=3).identical


def test_an_openai_server_that_differs(model, capsys):
    def change(tokens, scores):
        scores[-1] += 0.25

    with serving(ours_answers(model, change)) as (url, _):
        assert main(["parity", str(model), "--server", url, "--tokens", "4"]) == 1
    out = capsys.readouterr().out
    assert "differs (largest difference of log-probabilities 2.5e-01" in out
    assert "prompt of 3 tokens: log-probabilities differ by 2.5e-01" in out


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "no such thing"}), "/v1/completions: 400: .*no such thing"),
        ((200, {"choices": []}), "expected token ids in an answer of OpenAI's format"),
        (
            (200, {"choices": [{"logprobs": {"tokens": ["hello"], "token_logprobs": [0.0]}}]}),
            "expected token ids in an answer",
        ),
    ],
)
def test_an_openai_server_of_another_kind(model, answer, message):
    with serving(lambda request: answer) as (url, _), pytest.raises(ValueError, match=message):
        parity(model, url, tokens=2)


def test_no_server(model):
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/v1/models: expected an answer"):
        parity(model, "http://127.0.0.1:9", tokens=2)
    with pytest.raises(ValueError, match="server: unknown server 'mlxx', did you mean 'mlx'"):
        get_server("mlxx")


def test_mlx_without_mlx(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'mlx'\" >&2; exit 1\n"
    )
    broken.chmod(0o755)
    with pytest.raises(
        ValueError, match=r"expected an interpreter with mlx-lm, got .*; try pip install mlx-lm"
    ):
        MLX(str(broken)).decode(tmp_path, [[1]], 1)
    with pytest.raises(ValueError, match=r"expected an interpreter, got .*nowhere"):
        MLX(str(tmp_path / "nowhere")).decode(tmp_path, [[1]], 1)


def test_mlx_is_asked_for_an_export(model, tmp_path):
    """A worker in place of mlx-lm, which says what it was given."""
    worker = tmp_path / "python"
    worker.write_text(
        f"#!{sys.executable}\nimport json, sys, pathlib\n"
        "request = json.load(sys.stdin)\n"
        "config = json.loads((pathlib.Path(request['folder']) / 'config.json').read_text())\n"
        "assert config['model_type'] == 'llama', config['model_type']\n"
        "none = {'tokens': [], 'logprobs': []}\n"
        "print(json.dumps({'version': '1.2', 'answers': [none for _ in request['prompts']]}))\n"
    )
    worker.chmod(0o755)
    config = hybrid.HybridConfig(
        layout="S", hidden_size=32, vocab_size=61, mixers={"S": {"num_heads": 4}}
    )
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "plain")
    found = parity(tmp_path / "plain", "mlx", python=str(worker), tokens=2)
    assert (found.family, found.server, found.identical) == ("llama", "mlx-lm 1.2", False)
    assert found.differences[0] == "prompt of 3 tokens: 0 tokens there, 2 here"


def test_tokens_that_llama_cpp_holds_back():
    """A token that ends within a character is not shown; its bytes come with the next one's."""

    def entry(token, score, shown, alone):
        return {"id": token, "logprob": score, "bytes": shown, "top_logprobs": [{"bytes": alone}]}

    content = [entry(5, -1.0, [32], [32]), entry(7, -2.0, [233, 65], [65])]
    found = Decoded(**from_content(content, 4))
    assert found == Decoded([5, None, 7, None], [-1.0, None, -2.0, None])
    expected = Decoded([5, 6, 7, 8], [-1.0, -9.0, -2.0, -9.0])
    assert compare([[1]], [expected], [found], 1e-4) == ([], 0.0)
    other = Decoded([5, 6, 9, 8], [-1.0, -9.0, -2.0, -9.0])
    assert compare([[1]], [other], [found], 1e-4)[0]
