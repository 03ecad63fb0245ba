"""A mixer of CONTRIBUTING.md, in a file of a user's, in the commands of this package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hybrid import imports
from hybrid.cli import main
from hybrid.config.registry import mixers
from hybrid.train.launch import training_command

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the mixer's file; what is registered and imported is undone."""
    page = PAGE.read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n(# my_mixer\.py.*?)```", page, re.DOTALL)
    (tmp_path / "my_mixer.py").write_text(text)
    for name in ("_by_name", "_by_symbol"):
        monkeypatch.setattr(mixers, name, dict(getattr(mixers, name)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(imports, "_imported", [])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_mixer", None)


@pytest.mark.parametrize("name", ["my_mixer.py", "my_mixer"])
def test_a_file_and_a_module(folder, name, capsys):
    assert main(["mixers", "my_mixer", "--import", name]) == 0
    assert "head_dim" in capsys.readouterr().out
    words = training_command("run.yaml", ["a=1"])
    known = str(folder / name) if name.endswith(".py") else name
    assert words[-4:] == ["run.yaml", "a=1", "--import", known]


def test_without_it_the_error_says_so(folder, capsys):
    assert main(["mixers", "my_mixer"]) == 2
    assert "`--import FILE`" in capsys.readouterr().err


MISTAKES = {
    "no file": ("their_mixer.py", r"expected an existing file, got .*their_mixer\.py"),
    "no module": ("their_mixer", r"expected a module, installed or in .*, got 'their_mixer'"),
    "no submodule": ("my_mixer.deeper", r"expected a module, .*got 'my_mixer\.deeper'"),
    "taken": ("yaml.py", r"expected a new module name, got 'yaml' of .*; rename the file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(folder, case, capsys):
    name, message = MISTAKES[case]
    (folder / "yaml.py").write_text("")
    assert main(["mixers", "--import", name]) == 2
    assert re.search(message, capsys.readouterr().err)


ERRORS = {
    "a module that it needs": (
        "import gone",
        1,
        "ModuleNotFoundError: No module named 'gone'",
    ),
    "syntax": ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax"),
    "a name": ("x = 1\n\nprint(y)", 3, "NameError: name 'y' is not defined"),
    "deeper": ("import json\njson.loads('')", 2, "json.decoder.JSONDecodeError: Expecting value"),
}


@pytest.mark.parametrize("name", ["broken.py", "broken"])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_the_file_is_one_line_with_its_place(folder, case, name, capsys):
    code, line, message = ERRORS[case]
    (folder / "broken.py").write_text(code)
    assert main(["mixers", "--import", name]) == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert f"--import: {folder / 'broken.py'}: line {line}: {message}" in text


@pytest.mark.slow
def test_training_and_what_comes_out(folder):
    """The command of the page: launched, and its checkpoint generates."""
    values = {
        "model": {
            "layout": "QS",
            "hidden_size": 16,
            "mixers": {"Q": {"type": "my_mixer", "num_heads": 2}, "S": {"num_heads": 2}},
        },
        "data": "text.txt",
        "sequence_length": 32,
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "output_dir": "out"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / "text.txt").write_text("a text of some length\n" * 40)
    imports.import_user_code(["my_mixer.py"])
    command = training_command("run.yaml", ["training.disable_tqdm=true"])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "out: 2 steps" in done.stdout
    model = AutoModelForCausalLM.from_pretrained("out")
    assert type(model.model.layers[0].mixer).__name__ == "MyMixer"
    ids = torch.arange(6)[None]
    tokens = [
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*tokens)
