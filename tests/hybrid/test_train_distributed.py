"""Two gloo processes on the CPU against one process on the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hybrid.options import ConfigError
from hybrid.train import parse_config, run

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

# Runs several configs one after the other in the same processes. accelerate shards on accelerators
# only; here the state it keeps is told that it may shard on the CPU too.
DRIVER = """
import json, os, sys
from accelerate import DistributedType
from accelerate.state import AcceleratorState

original = AcceleratorState.__init__

def init(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

AcceleratorState.__init__ = init
from hybrid.train.__main__ import main

for arguments, environment in json.load(open(sys.argv[1])):
    AcceleratorState._reset_state()
    os.environ.update(environment)
    if main(arguments):
        sys.exit(2)
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(tmp_path):
    """A run of 8 steps of 4 rows, in this process; returns its losses."""
    lines = (json.dumps({"text": f"{i} by {i} is {i * i}. " * (1 + i % 5)}) for i in range(300))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))

    def values(out, rows=4, **more):
        training = {
            "output_dir": str(tmp_path / out),
            "max_steps": 8,
            "save_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": rows,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
            **more.pop("training", {}),
        }
        return {
            "model": {"layout": "LS", "hidden_size": 32},
            "data": str(tmp_path / "texts.jsonl"),
            "sequence_length": 48,
            "device": "cpu",
            **more,
            "training": training,
        }

    def here(out, rows=4, **more):
        return run(parse_config(values(out, rows, **more))).losses

    here.values = values
    return here


def by_two(tmp_path, *runs):
    """Run configs (with additions to the environment) in two processes, one after the other."""
    jobs = []
    for number, (values, environment) in enumerate(runs):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(values))
        jobs.append(([str(path)], environment))
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(CONFIGS / "ddp_cpu.yaml")),
            *(str(tmp_path / "driver.py"), str(tmp_path / "jobs.json")),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def losses_in(folder):
    return [
        tuple(entry) for entry in json.loads((folder / "train_result.json").read_text())["losses"]
    ]


def assert_same_curve(found, expected, rtol=1e-5):
    assert [step for step, _ in found] == [step for step, _ in expected]
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in found]),
        torch.tensor([loss for _, loss in expected]),
        rtol=rtol,
        atol=0,
    )


@pytest.mark.slow
def test_two_processes_are_one_and_continue_each_other(train, tmp_path):
    whole = train("whole")
    train("by_one", training={"max_steps": 4})
    by_two(
        tmp_path,
        (train.values("by_two", 2, training={"max_steps": 4}), {}),
        (train.values("by_one", 2), {}),
    )
    assert_same_curve(losses_in(tmp_path / "by_two"), whole[:4])
    assert_same_curve(losses_in(tmp_path / "by_one"), whole)
    assert_same_curve(train("by_two"), whole)


@pytest.mark.slow
def test_fsdp2_trains_saves_and_continues_as_one_process_does(train, tmp_path):
    """Full state dicts with AdamW; sharded ones with Muon, whose iterations run in bfloat16."""
    adamw, muon = train("adamw"), train("muon", muon=True)
    full = {**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    sharded = {**FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    half = {"training": {"max_steps": 4}}
    by_two(
        tmp_path,
        (train.values("full", 2, **half), full),
        (train.values("full", 2), full),
        (train.values("sharded", 2, muon=True, **half), sharded),
        (train.values("sharded", 2, muon=True), sharded),
    )
    assert_same_curve(losses_in(tmp_path / "full"), adamw)
    assert_same_curve(losses_in(tmp_path / "sharded"), muon, rtol=1e-3)
    assert (tmp_path / "sharded" / "checkpoint-8" / "pytorch_model_fsdp_0").is_dir()
    for name, alone in (("full", "adamw"), ("sharded", "muon")):
        one = AutoModelForCausalLM.from_pretrained(tmp_path / alone).state_dict()
        two = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=2e-3)


def test_sharding_on_the_cpu_is_refused_where_accelerate_would_ignore_it(train, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="shards \\(FSDP\\) on accelerators, not on cpu"):
        train("refused")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1
