"""The Triton kernels without a GPU: interpreted against the reference, and compiled for four targets.

Interpreting must be decided before triton is imported, and holds for the whole process, so each
file of ``interpreted/`` runs in a pytest of its own; here the same process compiles.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("check_*.py"))


def run(*command, **variables):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parents[1],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    if file.stem == "check_fla" and importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_every_file_is_found():
    assert len(FILES) == len(list((HERE / "interpreted").glob("*.py"))) - 1
    assert FILES


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_within_bounds(target, tmp_path):
    command = ("kernels/benchmarks/resources.py", "--quick", "--target", target)
    done = run(*command, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(f"{target}: ") > 10


# Binds the arguments of each launch as a real one would, on a device of which only the name is known.
BIND = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from hybrid_kernels.arguments import CausalConv1d, LinearAttention, SelectiveScan
from hybrid_kernels.custom_ops import BackwardInputs
from hybrid_kernels.triton import convolution, launch, linear, scan

backend, seen = make_backend(GPUTarget("cuda", 90, 32)), {}

def bind(kernel, config, arguments, constants):
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, special, _ = binder(*arguments, **constants, **config.options)
    seen.setdefault((kernel.__name__, direction), set()).add(str(special))

def call(batch, time, packed):
    # A kernel that both passes launch may be bound in another way by each.
    global direction
    direction = "forward"
    q, g = torch.zeros(batch, time, 2, 64, dtype=torch.bfloat16), torch.zeros(batch, time, 2)
    offsets = torch.tensor([0, time // 2, time]) if packed else None
    state = torch.zeros(2 if packed else batch, 2, 64, 64)
    rest = {"initial_state": state, "cu_seqlens": offsets, "scale": 1.0, "chunk_size": 64}
    inputs = LinearAttention(q, q, q, g, beta=g, **rest)
    wanted, inverse = frozenset(inputs.floating()), torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    linear.forward(inputs, wanted)
    direction = "backward"
    linear.backward(inputs, BackwardInputs(wanted, q, state, inverse))
    direction = "forward"
    x, a = q[:, :, 0].contiguous(), torch.zeros(64, 16)
    convolution.forward(CausalConv1d(x, a[:, :4], cu_seqlens=offsets, activation="silu"), wanted)
    b = x[:, :, :16].contiguous()
    scan.forward(SelectiveScan(x, x, a, b, b, cu_seqlens=offsets), wanted)

with launch.record("sm_90", bind):
    for packed in (False, True):
        seen.clear()
        for time in (64, 100, 128, 1000, 1024, 4095, 4096):
            call(1, time, packed)
        print(len({name for name, _ in seen}), max(len(kinds) for kinds in seen.values()))
"""


def test_another_length_compiles_nothing():
    done = run("-c", BIND, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        kernels, kinds = map(int, line.split())
        assert kernels >= 9
        assert kinds == 1
    assert len(done.stdout.splitlines()) == 2
