"""Two gloo processes on the CPU against one process on the same rows."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hybrid.config.options import ConfigError
from hybrid.train import parse_config, run

CONFIGS = Path(__file__).parents[3] / "configs" / "accelerate"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

# accelerate shards on accelerators only; here the state it keeps is told that it may on the CPU too.
SHARDING_ON_CPUS = """
from accelerate import DistributedType
from accelerate.state import AcceleratorState

original = AcceleratorState.__init__

def init(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

AcceleratorState.__init__ = init
"""

# Runs several configs one after the other in the same processes.
DRIVER = f"""
import json, os, sys
{SHARDING_ON_CPUS}
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed
    # a C++ extension that would be compiled for minutes; without it, gloo carries the messages
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from hybrid.train.__main__ import main

for arguments, environment in json.load(open(sys.argv[1])):
    AcceleratorState._reset_state()
    os.environ.update(environment)
    if main(arguments):
        sys.exit(2)
"""


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


@pytest.fixture
def by_two(tmp_path, launch):
    """Run configs (with additions to the environment) in two processes, one after the other."""

    def start(*runs, engine="ddp_cpu"):
        jobs = []
        for number, (values, environment) in enumerate(runs):
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(values))
            jobs.append(([str(path)], environment))
        launcher = (
            *("accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")),
            *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
        )
        launch(launcher, DRIVER, jobs)

    return start


@pytest.fixture
def two_processes(tmp_path):
    """Run a script in two processes, which no launcher ends, with jobs that begin with a config.

    Returns what each wrote to stdout, and what to stderr.
    """

    def start(script, *jobs):
        given = []
        for number, (values, *rest) in enumerate(jobs):
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(values))
            given.append((str(path), *rest))
        (tmp_path / "jobs.json").write_text(json.dumps(given))
        both = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path / "jobs.json")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **both, "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank)},
            )
            for rank in range(2)
        ]
        said = [process.communicate() for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        return tuple(zip(*said, strict=True))

    return start


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def losses_in(folder, key="losses"):
    return [tuple(x) for x in json.loads((folder / "train_result.json").read_text())[key]]


def text_probe(tmp_path):
    """Five rows for two processes; asked after four steps and after eight."""
    return {"probes": {"text": {"source": str(tmp_path / "texts.jsonl"), "rows": 5, "every": 4}}}


def probed_in(folder):
    return json.loads((folder / "train_result.json").read_text())["probes"].get("text", [])


def assert_same_curve(found, expected, rtol=1e-5):
    assert [step for step, _ in found] == [step for step, _ in expected]
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in found]),
        torch.tensor([loss for _, loss in expected]),
        rtol=rtol,
        atol=0,
    )


@pytest.mark.slow
def test_two_processes_are_one_and_continue_each_other(train, by_two, tmp_path):
    held = {"eval_data": str(tmp_path / "texts.jsonl"), "eval_rows": 7}  # of uneven labels
    beside = {**text_probe(tmp_path), **held}
    half, whole = (
        {"max_steps": n, "eval_steps": 4, "per_device_eval_batch_size": 2} for n in (4, 8)
    )
    alone = train("whole", **beside, training=whole)
    train("by_one", **beside, training=half)
    by_two(
        (train.values("by_two", 2, **beside, training=half), {}),
        (train.values("by_one", 2, **beside, training=whole), {}),
    )
    assert_same_curve(losses_in(tmp_path / "by_two"), alone[:4])
    assert_same_curve(losses_in(tmp_path / "by_one"), alone)
    assert_same_curve(*(losses_in(tmp_path / x, "eval_losses") for x in ("by_one", "whole")))
    probed = probed_in(tmp_path / "whole")
    assert [step for step, _ in probed] == [4, 8]
    assert probed[1][1] > 0
    # of five rows of 48 tokens, one token more or less, where two logits are nearly equal
    assert dict(probed_in(tmp_path / "by_one")) == pytest.approx(dict(probed), abs=1.5 / 200)
    assert_same_curve(train("by_two", **beside, training=whole), alone)


SHARING = {"layout": "ZLZ", "hidden_size": 32, "mixers": {"Z": {"type": "softmax_attention"}}}


@pytest.mark.slow
def test_fsdp2_trains_saves_and_continues_as_one_process_does(train, by_two, tmp_path):
    """Full state dicts with AdamW; sharded ones with Muon, whose iterations run in bfloat16."""
    probes = text_probe(tmp_path)
    sharing = {"model": {**SHARING, "shared": {"Z": {"lora_rank": 2}}}}
    adamw, muon = train("adamw", **probes), train("muon", muon=True, **probes)
    fast_muon = {"muon": {"learning_rate": 0.02}}  # so that momentum that is lost shows in losses
    fast = train("fast", **fast_muon)
    tied = train("tied", **sharing)
    full = {**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    sharded = {**FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    half = {"training": {"max_steps": 4}, **probes}
    train("by_one", **half)
    train("fast_by_one", **fast_muon, training={"max_steps": 4})
    by_two(
        (train.values("full", 2, **half), full),
        (train.values("full", 2, **probes), full),
        (train.values("by_one", 2, **probes), full),
        (train.values("fast_by_one", 2, **fast_muon), sharded),
        (train.values("tied_by_two", 2, **sharing), full),
        (train.values("sharded", 2, muon=True, **half), sharded),
        (train.values("sharded", 2, muon=True, **probes), sharded),
    )
    assert_same_curve(losses_in(tmp_path / "full"), adamw)
    assert_same_curve(losses_in(tmp_path / "by_one"), adamw)
    assert_same_curve(losses_in(tmp_path / "tied_by_two"), tied)
    assert_same_curve(losses_in(tmp_path / "sharded"), muon, rtol=1e-3)
    assert_same_curve(losses_in(tmp_path / "fast_by_one"), fast, rtol=2e-4)
    assert (tmp_path / "sharded" / "checkpoint-8" / "pytorch_model_fsdp_0").is_dir()
    for name, alone in (("full", "adamw"), ("sharded", "muon"), ("tied_by_two", "tied")):
        one = AutoModelForCausalLM.from_pretrained(tmp_path / alone).state_dict()
        two = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=2e-3)
        ours, theirs = (probed_in(tmp_path / folder) for folder in (name, alone))
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert dict(ours) == pytest.approx(dict(theirs), abs=1.5 / 200)
    for name in ("full", "sharded"):  # from what two have written after four steps
        shutil.rmtree(tmp_path / name / "checkpoint-8")
    assert_same_curve(train("full", **probes), adamw)
    assert_same_curve(train("sharded", muon=True, **probes), muon, rtol=1e-3)


# Runs each config in a child of its own, so that one may be killed; prints how the children ended.
IN_CHILDREN = f"""
import json, multiprocessing, os, sys
{SHARDING_ON_CPUS}
import hybrid.train.runner  # by the parent, for all children
from hybrid.train.__main__ import main

def start(config, port, more):
    os.environ.update({{**{FSDP2}, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}, MASTER_PORT=port)
    exec(more.get(os.environ["RANK"], ""), {{}})
    sys.exit(main([config]))

ended = []
for job in json.load(open(sys.argv[1])):
    child = multiprocessing.get_context("fork").Process(target=start, args=job)
    child.start()
    child.join()
    ended.append(child.exitcode)
print(json.dumps(ended))
"""
KILLED_IN_STEP_6 = """
import os, signal
from hybrid.train.trainer import HybridTrainer
original = HybridTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
HybridTrainer.training_step = step
"""
KILLED_IN_CHECKPOINT = """
import os, signal, torch
original = torch.save
def save(value, file, *args, **kwargs):
    if os.path.isdir("{folder}/optimizer_0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(value, file, *args, **kwargs)
torch.save = save
"""


@pytest.mark.slow
def test_sharded_runs_go_on_to_the_bit_after_one_of_two_processes_is_killed(
    train, two_processes, tmp_path
):
    """In a step, then in a checkpoint; the other process ends by itself, with an error."""
    model = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24}
    model |= {"num_hidden_layers": 2, "num_attention_heads": 2, "attention_dropout": 0.1}
    more = {"model": model, "muon": {"learning_rate": 0.02}}
    more["training"] = {"max_steps": 6, "save_steps": 2}
    whole, broken = (train.values(out, 2, **more) for out in ("whole", "broken"))
    half = tmp_path / "broken" / "checkpoint-6"
    ended, said = two_processes(
        IN_CHILDREN,
        (whole, free_port(), {}),
        (broken, free_port(), {1: KILLED_IN_STEP_6}),
        (broken, free_port(), {0: KILLED_IN_CHECKPOINT.format(folder=half)}),
        (broken, free_port(), {}),
    )
    assert [json.loads(lines.splitlines()[-1]) for lines in ended] == [[0, 1, -9, 0], [0, -9, 1, 0]]
    assert re.findall(r"resuming from .*(checkpoint-\d)", said[0]) == ["checkpoint-4"] * 2
    assert f"skipping {half}: it is incomplete" in said[0]
    result = json.loads((tmp_path / "broken" / "train_result.json").read_text())
    assert result["resumed_from"] == 4
    assert losses_in(tmp_path / "broken") == losses_in(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_rows_and_train_as_one_does(train, by_two, tmp_path):
    model = {"layout": "LSMW", "hidden_size": 32, "mixers": {"M": {"head_dim": 16}}}
    held = {"eval_data": str(tmp_path / "texts.jsonl"), "eval_rows": 9}
    more = {"model": model, **held, "training": {"eval_steps": 4, "per_device_eval_batch_size": 8}}
    whole = train("whole", **more)
    shared = {**more, "context_parallel": 2}
    by_two(
        (train.values("shared", 4, **shared), {}),
        (
            train.values("sharded", 4, **shared),
            {**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        ),
    )
    for out in ("shared", "sharded"):
        assert_same_curve(losses_in(tmp_path / out), whole)
        assert_same_curve(*(losses_in(tmp_path / x, "eval_losses") for x in (out, "whole")))


MACHINE = """
import json, os, sys
from hybrid.train.__main__ import main
for config, overrides, status in json.load(open(sys.argv[1])):
    overrides = [text.format(machine=os.environ["RANK"]) for text in overrides]
    if (found := main([config, *overrides])) != status:
        sys.exit(f"{overrides}: {found}")
"""


@pytest.mark.slow
def test_machines_without_a_common_folder_are_told_so(train, two_processes, tmp_path):
    """Each process takes itself for the only one of a machine."""
    own = f"training.output_dir={tmp_path}/machine{{machine}}"
    quick = train.values("shared", 2, training={"max_steps": 2, "save_steps": 1})
    _, said = two_processes(
        MACHINE,
        (quick, [own], 2),
        (quick, ["training.max_steps=1"], 0),
        (quick, [], 0),
        (quick, [own, "training.save_strategy=no"], 0),
    )
    for lines in said:
        (error,) = [line for line in lines.splitlines() if "training.output_dir" in line]
        assert f"got {tmp_path}/machine0, in which process 1 does not see the files of" in error
        assert "expected storage shared by all machines" in error
        assert "Traceback" not in lines
    assert "resuming from" in said[0]
    assert (tmp_path / "machine0" / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*/.shared-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "expected a divisor of the 1 processes, got 2"),
        ({"context_parallel": 0}, "context_parallel: expected at least 1, got 0"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(train, change, said):
    with pytest.raises(ConfigError, match=said):
        train("refused", **{"context_parallel": 2, **change})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_saves_and_continues_as_one_process_does(train, by_two, tmp_path, stage):
    pytest.importorskip("deepspeed")
    # ZeRO-3 draws the weights of a new model in another order, so both start from the same ones
    train("start", training={"max_steps": 1})
    model = {"path": str(tmp_path / "start")}
    one = train("one", model=model)
    by_two(
        (train.values("two", 2, model=model, training={"max_steps": 4}), {}),
        (train.values("two", 2, model=model), {}),
        engine=f"deepspeed_zero{stage}",
    )
    assert_same_curve(losses_in(tmp_path / "two"), one)
    assert (tmp_path / "two" / "checkpoint-8" / "global_step8").is_dir()
    with pytest.raises(
        ConfigError,
        match="expected a run with DeepSpeed, which wrote the checkpoint, got one without",
    ):
        train("two", model=model)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_sharding_on_the_cpu_is_refused_where_accelerate_would_ignore_it(train, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="expected an accelerator for FSDP, got cpu"):
        train("refused")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1
