"""What users give that cannot be meant: one line, before the first step."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import hybrid
from hybrid.config import yaml
from hybrid.config.options import ConfigError
from hybrid.data.mixture import DataError, check_ids, shares
from hybrid.data.packing import IGNORE, row_from_spans
from hybrid.data.rows import complete
from hybrid.plan import load_model_config
from hybrid.terminal import Interrupted
from hybrid.train import parse_config, run
from hybrid.train.build import training_arguments
from hybrid.train.interrupt import StopSignals
from hybrid.train.runner import prepare_run


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = (json.dumps({"text": f"row {i} " * 5}) for i in range(60))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return {
        "model": {"layout": "S", "hidden_size": 16, "mixers": {"S": {"num_heads": 2}}},
        "data": str(tmp_path / "a.jsonl"),
        "sequence_length": 16,
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "disable_tqdm": True,
        },
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32),
        ("data_seed", -1),
        ("eval_on_start", True),
        ("accelerator_config", "foo"),
        ("accelerator_config", {"foo": 1}),
        ("dataloader_persistent_workers", True),
        ("dataloader_prefetch_factor", 2),
        ("max_grad_norm", float("nan")),
        ("warmup_ratio", float("nan")),
        ("logging_steps", 10**15),
        ("deepspeed", "foo.json"),
        ("optim_args", 5),
        ("lr_scheduler_type", "foo"),
        ("report_to", [5]),
        ("include_for_metrics", 5),
        ("torch_compile_mode", 5),
        ("hub_strategy", "foo"),
        ("log_level", "foo"),
        ("debug", "foo"),
    ],
)
def test_a_training_key_that_cannot_be_is_named(values, key, value):
    values["training"][key] = value
    with pytest.raises(ConfigError, match="training"):
        training_arguments(parse_config(values))


def test_weights_whose_sum_overflows_are_still_shares():
    assert shares([1e308, 1e308]).tolist() == [500, 500]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "labels",
            61,
            "label: expected .* vocab_size 61, got 61; try model.vocab_size: 62",
        ),
        ("labels", -5, "label: .*, got -5"),
        ("input_ids", 61, "token id: .*, got 61"),
        ("input_ids", -1, "token id: .*, got -1"),
    ],
)
def test_ids_and_labels_outside_the_vocabulary_are_named(key, value, words):
    row = row_from_spans([np.arange(4)], 6, 0)
    check_ids(row, 61)
    assert (row["labels"] == IGNORE).any()
    row[key][2] = value
    with pytest.raises(ValueError, match=words):
        check_ids(row, 61)


def test_rows_of_a_plugin_hold_integers():
    with pytest.raises(ValueError, match=r"row\.labels: expected integers, got float64"):
        complete({"input_ids": [1, 2], "labels": [0.5, 1.0]}, 4, 0)
    with pytest.raises(ValueError, match="position_ids: expected integers of shape"):
        complete({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0]}, 4, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: c", "expected text as a key"),
        ("? {a: b}\n: c", "expected text as a key"),
        ("5: c", "expected text as a key, got 5"),
        ("a: " + "[" * 5000, "levels of nesting"),
        ("a: &x [*x]", "without cycles"),
        ("a: 2001-99-99", "expected valid YAML"),
    ],
)
def test_yaml_of_strange_shapes_is_one_line(text, words):
    with pytest.raises(ConfigError, match=words):
        yaml.parse(text, "c.yaml")


def test_a_circle_of_paths_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("model: {path: b.yaml}")
    (tmp_path / "b.yaml").write_text("model: {path: a.yaml}")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_model_config("a.yaml")


def test_every_held_out_row_counts_whatever_training_drops(values):
    values |= {"eval_data": values["data"], "eval_rows": 5}
    losses = []
    for drop in (False, True):
        values["training"] |= {"dataloader_drop_last": drop, "per_device_eval_batch_size": 4}
        trainer = prepare_run(parse_config(values))
        assert len(trainer.get_eval_dataloader()) == 2
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_evaluation_without_labels_is_an_error(values, monkeypatch):
    values |= {"eval_data": values["data"], "eval_rows": 2}
    trainer = prepare_run(parse_config(values))
    rows = [dict(trainer.eval_dataset[i]) for i in range(2)]
    for row in rows:
        row["labels"] = row["labels"] * 0 + IGNORE
    with pytest.raises(DataError, match="eval_data: expected rows with labels"):
        trainer.evaluate(rows)


def test_data_that_changed_in_its_middle_is_another_run(values, tmp_path):
    run(parse_config(values))
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("row 41 row", "row 14 row"))
    values["training"]["max_steps"] = 6
    with pytest.raises(ConfigError, match=r"data\[0\].*CRC-32 of its content: was \d+, is \d+"):
        run(parse_config(values))


def test_a_stream_whose_file_changed_far_behind_is_another_run(values, tmp_path):
    values["data"] = [{"source": str(tmp_path / "a.jsonl"), "streaming": True}]
    path = tmp_path / "a.jsonl"
    with path.open("a") as file:  # far behind what the run reads
        file.writelines(json.dumps({"text": f"more {i} {i}"}) + "\n" for i in range(3000))
    run(parse_config(values))
    path.write_text(path.read_text().replace("more 2998 2998", "more 2998 2989"))
    values["training"]["max_steps"] = 6
    with pytest.raises(ConfigError, match=r"data\[0\].*CRC-32 of its files: was \d+, is \d+"):
        run(parse_config(values))


def test_a_signal_leaves_a_checkpoint_of_the_step_and_the_same_command_goes_on(values):
    before = StopSignals.on_step_end

    def signalled(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.signal:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "on_step_end", signalled)
        with pytest.raises(Interrupted, match=r"after step 1; .*checkpoint-1 is kept") as caught:
            run(parse_config(values))
    assert caught.value.status == 128 + 15
    assert run(parse_config(values)).resumed_from == 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_trainer_smooths_the_next_token(tmp_path, wrapped):
    torch.manual_seed(0)
    config = {"layout": "S", "hidden_size": 16, "vocab_size": 11, "initializer_range": 0.3}
    model = hybrid.HybridForCausalLM(
        hybrid.HybridConfig(**config, mixers={"S": {"num_heads": 2}})
    ).eval()
    if wrapped:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    args = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model=model, args=args)
    ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3] = IGNORE
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels.clone()})
        logits = model(ids).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(found, expected)
