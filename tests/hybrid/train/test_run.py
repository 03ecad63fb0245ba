import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState

from hybrid.config.options import ConfigError
from hybrid.data.mixture import Mixture
from hybrid.train import parse_config, run
from hybrid.train.__main__ import main
from hybrid.train.checkpoints import (
    MANIFEST,
    CheckpointError,
    damage,
    newest_whole,
    numbered,
    remove_old,
    write_manifest,
    writing,
)
from hybrid.train.expert_load import ExpertLoad
from hybrid.train.runner import prepare_run

STEPS, SAVE = 10, 3


@pytest.fixture
def values(tmp_path):
    """A run of seconds: two sources, dropout, a schedule; a log at every step."""
    for name in "ab":
        lines = (json.dumps({"text": f"{name} {i} " * (3 + i % 7)}) for i in range(200))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "model": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_dropout": 0.1,
        },
        "data": [
            {"source": str(tmp_path / "a.jsonl"), "weight": 2},
            {"source": str(tmp_path / "b.jsonl"), "streaming": True},
        ],
        "sequence_length": 32,
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "save_steps": SAVE,
            "logging_steps": 1,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "disable_tqdm": True,
        },
    }


def changed(values, **training):
    return parse_config({**values, "training": {**values["training"], **training}})


@pytest.mark.compat
def test_a_run_leaves_a_checkpoint_that_transformers_loads(values, tmp_path):
    result = run(parse_config(values))
    folder = tmp_path / "out"
    assert result.steps == STEPS
    assert result.tokens == STEPS * 3 * 2 * 32
    assert [step for step, _ in result.losses] == list(range(1, STEPS + 1))
    assert result.losses[-1][1] < result.losses[0][1]
    written = json.loads((folder / "train_result.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(result)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == result.parameters
    assert AutoTokenizer.from_pretrained(folder).decode(list(b"text")) == "text"
    resolved = yaml.safe_load((folder / "train_config.yaml").read_text())
    assert parse_config(resolved) == parse_config(values)
    assert damage(folder / f"checkpoint-{STEPS}") is None


@pytest.mark.compat
def test_a_hybrid_trains_and_is_evaluated(values, tmp_path):
    values["model"] = {"layout": "LS", "hidden_size": 32}
    values["eval_data"] = str(tmp_path / "a.jsonl")
    values["eval_rows"] = 5
    result = run(changed(values, eval_steps=4))
    assert [step for step, _ in result.eval_losses] == [4, 8, 10]
    assert result.eval_losses[1][1] < result.eval_losses[0][1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.layout == "LS"


def test_utilisation_is_flops_against_the_peak(values, monkeypatch):
    values["model"] = {"layout": "LS", "hidden_size": 32}
    trainer = prepare_run(parse_config(values))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    # Two FLOPs a parameter forward, three times that with the backward, and the mixing on top.
    assert 6 * parameters < trainer.flops_per_token < 9 * parameters
    assert trainer.utilisation(1e6) is None
    monkeypatch.setattr(trainer, "peak_flops", trainer.flops_per_token * 4e6)
    assert trainer.utilisation(1e6) == pytest.approx(0.25)
    logs = {"loss": 1.0}
    trainer._clock = (0.0, -1)
    trainer.log(logs)
    assert logs["mfu"] == pytest.approx(logs["tokens_per_second"] / 4e6)


def test_the_held_out_loss_is_the_mean_over_all_labels(values, tmp_path):
    """Seven rows of one document each, in batches of three: the labels are as uneven as the texts."""
    lines = (json.dumps({"text": "ab" * (1 + 2 * i)}) for i in range(7))
    (tmp_path / "held.jsonl").write_text("\n".join(lines))
    values |= {"eval_data": str(tmp_path / "held.jsonl"), "eval_rows": 7, "packing": "none"}
    trainer = prepare_run(changed(values, per_device_eval_batch_size=3))
    found = trainer.evaluate()["eval_loss"]
    total = labels = 0
    for i in range(7):
        row = trainer.data_collator([trainer.eval_dataset[i]])
        count = int((row["labels"][:, 1:] != -100).sum())
        total += trainer.model.eval()(**row).loss.item() * count
        labels += count
    assert labels == sum(2 + 4 * i for i in range(7))
    assert found == pytest.approx(total / labels, rel=1e-6)


def test_what_is_not_training_is_not_timed(values, tmp_path, monkeypatch):
    """On a clock that only rows move: a second each, a thousand for one that is held out.

    Before its clock starts, a process fetches two batches of three rows for its first step, and one
    ahead. So of four steps of six rows 6 and 9 seconds are those of the first and the last two.
    """
    now = [0.0]
    monkeypatch.setattr("hybrid.train.trainer.time.perf_counter", lambda: now[0])
    original = Mixture.__getitem__

    def row(self, index):
        now[0] += 1 if len(self) > 5 else 1000
        return original(self, index)

    monkeypatch.setattr(Mixture, "__getitem__", row)
    values |= {"eval_data": str(tmp_path / "a.jsonl"), "eval_rows": 5}
    changes = {"eval_steps": 1, "logging_steps": 2, "save_steps": 4}
    for start, end in ((0, 4), (4, 8)):  # the second goes on where the first one ended
        trainer = prepare_run(changed(values, max_steps=end, **changes))
        folder = tmp_path / "out" / f"checkpoint-{start}"
        trainer.train(resume_from_checkpoint=str(folder) if start else None)
        assert trainer.step_seconds == 6 + 9
        speeds = [x["tokens_per_second"] for x in trainer.state.log_history if "loss" in x]
        assert speeds[-2:] == [2 * 6 * 32 / 6, 2 * 6 * 32 / 9]
    totals = trainer.state.log_history[-1]
    assert "train_runtime" in totals
    assert not {"train_loss", "train_samples_per_second"} & set(totals)


@pytest.mark.parametrize("logging_steps", [2, 100])
def test_steps_after_the_last_log_are_timed_too(values, monkeypatch, logging_steps):
    """On a clock that only steps move: three of them, of a second each."""
    now = [0.0]
    monkeypatch.setattr("hybrid.train.trainer.time.perf_counter", lambda: now[0])
    trainer = prepare_run(changed(values, max_steps=3, logging_steps=logging_steps))
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        now[0] += 1 / trainer.args.gradient_accumulation_steps
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert trainer.step_seconds == pytest.approx(3)


def test_epochs_are_those_of_the_data(values):
    values["data"] = values["data"][:1]
    values["training"].pop("max_steps")
    trainer = prepare_run(changed(values, num_train_epochs=2, save_strategy="epoch"))
    rows = trainer.train_dataset.sources[0].per_epoch
    assert (trainer.args.save_strategy, trainer.args.save_steps) == ("steps", -(-rows // 6))
    values["data"][0]["streaming"] = True
    with pytest.raises(
        ConfigError, match=r"training.save_strategy: expected steps for sources without an end"
    ):
        prepare_run(changed(values, max_steps=4, save_strategy="epoch"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_breaks_ends_the_run_in_one_line(values, tmp_path, capsys, workers):
    lines = [json.dumps({"text": "a" * 40})] * 9 + ["", '{"text": null}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    more = ["training.save_steps=1", f"training.dataloader_num_workers={workers}"]
    assert main([str(path), *more]) == 2
    said = capsys.readouterr().err
    (line,) = [x for x in said.splitlines() if "error" in x]
    assert "of source 1: row 9 of" in line
    assert "b.jsonl, line 11): expected text in column 'text', got null" in line
    assert line.endswith("run the same command again: earlier checkpoints are kept")
    assert "Traceback" not in said
    assert newest_whole(tmp_path / "out", print) is not None


def test_an_optimizer_that_is_not_installed_is_named_before_the_run(values):
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match="training: You need to install `bitsandbytes`"):
        prepare_run(changed(values, optim="adamw_bnb_8bit"))


def test_the_number_of_steps_may_come_from_epochs(values):
    values["data"] = values["data"][:1]
    values["training"].pop("max_steps")
    trainer = prepare_run(changed(values, num_train_epochs=2))
    rows = trainer.train_dataset.sources[0].per_epoch
    assert trainer.args.max_steps == -(-2 * rows // 6)
    values["data"][0]["streaming"] = True
    with pytest.raises(
        ConfigError,
        match=r"training.max_steps: expected a number of steps for sources without an end",
    ):
        prepare_run(changed(values, num_train_epochs=2))


def test_a_mistake_in_the_data_names_the_file(values, tmp_path, capsys):
    values["data"] = [{"source": str(tmp_path / "none.jsonl")}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main([str(path)]) == 2
    assert f"error: {path}: data[0]" in capsys.readouterr().err


@pytest.mark.parametrize(("lines", "times"), [(1, 24), (40, None)])
def test_data_that_repeats_within_a_step_is_named(values, tmp_path, capsys, lines, times):
    (tmp_path / "short.txt").write_text("A line of text of 32 characters.\n" * lines)
    short = {"data": str(tmp_path / "short.txt"), "sequence_length": 64}
    prepare_run(changed(values | short, max_steps=3, per_device_train_batch_size=4))  # 24 rows
    warned = [line for line in capsys.readouterr().err.splitlines() if "short.txt" in line]
    if times is None:
        assert not warned
    else:
        assert f"1 row of text, which this run reads {times} times" in warned[0]


def test_a_run_starts_from_a_checkpoint_folder(values, tmp_path):
    run(changed(values, max_steps=2))
    start = {**values, "model": {"path": str(tmp_path / "out")}}
    trainer = prepare_run(changed(start, output_dir=str(tmp_path / "second")))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=0)


# Resuming

KILLED_AT_ROW = """
from hybrid.data.mixture import Mixture
original = Mixture.__getitem__
def row(self, index):
    if index == {row}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, index)
Mixture.__getitem__ = row
"""
KILLED_WHILE_SAVING = """
import torch
original, saved = torch.save, []
def save(value, file, *args, **kwargs):
    saved.append(file)
    if len(saved) == {number}:
        open(file, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(value, file, *args, **kwargs)
torch.save = save
"""


def killed_run(path, how):
    """A run in a process of its own that is ended by SIGKILL."""
    code = f"import os, signal\n{how}\nfrom hybrid.train.__main__ import main\nmain(['{path}'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "start"),
    [
        pytest.param(KILLED_AT_ROW.format(row=44), 6, id="in-step-8"),
        # Each checkpoint holds four files of torch.save: the sixth is in the second checkpoint.
        pytest.param(KILLED_WHILE_SAVING.format(number=6), 3, id="while-saving-step-6"),
    ],
)
def test_after_kill_9_the_losses_are_those_of_an_uninterrupted_run(values, tmp_path, how, start):
    whole = run(changed(values, output_dir=str(tmp_path / "whole")))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    killed_run(path, how)
    resumed = run(parse_config(values))
    assert resumed.resumed_from == start
    assert resumed.losses == whole.losses
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("out", "whole")
    )
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_finished_run_started_again_computes_nothing(values):
    first = run(parse_config(values))
    again = run(parse_config(values))
    assert (again.resumed_from, again.tokens) == (STEPS, 0)
    assert again.losses == first.losses


def test_a_finished_run_started_again_keeps_its_files_and_says_how_to_go_on(
    values, tmp_path, capsys
):
    first = run(parse_config(values))
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main([str(path)]) == 0
    said = capsys.readouterr()
    line = f"{out}: finished already ({STEPS} of {STEPS} steps); raise training.max_steps to go on"
    assert (line in said.err, said.out) == (True, "")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert json.loads((out / "train_result.json").read_text())["tokens"] == first.tokens > 0
    more = run(changed(values, max_steps=STEPS + 1))
    assert (more.resumed_from, more.steps) == (STEPS, STEPS + 1)


def test_a_run_that_ended_before_its_result_was_written_is_completed(values, tmp_path):
    first = run(parse_config(values))
    (tmp_path / "out" / "train_result.json").unlink()
    run(parse_config(values))
    stored = json.loads((tmp_path / "out" / "train_result.json").read_text())
    assert stored["losses"] == [list(entry) for entry in first.losses]


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "no manifest"])
def test_a_checkpoint_that_is_not_whole_is_skipped_in_one_line(values, tmp_path, capsys, harm):
    run(changed(values, save_total_limit=2))
    newest = tmp_path / "out" / f"checkpoint-{STEPS}"
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    size = len(content)
    if harm == "cut":
        weights.write_bytes(content[:100])
    elif harm == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        (newest / ("optimizer.pt" if harm == "remove" else "manifest.json")).unlink()
    expected = {
        "cut": f"model.safetensors: expected {size} bytes, got 100",
        "flip": "model.safetensors: expected the recorded checksum",
        "remove": "optimizer.pt: expected in the checkpoint, got none",
        "no manifest": "it is incomplete",
    }[harm]
    capsys.readouterr()
    resumed = run(changed(values, save_total_limit=2))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "skipping" in x]
    assert line.startswith(f"skipping {newest}: {expected}")
    assert resumed.resumed_from == 9
    assert damage(newest) is None


def test_no_byte_of_a_manifest_may_change(tmp_path):
    (tmp_path / "weights").write_bytes(b"1234")
    write_manifest(tmp_path, {"training.seed": 42, "model": {"layout": "LS", "by": {2: 0, 10: 0}}})
    assert damage(tmp_path) is None
    path = tmp_path / MANIFEST
    content = path.read_bytes()
    harmless = []
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        if damage(tmp_path) is None:
            harmless.append(changed)
    # white space between values says nothing
    assert all(json.loads(x) == json.loads(content) for x in harmless)
    for text in ("", "{}", "[]", '{"format": "hybrid-checkpoint-2"}', "null"):
        path.write_text(text)
        assert MANIFEST in damage(tmp_path)


def test_other_data_under_the_same_name_is_another_run(values, tmp_path):
    run(changed(values, max_steps=3))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n" + json.dumps({"text": "more " * 40}))
    with pytest.raises(ConfigError) as caught:
        run(changed(values))
    lines = caught.value.mistakes
    assert any(f"data[0] ({tmp_path}/a.jsonl): rows: was " in line for line in lines)
    assert not any("b.jsonl" in line for line in lines)


def test_another_optimizer_cannot_go_on(values):
    run(changed(values, max_steps=3))
    values["decay_norms"] = True
    with pytest.raises(ConfigError) as caught:
        run(changed(values, optim="adafactor"))
    assert [line.split(":")[0] for line in caught.value.mistakes] == [
        "decay_norms",
        "training.optim",
    ]


def test_a_checkpoint_of_another_run_is_refused_with_the_keys_that_differ(values):
    run(changed(values, max_steps=3))
    values["sequence_length"] = 64
    values["model"] = values["model"] | {"num_hidden_layers": 1}
    with pytest.raises(ConfigError) as caught:
        run(changed(values, seed=7))
    assert caught.value.mistakes == [
        "model.num_hidden_layers: was 2, is 1",
        "sequence_length: was 32, is 64",
        "training.data_seed: was 42, is 7",
        "training.seed: was 42, is 7",
    ]
    assert "belongs to a different run" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        # What torch.save says when the disk is full.
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 225536 vs 225424"),
    ],
)
def test_old_checkpoints_go_only_when_the_new_one_is_whole(values, tmp_path, monkeypatch, error):
    """A disk that fills up in the third checkpoint: the second stays, the half-written one goes."""
    real, calls = torch.save, []

    def full(value, file, *args, **kwargs):
        calls.append(file)
        if len(calls) == 10:
            raise error
        real(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*checkpoint-9 .*(No space left|pos 225536)"
    ):
        run(changed(values, save_total_limit=1))
    monkeypatch.undo()
    out = tmp_path / "out"
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["checkpoint-6"]
    assert newest_whole(out, print) == out / "checkpoint-6"


def test_what_was_cut_off_is_not_kept_in_place_of_a_whole_one(values, tmp_path):
    """Checkpoints that a killed run left, half of them; then one more is written, of an earlier step."""
    run(changed(values, max_steps=6, save_total_limit=2))
    out = tmp_path / "out"
    for half in ("checkpoint-4", "checkpoint-20"):
        (out / half).mkdir()
    resumed = run(changed(values, max_steps=8, save_steps=8, save_total_limit=2))
    assert resumed.resumed_from == 6
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        *("checkpoint-6", "checkpoint-8"),
        "checkpoint-20",
    }


