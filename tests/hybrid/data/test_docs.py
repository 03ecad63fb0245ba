"""docs/data.md says what the code does: its tables are the code's options, its examples run."""

import ast
import importlib.metadata
import inspect
import json
import re
from pathlib import Path

import pytest
import typer
import yaml

from hybrid.cli import app
from hybrid.config.declare import build
from hybrid.data import RowFormat, open_source, texts
from hybrid.data.sources import GIVEN, GROUP, SourceConfig, plugins
from hybrid.tokenizer import byte_tokenizer
from hybrid.train.config import TrainConfig, parse_config

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
# keys of a training config that are not about data
OTHERS = {
    "model", "probes", "context_parallel", "device", "muon", "multi_step", "decay_embeddings",
    "decay_norms", "decay_gates", "training",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def table(heading):
    """The rows of the first table under a heading, cells without their backticks."""
    section = PAGE.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in lines]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def spelt(default):
    """A default in the words of YAML."""
    return default if isinstance(default, str) else json.dumps(default)


def described(fields):
    rows = []
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        given = "required" if field.is_required() else spelt(default)
        rows.append([name, given, field.description])
    return rows


def test_options_of_a_source():
    assert table("### Options") == described(SourceConfig.model_fields)


def test_keys_of_the_training_config():
    fields = {name: f for name, f in TrainConfig.model_fields.items() if name not in OTHERS}
    assert sorted(table("## Rows")) == sorted(described(fields))


def test_kinds_of_files():
    named = {ending for row in table("### Files") for ending in re.findall(r"\.\w+", row[0])}
    assert named == set(texts.BUILDERS)
    assert all(f"`{ending}`" in PAGE for ending in texts.PACKED_SUFFIXES)


def test_options_of_the_command():
    prepare = typer.main.get_command(app).commands["data"].commands["prepare"]
    options = [p for p in prepare.params if p.param_type_name == "option" and p.name != "imports"]
    expected = [[p.opts[0], spelt(p.default), p.help] for p in options]
    assert table("## Preparing ahead") == expected


def test_options_of_plug_ins():
    found, name = {}, ""
    for source, option, default, _ in table("## Plug-ins"):
        name = source or name
        found.setdefault(name, {})[option] = default
    ours = importlib.metadata.distribution("hybrid-language-models").entry_points
    expected = {}
    for entry in (e for e in ours if e.group == GROUP):
        parameters = inspect.signature(entry.load()).parameters.values()
        expected[entry.name] = {
            p.name: spelt(p.default) for p in parameters if p.name not in (*GIVEN, "start")
        }
    assert found == expected
    assert set(expected) <= set(plugins())


def test_configs_have_no_mistake(folder, monkeypatch):
    (folder / "my_rows.py").write_text(copies())
    monkeypatch.syspath_prepend(folder)
    entry = importlib.metadata.EntryPoint("copies", "my_rows:Copies", GROUP)
    installed = {**plugins(), "copies": entry}
    monkeypatch.setattr("hybrid.data.sources.plugins", lambda: installed)
    assert blocks("yaml")
    for block in blocks("yaml"):
        values = yaml.safe_load(block)
        config = parse_config({"model": {}, "sequence_length": 9, **values})
    (copied,) = config.data  # the last of them
    form = RowFormat(6, 256)
    row = open_source(copied, byte_tokenizer(), form, 0).row(1)
    assert row["input_ids"][:3].tolist() == row["input_ids"][3:].tolist()
    assert row["labels"].tolist() == [-100] * 3 + row["input_ids"][3:].tolist()


def copies():
    (code,) = (block for block in blocks("python") if "my_rows.py" in block)
    return code


def test_rows_are_laid_out_as_shown(capsys):
    (code,) = (block for block in blocks("python") if "my_rows.py" not in block)
    exec(compile(ast.parse(code), "docs/data.md", "exec"), {})
    assert capsys.readouterr().out == blocks("text")[0]


@pytest.mark.parametrize(("entry", "said"), table("## Mistakes"))
def test_mistakes_are_told_as_shown(entry, said, folder):
    (folder / "my.jsonl").write_text('{"body": "a text"}\n')
    (folder / "my.txt").write_text("a text")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    lines = []
    config = build(SourceConfig, yaml.safe_load(entry), "data", lines)
    if config is not None and not lines:
        with pytest.raises(ValueError, match=r"\w") as caught:
            open_source(config, byte_tokenizer(), RowFormat(256, 256), 0).row(0)
        lines = [str(caught.value)]
    assert any(all(part in line for part in said.split("...")) for line in lines), lines
