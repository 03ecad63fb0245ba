"""The command line, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from hybrid.cli import main
from hybrid.quickstart import find_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def test_layout_prints_a_table(capsys):
    assert main(["layout", "[LS]2 M3"]) == 0
    out = capsys.readouterr().out
    assert "[LS]2M3" in out or "[LS]2MMM" in out
    assert "L lightning_attention + S" in out
    assert "5 layers" in out


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
        (["--config", "nowhere.yaml"], "no such file"),
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
    assert "accelerate launch -m hybrid.train" in done.stdout
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
