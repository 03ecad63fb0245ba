"""The command line, as a user types it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
import typer

from hybrid.cli import app, main
from hybrid.config.yaml import find_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def test_layout_prints_a_table(capsys):
    assert main(["layout", "[LS]2 M3"]) == 0
    out = capsys.readouterr().out
    assert "[LS]2M3" in out or "[LS]2MMM" in out
    assert "L lightning_attention + S" in out
    assert "5 layers" in out


def test_a_letter_that_no_mixer_has_is_refused_unless_it_is_bound(capsys):
    assert main(["layout", "LQ"]) == 2
    assert "column 2: unknown symbol 'Q'" in capsys.readouterr().err
    assert main(["layout", "LQ", "--bind", "Q=softmax_attention"]) == 0
    assert "Q softmax_attention" in capsys.readouterr().out
    assert main(["layout", "LQ", "--bind", "Q=softmax_attentio"]) == 2
    assert "did you mean 'softmax_attention'?" in capsys.readouterr().err
    assert main(["layout", "LQ", "--bind", "Q"]) == 2
    assert "--bind: expected LETTER=MIXER, got 'Q'" in capsys.readouterr().err


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"eval", "data"}))
def test_help_of_a_command_names_all_that_it_takes(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for parameter in COMMANDS[name].params:
        assert (parameter.opts[0] if parameter.param_type_name == "option" else "") in shown
        assert parameter.help or parameter.name == "help"
    assert "--import FILE" in shown


def test_the_list_of_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "--install-completion" in shown
    assert main([]) == 2  # nothing was asked for
    assert capsys.readouterr().out == shown


def test_help_of_eval_is_that_of_its_own_parser(capsys):
    from hybrid_eval.cli import build_parser

    with pytest.raises(SystemExit) as ended:
        main(["eval", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    options = [o for action in build_parser("hybrid eval")._actions for o in action.option_strings]
    assert len(options) > 20
    assert all(option in shown for option in options)
    assert "--import FILE" in shown


def test_help_of_a_mixer_has_its_options(capsys):
    assert main(["mixers", "softmax_attention", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: hybrid mixers" in shown
    assert "num_kv_heads: " in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["layot", "S"], "hybrid: .*'layot'.*See `hybrid --help`\\."),
        (
            ["plan", "x.yaml", "--contex", "8k"],
            "hybrid plan: .*--context.*See `hybrid plan --help`\\.",
        ),
        (["plan"], "hybrid plan: .*(?i:config).*"),
        (["layout", "S", "--layers", "many"], "hybrid layout: .*--layers.*integer.*"),
        (
            ["train", CONFIG, "--max_steps", "3"],
            "hybrid train: .*--max_steps.*arguments of the form key=value.*",
        ),
        (["data", "prepare", "stdlib"], "hybrid data prepare: .*(?i:out).*"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, line, capsys):
    assert main(words) == 2
    assert re.fullmatch(line, capsys.readouterr().err.strip())


def test_overrides_and_options_stand_in_any_order(capsys):
    first = ["plan", CONFIG, "model.layout=SSSS", "--context", "1k"]
    second = ["plan", "--context", "1k", "model.layout=LLLS", CONFIG]
    assert main(first) == 0
    expected = capsys.readouterr().out
    assert "cache at 1,024 tokens" in expected
    assert main(["plan", "--context", "1k", CONFIG, "model.layout=SSSS"]) == 0
    assert capsys.readouterr().out == expected
    assert main(second) == 2  # the config comes first
    assert "expected an existing file" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(shell):
    words = {"_HYBRID_COMPLETE": f"complete_{shell}", "COMP_WORDS": "hybrid pl", "COMP_CWORD": "1"}
    words |= {"_TYPER_COMPLETE_ARGS": "hybrid pl", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-m", "hybrid.cli"],
        env={**os.environ, **words},
        capture_output=True,
        text=True,
    )
    assert "plan" in done.stdout
    assert "layout" not in done.stdout


def test_layout_error_has_a_caret(capsys):
    assert main(["layout", "LL(S"]) == 2
    assert "\n        ^\n" in capsys.readouterr().err


def test_plan_reads_configs_and_checkpoints(capsys, build, tmp_path):
    assert main(["plan", CONFIG, "--context", "32k", "model.layout=SSSS"]) == 0
    assert "cache at 32,768 tokens" in capsys.readouterr().out
    build(layout="LS").save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path)]) == 0
    transformers.LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["plan", str(tmp_path), "--context", "2k"]) == 0
    assert "S3: 3 layers" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    assert main(["plan", str(tmp_path)]) == 2
    assert "no map for the family 'lama', did you mean 'llama'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("layout=SSSS", "layout: unknown key, did you mean 'model.layout'?"),
        ("modle.layout=SSSS", "modle: unknown key, did you mean 'model'?"),
        ("max_steps=3", "max_steps: unknown key, did you mean 'training.max_steps'?"),
        ("lr=1", "lr: unknown key, did you mean 'training.learning_rate'?"),
        ("foo.bar=1", "foo: unknown key, known: "),
    ],
)
def test_plan_refuses_keys_that_training_does_not_know(override, suggestion, capsys):
    assert main(["plan", CONFIG, override]) == 2
    assert suggestion in capsys.readouterr().err


def test_plan_of_a_checkpoint_takes_keys_of_its_config(capsys, build, tmp_path):
    build(layout="LS").save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "layout=SS"]) == 0
    assert "SS: 2 layers" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "layuot=SS"]) == 2
    assert "did you mean 'layout'?" in capsys.readouterr().err
    transformers.LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "layout=SS"]) == 2
    assert "no key=value with a published config" in capsys.readouterr().err


def test_mixers_prints_every_letter_and_each_ones_options(capsys):
    from hybrid.config.registry import mixers

    assert main(["mixers"]) == 0
    assert main(["mixers", "S"]) == 0
    out = capsys.readouterr().out
    assert "num_kv_heads" in out
    for cls in mixers.classes():
        assert main(["mixers", cls.name]) == 0
        printed = "".join(capsys.readouterr().out.split())
        assert "".join(cls.__doc__.split()) in printed  # brackets, too, which rich takes for markup
    assert main(["mixers", "softmax_atention"]) == 2
    assert "did you mean 'softmax_attention'" in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 90])
def test_mixers_keeps_to_the_width_and_to_whole_names(width, capsys, monkeypatch):
    from hybrid.config.registry import mixers

    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["mixers"]) == 0
    table = capsys.readouterr().out
    assert all(f" {name} " in table for name in mixers.names())
    assert main(["mixers", "S"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, (table + text).splitlines())) <= width
    assert "\n    num_heads: query heads H; default D / 64, at least 1.\n    num_kv_heads: " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "LLxS"], "unknown symbol 'x'"),
        (["--seeds", "a"], "--seeds: expected whole numbers"),
        (["--config", "nowhere.yaml"], "expected an existing file"),
        (["model.hiden_size=3"], "did you mean 'hidden_size'"),
    ],
)
def test_quickstart_refuses_before_it_trains(capsys, tmp_path, words, message):
    assert main(["quickstart", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quickstart_layouts_have_equal_parameters():
    from hybrid.plan import load_model_config, plan

    sizes = [
        plan(load_model_config(CONFIG, [f"model.layout={layout}"])).parameters
        for layout in ("LLLS", "SSSS", "LLLL")
    ]
    assert max(sizes) <= 1.02 * min(sizes)


def test_the_quickstart_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart.yaml").is_file()
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        find_config("nothing.yaml")


def test_a_piped_quickstart_prints_a_line_at_both_ends_of_each_training(
    tmp_path, monkeypatch, capsys
):
    """Three runs, one at a time: the times are those of the runs, without the queue."""
    module = importlib.import_module("hybrid.quickstart")
    clock, lines = [0.0], []

    def read():
        lines.extend(x for x in capsys.readouterr().out.splitlines() if x.startswith("train "))

    def follow(command, env, log, update):
        read()
        assert lines[-1].endswith(": started")
        clock[0] += 7
        return 3 if "model.layout=LL" in command else 0

    monkeypatch.setattr(module, "_follow", follow)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    runs = module._runs(tmp_path, ["LS", "SS", "LL"], [0])
    failed = module._train_all(Path("x.yaml"), runs, [])
    read()
    assert failed is not None
    assert failed[0].name == "LL"
    assert [x for x in lines if "started" not in x and " s" in x][:3] == [
        "train LS: done in 7 s",
        "train SS: done in 7 s",
        f"train LL: failed after 7 s, see {tmp_path / 'LL.log'}",
    ]


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        (None, [], "expected an existing file"),
        ("a: [", [], "expected valid YAML"),
        ("a: 1", ["a.b=1"], "a.b: expected a mapping"),
    ],
)
def test_a_training_file_is_read_before_the_launcher_starts(
    tmp_path, capsys, monkeypatch, text, words, line
):
    monkeypatch.setitem(sys.modules, "hybrid.train.launch", None)
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["train", str(path), *words]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("ablate", "hybrid.ablate.command"),
        ("distill", "hybrid.distill.command"),
        ("search", "hybrid.search.command"),
    ],
)
def test_a_config_is_read_before_slow_imports(tmp_path, capsys, monkeypatch, command, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([command, str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: expected an existing file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_folder_to_write_is_checked_before_slow_imports(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "hybrid.convert", None)
    (tmp_path / "file").touch()
    assert main([command, "somewhere", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_hidden_files_are_not_offered_for_a_missing_config(tmp_path, capsys):
    (tmp_path / ".pre-commit-config.yaml").write_text("{}")
    assert main(["plan", str(tmp_path / "nothere.yaml")]) == 2
    line = "nothere.yaml: expected an existing file, got none; try a file of configs/"
    assert line in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_end_to_end(tmp_path):
    """Two layouts, two steps: every part of the road, without the learning."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hybrid.cli", "quickstart", "--out", str(out)]
    options = [
        "--layouts",
        "LS,L2",
        "training.max_steps=2",
        "training.per_device_train_batch_size=4",
    ]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^ *hybrid train .*model.layout=LSLS", done.stdout, re.MULTILINE)
    assert "Report:" in done.stdout
    assert "recall: LS above L2 at" in done.stdout
    for name in ("LS", "L2"):
        saved = {p.name for p in (out / name).iterdir()}
        assert {"config.json", "model.safetensors", "modeling_hybrid.py"} <= saved
    results = json.loads((out / "results.json").read_text())
    assert [m["name"] for m in results["models"]] == ["LS", "L2"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert list(out.glob("*.png"))
