"""How commands end, and names that are printed as they are."""

import ast
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid import cli
from hybrid.convert.engine import _tracked
from hybrid.terminal import Interrupted, console, guarded, text_column


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "hybrid x: interrupted"),
        (Interrupted("kept: a", 143), 143, "hybrid x: kept: a"),
    ],
)
def test_ctrl_c_is_one_line(capsys, error, status, line):
    def interrupted():
        raise error

    assert guarded("hybrid x", interrupted) == status
    assert capsys.readouterr().err.strip() == line
    assert guarded("hybrid x", interrupted, quiet=True) == status
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["mixers"],
        ["mixers", "rwkv7"],
        ["layout", "LLLS"],
        ["--help"],
        ["eval", "--help"],
        ["eval", "--list"],
    ],
)
def test_a_closed_pipe_ends_a_command_without_a_word(words):
    command = [sys.executable, "-m", "hybrid.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert not _ours(process.stderr.read())
    # argparse ends with 0, click's help with 1
    assert process.wait() in ((0, 1) if words == ["--help"] else (0, 141))
    process.stderr.close()


def _ours(text):
    """What a command says, less what libraries say of the machine."""
    return [line for line in text.splitlines() if "accelerator" not in line]


def test_a_broken_pipe_of_something_else_is_not_hidden():
    def broken():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        guarded("hybrid x", broken)


def test_an_error_of_the_system_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").mkdir()
    assert cli.main(["plan", str(tmp_path / "config.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[/b]", "[MS]4", "x[bold]y", ":smile:", "[link=a]"])
def test_names_with_brackets_are_printed_as_they_are(name, capsys):
    from rich.progress import Progress
    from rich.table import Table

    screen = console(width=200)
    table = Table(name, title=f"title {name}")
    table.add_row(name)
    screen.print(table)
    screen.print(f"report: {name}")
    with Progress(text_column("train {task.description}"), console=screen) as bars:
        bars.add_task(name)
    shown = capsys.readouterr().out
    assert shown.count(name) >= 5


def _rich_calls(path):
    """(what, call) for each call of a name that a module imports from rich."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names = {a.name for n in imports if (n.module or "").startswith("rich") for a in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node.func.id, node


@pytest.mark.parametrize("package", ["hybrid", "eval/hybrid_eval"])
def test_nothing_that_prints_names_reads_markup(package):
    """rich takes [MS] for a style and drops it, unless each of these is told otherwise."""
    wrong = []
    for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
        for what, call in _rich_calls(path):
            without = any(
                k.arg == "markup" and isinstance(k.value, ast.Constant) and k.value.value is False
                for k in call.keywords
            )
            if what in ("Console", "TextColumn") and not without:
                wrong.append(f"{path}:{call.lineno}: {what} without markup=False")
            if what == "Progress" and not call.args:
                wrong.append(f"{path}:{call.lineno}: the columns that a Progress has by itself")
            if what in ("print", "inspect", "Prompt", "Status", "track"):
                wrong.append(f"{path}:{call.lineno}: {what} reads markup")
    assert not wrong


def test_the_bar_of_an_import_shows_names_with_brackets(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    steps = [SimpleNamespace(ours=["layers[bold].w"], theirs=["x"])]
    tensors = iter([("layers[bold].w", None)])
    assert list(_tracked("importing", steps, tensors)) == [("layers[bold].w", None)]
    assert "layers[bold].w" in capsys.readouterr().err


def test_an_import_that_is_interrupted_ends_in_one_line(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    command = [sys.executable, "-m", "hybrid.cli", "--import", "boom.py", "layout", "S"]
    (tmp_path / "boom.py").write_text(code)
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGINT
    assert _ours(ended.stderr)[-1] == "hybrid: interrupted"
    assert "Traceback" not in ended.stderr
