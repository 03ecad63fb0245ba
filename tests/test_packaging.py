"""How the repository sits beside other packages."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import json, sys
if "without us" in sys.argv:
    ours = [sys.argv[2] + folder for folder in ("", "/kernels", "/eval")]
    sys.path[:] = [p for p in sys.path if p not in ours]
import transformers
from transformers.utils import is_kernels_available
from transformers.utils.import_utils import _is_package_available
import kernels
found = [is_kernels_available(), _is_package_available("kernels"), kernels.__file__]
print(json.dumps([*found, transformers.__version__]))
"""


def probe(folder, *arguments):
    command = [sys.executable, "-c", PROBE, *arguments]
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_kernels_package_is_not_shadowed_by_our_folder(tmp_path):
    """transformers imports a package called `kernels`; we have a folder of that name."""
    alone = probe(tmp_path, "without us", str(ROOT))
    assert probe(ROOT) == alone
    assert probe(tmp_path) == alone
    assert not Path(alone[2]).is_relative_to(ROOT / "kernels")


@pytest.mark.parametrize("folder", ["kernels", "eval", "configs", "tests"])
def test_folders_that_hold_packages_are_none_themselves(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def imports_of(package):
    """Modules loaded by importing a package in a fresh process."""
    code = f"import {package}, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_arrows_between_packages():
    assert not imports_of("hybrid_kernels") & {"hybrid", "hybrid_eval", "transformers"}
    assert "hybrid" not in imports_of("hybrid_eval")
    assert "hybrid_eval" not in imports_of("hybrid")


def test_version_is_the_distributions():
    import hybrid

    assert hybrid.__version__ == importlib.metadata.version("hybrid-language-models")


READ_ONLY = {"arxiv.org", "github.com", "huggingface.co"}  # papers, code and models, to read


def test_readme_has_the_two_commands_and_no_third_party_host():
    """Installing asks the package index that pip is set up for, and nobody else."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in readme.split("```bash\n")[1:]]
    assert "hybrid quickstart" in blocks[0]
    assert "pytest" in blocks[1]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for text in (*blocks, pins):
        assert not re.search(r"://|git\+|--(extra-)?index|--find-links|--trusted-host", text)
    assert set(re.findall(r"\w+://([\w.-]+)", readme)) <= {*READ_ONLY, "localhost"}
