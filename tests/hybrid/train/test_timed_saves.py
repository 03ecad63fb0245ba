"""Checkpoints by time: when one is due, on how many processes, and what a config may say of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from hybrid.config.options import ConfigError
from hybrid.train import interrupt, parse_config, run, timed_saves
from hybrid.train.timed_saves import MINUTES, TimedSaves, minutes_between_saves


@pytest.fixture
def values(tmp_path):
    return {
        "model": {"layout": "L", "hidden_size": 16, "mixers": {"L": {"num_heads": 2}}},
        "data": "stdlib",
        "sequence_length": 16,
        "device": "cpu",
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 1,
        },
    }


def checkpoints(values):
    folder = Path(values["training"]["output_dir"])
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_run_saves_when_the_time_has_passed_and_keeps_the_newest(values):
    run(parse_config(values | {"save_minutes": 1e-9}))
    assert checkpoints(values) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_without_a_word_on_saving_saves_every_ten_minutes(values, monkeypatch):
    clock = iter(range(0, 10**6, 250))  # seconds: a step is 250 of them, and so is a save
    monkeypatch.setattr(timed_saves, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    values["training"]["max_steps"] = 8
    values["training"]["save_total_limit"] = 9
    run(parse_config(values))
    # due 750 s after the last one; the run saves its last step in any case
    assert checkpoints(values) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("minutes", "training", "expected"),
    [
        (None, {}, MINUTES),
        (None, {"save_steps": 100}, 0),
        (None, {"save_strategy": "epoch"}, 0),
        (None, {"save_strategy": "no"}, 0),
        (3.0, {"save_strategy": "no"}, 0),
        (3.0, {"save_steps": 100}, 3.0),
        (0.0, {}, 0),
    ],
)
def test_minutes_are_the_config_s_or_ten_where_it_is_silent(minutes, training, expected):
    assert minutes_between_saves(minutes, training) == expected


@pytest.mark.parametrize("wrong", [-1, "soon", True, float("nan"), 1e30])
def test_minutes_that_cannot_be_meant_are_refused(values, wrong):
    with pytest.raises(ConfigError, match="save_minutes"):
        parse_config(values | {"save_minutes": wrong})


def test_several_processes_save_once(monkeypatch):
    """Each reads the agreed number one step later; the step after a save asks for no second one."""
    monkeypatch.setattr(interrupt.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(interrupt.dist, "all_reduce", lambda *_: None)
    now = [0.0]
    monkeypatch.setattr(timed_saves, "time", SimpleNamespace(monotonic=lambda: now[0]))
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    saves, callback = [], TimedSaves(1.0)
    callback.on_train_begin(args, None, TrainerControl())
    for step in range(1, 8):
        now[0] += 25.0
        control = TrainerControl()
        callback.on_step_end(args, None, control)
        if control.should_save:
            saves.append(step)
            callback.on_save(args, None, control)
    assert saves == [4]
