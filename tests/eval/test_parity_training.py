"""Which recurrences can count modulo two: layouts trained on short rows, measured on long ones."""

import math

import pytest
import torch

from hybrid_eval.synthetic import StateTracking, evaluate_state_tracking

SHORT, LONG, ROWS = 32, 256, 256


@pytest.fixture
def trained(train):
    """Train one layer of a mixer on the parity of short rows, until it is solved or time is up."""

    def run(mixer):
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
        source = StateTracking(group="parity", sequence_length=SHORT)
        model = HybridForCausalLM(config)
        return train(model, source, steps=200, batch=64, rate=1e-2, weight_decay=0.0)

    return run


def late_accuracy(model):
    """Accuracy at the end of rows eight times as long as those trained on."""
    found = evaluate_state_tracking(model, lengths=(LONG,), n=ROWS)
    return found["cells"][0]["late"]


@pytest.mark.slow
def test_a_delta_rule_with_negative_eigenvalues_counts(trained):
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
def test_positive_eigenvalues_stay_at_chance(mixer, trained):
    # four standard errors of a guesser, whose answers in one row may all hang together
    assert abs(late_accuracy(trained(mixer)) - 0.5) < 4 * 0.5 / math.sqrt(ROWS)