def test_a_checkpoint_is_on_the_disk_before_its_manifest_says_so(tmp_path, monkeypatch):
    synced = []
    (tmp_path / "deeper").mkdir()
    for path in (tmp_path / "weights", tmp_path / "deeper" / "weights"):
        path.write_bytes(b"1234")
    expected = {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}
    replace, sync = os.replace, os.fsync

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def check(unfinished, path):
        assert expected | {unfinished.stat().st_ino} <= {*synced}
        replace(unfinished, path)
        synced.clear()

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    write_manifest(tmp_path, {})
    assert synced == [tmp_path.stat().st_ino]  # the manifest's name, before older ones are removed
    assert damage(tmp_path) is None


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_checkpoint_that_lacks_bytes_does_not_take_the_place_of_a_whole_one(tmp_path, harm):
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"1234")
        write_manifest(folder, {})
    weights = tmp_path / "checkpoint-2" / "weights"
    weights.write_bytes(b"12") if harm == "cut" else weights.unlink()
    remove_old(tmp_path / "checkpoint-3", 2, None)
    assert [p.name for p in numbered(tmp_path)] == ["checkpoint-3", "checkpoint-1"]


@pytest.fixture
def filed_one_by_one(values):
    """A model whose experts transformers files one by one, and has as one tensor in memory."""
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"model_type": "qwen3_moe", **sizes, "num_key_value_heads": 2, **experts}
    return {**values, "model": model}


