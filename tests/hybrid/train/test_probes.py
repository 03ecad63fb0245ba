"""Probes: recall while a run trains, without a trace in the training."""

import json

import numpy as np
import pytest
import torch

from hybrid.config.options import ConfigError
from hybrid.data.packing import IGNORE
from hybrid.train import parse_config, run
from hybrid.train.probes import ANYWHERE, ask, buckets, figures
from hybrid.train.runner import prepare_run

STEPS = 6


@pytest.fixture
def values(tmp_path):
    """A hybrid with dropout and experts: what a probe could disturb is there."""
    return {
        "model": {
            "layout": "LS",
            "ffn": "E",
            "hidden_size": 16,
            "mixers": {"L": {"num_heads": 2}, "S": {"num_heads": 2, "dropout": 0.2}},
            "feed_forwards": {
                "E": {
                    "num_experts": 3,
                    "top_k": 1,
                    "intermediate_size": 8,
                    "balance_loss": 0.01,
                    "bias_update_rate": 0.01,
                }
            },
        },
        "data": {"source": "mqar", "pairs": 4},
        "sequence_length": 24,
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "save_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
        },
    }


PROBES = {
    "needle": {"source": "needle", "rows": 10, "every": 2, "lengths": [12, 24], "needles": 2},
    "recall": {"source": "mqar", "rows": 6, "every": 4, "pairs": 4, "depth_buckets": 2},
}


def test_probes_are_logged_and_leave_the_run_alone(values, tmp_path):
    plain = run(parse_config({**values, "training": {**values["training"], "save_steps": 100}}))
    values["training"]["output_dir"] = str(tmp_path / "probed")
    probed = run(parse_config({**values, "probes": PROBES}))
    assert probed.losses == plain.losses
    one, other = (
        torch.load(tmp_path / name / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=False)
        for name in ("out", "probed")
    )
    for key, state in one["state"].items():
        assert torch.equal(state["exp_avg"], other["state"][key]["exp_avg"])
    assert [step for step, _ in probed.probes["needle"]] == [2, 4, 6]
    assert [step for step, _ in probed.probes["recall"]] == [4, 6]
    folder = tmp_path / "probed" / f"checkpoint-{STEPS}"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = next(entry for entry in history if "eval_needle_accuracy" in entry)
    assert {"eval_needle_accuracy_length_12", "eval_needle_accuracy_length_24"} <= set(logged)
    assert any(key.startswith("eval_needle_accuracy_length_24_depth_0.") for key in logged)
    # every step still has its loss and its speed
    losses = [entry for entry in history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(entry["tokens_per_second"] > 0 for entry in losses)


def test_a_probed_run_continues_as_if_it_had_not_stopped(values, tmp_path):
    values["probes"] = PROBES
    whole = run(parse_config({**values, "training": {**values["training"], "max_steps": STEPS}}))
    values["training"]["output_dir"] = str(tmp_path / "halves")
    run(parse_config({**values, "training": {**values["training"], "max_steps": 3}}))
    resumed = run(parse_config(values))
    assert resumed.resumed_from == 3
    assert resumed.losses == whole.losses
    both = dict(resumed.probes["needle"])
    both.pop(3)  # the end of the first half
    assert both == dict(whole.probes["needle"])


def test_a_probe_counts_what_the_model_gets_right(values):
    """A model whose answer is known: its head says one token, whatever it reads."""
    trainer = prepare_run(parse_config({**values, "probes": {"p": {"source": "mqar", "pairs": 4}}}))
    (probe,) = trainer.probes
    labels = np.concatenate([row["labels"] for row in probe.rows[24]])
    asked = labels[labels != IGNORE]
    favourite = int(np.bincount(asked).argmax())

    def forward(input_ids, logits_to_keep, use_cache, position_ids=None):
        logits = torch.zeros(len(input_ids), len(logits_to_keep), 259)
        logits[..., favourite] = 1
        return type("Output", (), {"logits": logits})

    trainer.model.forward = forward
    found = ask(trainer, probe)
    assert found["eval_p_accuracy"] == pytest.approx((asked == favourite).mean())
    assert found["eval_p_accuracy"] > 0


def test_depth_is_where_the_answer_stands():
    #   0  1  2  3  4  5  6  7  8  9
    ids = np.array([7, 1, 5, 2, 7, 3, 5, 2, 7, 3])
    labels = np.full(10, IGNORE)
    labels[7], labels[9], labels[1] = 2, 3, 1
    found = buckets(ids, labels, 4)
    # 5 2 at 7 was seen at 2, of 6 tokens before: the second quarter; 7 3 at 9 at 4, of 8
    assert found[7] == 1
    assert found[9] == 2
    assert found[1] == ANYWHERE
    assert set(np.delete(found, [7, 9])) == {ANYWHERE}


def test_needle_and_recall_answers_always_stand_before(values):
    config = parse_config({**values, "probes": PROBES})
    for probe in prepare_run(config).probes:
        for rows in probe.rows.values():
            for row in rows:
                found = buckets(row["input_ids"], row["labels"], 4)
                assert (found[row["labels"] != IGNORE] != ANYWHERE).all()


def test_shares_of_buckets_add_up():
    counts = {8: torch.tensor([[1, 2], [0, 0], [3, 4]]), 16: torch.tensor([[0, 2], [2, 2], [0, 0]])}
    assert figures("x", counts) == {
        "x": 6 / 10,
        "x_length_8": 4 / 6,
        "x_length_8_depth_0.00": 1 / 2,
        "x_length_16": 2 / 4,
        "x_length_16_depth_0.00": 0.0,
        "x_length_16_depth_0.50": 1.0,
    }


def test_a_probe_s_mistakes_are_named(values):
    values["probes"] = {
        "loss": "mqar",
        "a": {"source": "mqar", "evry": 3, "rows": 0},
        "b": {"source": "mqar", "lengths": [8, 0], "every": "often"},
        "c": 3,
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    assert caught.value.mistakes == [
        "probes.loss: expected name of letters, digits and _, except 'loss', got 'loss'",
        "probes.a.evry: unknown option of 'mqar', did you mean 'every'?",
        "probes.a.rows: expected at least 1, got 0",
        "probes.b.every: expected int, got str 'often'",
        "probes.b.lengths[1]: expected at least 1, got 0",
        "probes.c: expected mapping of options, got int 3",
    ]
    values["probes"] = {"long": {"source": "mqar", "pairs": 40}}
    with pytest.raises(ConfigError, match=r"probes.long \(mqar, length 24\): 40 pairs"):
        prepare_run(parse_config(values))


def test_a_config_with_probes_comes_back_from_its_own_text(values):
    config = parse_config({**values, "probes": PROBES})
    assert parse_config(config.as_dict()) == config
    assert config.probes["needle"].options == {"needles": 2}
