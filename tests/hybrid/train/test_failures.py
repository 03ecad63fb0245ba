"""What a training process says when it ends early, to the user and to launchers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hybrid.train import parse_config, run
from hybrid.train.failures import OutOfMemory, failed, memory_refusals
from hybrid.train.trainer import HybridTrainer

CONFIGS = Path(__file__).parents[3] / "configs" / "accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = ["--config_file", str(CONFIGS / "ddp_cpu.yaml"), "--main_process_port", "0"]
RUN = ["-m", "hybrid.train", "run.yaml"]


@pytest.fixture
def values(tmp_path, monkeypatch):
    """A run that lasts until somebody ends it, in a folder with its file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("a text of some length\n" * 60)
    values = {
        "model": {"layout": "LS", "hidden_size": 16, "mixers": {"S": {"num_heads": 2}}},
        "tokenizer": "bytes",
        "data": "my.txt",
        "sequence_length": 16,
        "training": {
            "max_steps": 10**6,
            "per_device_train_batch_size": 6,
            "logging_steps": 10**6,
            "output_dir": "out",
            "use_cpu": True,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return values


ALLOCATION = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB",
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried",
]


@pytest.mark.parametrize("text", ALLOCATION)
def test_a_step_without_memory_says_what_takes_less(values, monkeypatch, text):
    def step(self, *args, **kwargs):
        raise RuntimeError(text)

    monkeypatch.setattr(HybridTrainer, "training_step", step)
    with pytest.raises(OutOfMemory) as caught:
        run(parse_config(values))
    (line,) = caught.value.mistakes
    assert "training.per_device_train_batch_size: expected rows that fit in memory, got 6" in line
    # 6 x 1 = 3 x 2 rows of a step: the run may be continued
    assert "try 3 with training.gradient_accumulation_steps=2, which continues this run" in line
    assert text.split(" Tried")[0] in line


def test_one_row_cannot_be_fewer(values):
    training = values["training"] | {"per_device_train_batch_size": 1}
    config = parse_config(values | {"training": training | {"gradient_checkpointing": True}})
    with (
        pytest.raises(OutOfMemory, match="; try a sequence_length below 16"),
        memory_refusals(config),
    ):
        raise RuntimeError(ALLOCATION[0])


def test_another_error_of_a_step_keeps_its_traceback(values):
    with (
        pytest.raises(RuntimeError, match="a fault") as caught,
        memory_refusals(parse_config(values)),
    ):
        raise RuntimeError("a fault")
    assert not isinstance(caught.value, OutOfMemory)


def test_the_reason_is_left_for_the_launcher(tmp_path, monkeypatch, capsys):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert failed("error: a", silent=True) == 2
    assert not capsys.readouterr().err
    assert json.loads(path.read_text())["message"] == "error: a"


def launched(words, **options):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, **options)


MISTAKES = {
    "a key": (["training.max_step=2"], "training.max_step: unknown key, did you mean 'max_steps'?"),
    "a file": (["data=gone.txt"], "gone.txt"),
    "an import": (["--import", "bad.py"], r"bad\.py: line 1: NameError: name 'x' is not defined"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_under_accelerate_launch(values, tmp_path, case):
    """`--quiet` keeps the traceback of accelerate's own away."""
    words, message = MISTAKES[case]
    (tmp_path / "bad.py").write_text("x")
    process = launched([*ACCELERATE, "--quiet", *RUN, *words])
    text = process.communicate()[1]
    assert process.returncode
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)


@pytest.mark.slow
def test_two_processes_say_it_once_and_the_launcher_ends_with_it(values):
    process = launched([*ACCELERATE, *TWO, *RUN, "training.max_step=2"])
    text = process.communicate()[1]
    assert process.returncode
    assert len(re.findall("^error: .*max_step", text, re.MULTILINE)) == 1
    # the report of torch's launcher, after its own traceback
    *_, root = text.split("Root Cause")
    assert "error: run.yaml: training.max_step: unknown key" in root
    assert not re.search(r'File ".*/hybrid/', text)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], TWO], ids=["one process", "two processes"])
def test_ctrl_c_under_accelerate_launch_keeps_the_step(values, tmp_path, engine):
    """The terminal signals all processes of a group, the launcher among them."""
    process = launched([*ACCELERATE, *engine, *RUN, "save_minutes=0.001"], start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("out/checkpoint-*/manifest.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate()[1]  # until the last process has ended
    (line,) = [line for line in text.splitlines() if line.startswith("hybrid train: ")]
    step = re.search(r"interrupted after step (\d+); out/checkpoint-\1 is kept: run the same", line)
    assert step, line
    assert (tmp_path / f"out/checkpoint-{step[1]}" / "manifest.json").is_file()
    assert not re.search(r'File ".*/hybrid/', text)