def test_experts_that_are_filed_one_by_one_are_continued(filed_one_by_one):
    """`Trainer` alone would leave them as they are at the start of a run."""
    values = filed_one_by_one
    more = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    whole = run(changed(values, max_steps=4, **more))
    shutil.rmtree(Path(values["training"]["output_dir"]))
    run(changed(values, max_steps=2, **more))
    continued = run(changed(values, max_steps=4, **more))
    assert continued.resumed_from == 2
    assert continued.losses == whole.losses


def test_experts_that_are_filed_one_by_one_are_those_of_the_best_checkpoint(
    filed_one_by_one, tmp_path
):
    trainer = prepare_run(parse_config(filed_one_by_one))
    trainer.save_model(str(tmp_path / "best"))
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    best = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for tensor in trainer.model.parameters():
        tensor.data.zero_()
    trainer._load_best_model()
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], best[name]) for name in best)


def test_weights_that_a_checkpoint_of_another_engine_lacks_are_named(values, tmp_path):
    """As FSDP2 writes it, but of a model of which one name has changed."""
    run(changed(values, max_steps=3))
    folder = tmp_path / "out" / "checkpoint-3"
    weights = load_file(folder / "model.safetensors")
    weights["model.normal.weight"] = weights.pop("model.norm.weight")
    torch.save(weights, folder / "pytorch_model_fsdp.bin")
    (folder / "model.safetensors").unlink()
    write_manifest(folder, json.loads((folder / MANIFEST).read_text())["run"])
    message = r"checkpoint-3 cannot be resumed: .*another training.output_dir\) has 2 mistakes"
    with pytest.raises(ConfigError, match=message) as caught:
        run(parse_config(values))
    assert caught.value.mistakes == [
        "model.norm.weight: expected in the checkpoint, got none",
        "model.normal.weight: expected none, got a weight",
    ]


