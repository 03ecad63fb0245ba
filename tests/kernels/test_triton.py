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
        env={**inherited, "OMP_NUM_THREADS": "1", **variables},
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
    command = ("-m", "hybrid_kernels.triton.resources", "--quick", "--target", target)
    done = run(*command, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(f"{target}: ") > 10
