"""Which recurrences can count modulo two: layouts trained on short rows, measured on long ones."""

import math

import numpy as np
import pytest
import torch

from hybrid_eval.synthetic import StateTracking, evaluate_state_tracking

SHORT, LONG, ROWS = 32, 256, 256


def trained(mixer, *, steps=200, batch=64, rate=1e-2):
    """Train one layer of a mixer on the parity of short rows, until it is solved or time is up."""
    from hybrid import HybridConfig, HybridForCausalLM

    torch.manual_seed(0)
    # no convolution: nothing but the recurrence may carry the state
    options = {"num_heads": 2, "head_dim": 16, **mixer}
    config = HybridConfig(
        vocab_size=136,
        hidden_size=64,
        layout="X",
        mixers={"X": options},
        initializer_range=0.05,
    )
    model = HybridForCausalLM(config)
    source = StateTracking(group="parity", sequence_length=SHORT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        rows = [source[step * batch + i] for i in range(batch)]
        ids, labels = (
            torch.as_tensor(np.stack([row[key] for row in rows])) for key in ("input_ids", "labels")
        )
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if loss.item() < 1e-3:
            break
    return model


def late_accuracy(model):
    """Accuracy at the end of rows eight times as long as those trained on."""
    found = evaluate_state_tracking(model, lengths=(LONG,), n=ROWS)
    return found["cells"][0]["late"]


@pytest.mark.slow
def test_a_delta_rule_with_negative_eigenvalues_counts():
    mixer = {"type": "delta_net", "conv_size": None, "negative_eigenvalues": True}
    assert late_accuracy(trained(mixer)) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer",
    [
        {"type": "delta_net", "conv_size": None, "negative_eigenvalues": False},
        {"type": "gated_linear_attention"},
    ],
    ids=["delta_net", "gated_linear_attention"],
)
def test_positive_eigenvalues_stay_at_chance(mixer):
    # four standard errors of a guesser, whose answers in one row may all hang together
    assert abs(late_accuracy(trained(mixer)) - 0.5) < 4 * 0.5 / math.sqrt(ROWS)