def test_a_disk_that_is_full_under_another_process_is_said_by_that(monkeypatch, capsys):
    def fail(config):
        with writing(Path("checkpoint-3")):
            cause = OSError(28, "No space left on device")
            raise CheckpointException("save", {1: (cause, StackSummary())})

    monkeypatch.setattr("hybrid.train.runner.run", fail)
    monkeypatch.setattr("hybrid.train.config.load_config", lambda *args: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["x.yaml"]) == 2
    assert (
        "error: cannot write checkpoint-3 (OSError: [Errno 28] No space left"
        in capsys.readouterr().err
    )


def test_a_disk_that_is_full_at_the_end_is_said_too(values, tmp_path, monkeypatch):
    run(changed(values, max_steps=3))
    result = tmp_path / "out" / "train_result.json"
    earlier = json.dumps({"steps": 2})  # of a run that was to end before
    result.write_text(earlier)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match=r"cannot write .*out \(.*No space left"):
        run(changed(values, max_steps=3))
    monkeypatch.undo()
    assert result.read_text() == earlier


def failing(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_half_a_line_of_the_load_of_experts_is_dropped(tmp_path):
    path = tmp_path / "expert_load.jsonl"
    whole = "".join(json.dumps({"step": step, "load": {}}) + "\n" for step in (1, 2, 3))
    path.write_text(whole + '{"step": 4, "lo')
    args, state = SimpleNamespace(output_dir=str(tmp_path)), TrainerState(global_step=2)
    ExpertLoad().on_train_begin(args, state, TrainerControl())
    assert path.read_text() == whole[: whole.index('{"step": 3')]


def test_a_loss_that_is_no_number_ends_the_run(values):
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got nan at step"):
        run(changed(values, learning_rate=1e30, max_grad_norm=0, lr_scheduler_type="constant"))


def test_the_command_line_names_a_mistake_and_stops(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("{model: {}, data: stdlib, sequence_length: 8, trainig: {}}")
    ended = subprocess.run(
        [sys.executable, "-m", "hybrid.train", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 2
    assert "trainig: unknown key, did you mean 'training'?" in ended.stderr
    assert "Traceback" not in ended.stderr
