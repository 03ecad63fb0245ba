"""MQAR for training: what its rows hold, and what a hybrid learns from them."""

import numpy as np
import pytest
import torch

from hybrid_eval.mqar import evaluate_mqar, mqar
from hybrid_eval.scoring import IGNORE


def test_rows_of_random_size_are_filled_with_repeated_queries():
    source = mqar(sequence_length=64, pairs=16, min_pairs=2, repeat=True)
    sizes = set()
    for row in source.take(60):
        ids, labels = row["input_ids"], row["labels"]
        asked = np.flatnonzero(labels != IGNORE)
        first = int(asked[0]) - 1  # the first query ends the list of pairs
        answers = dict(zip(ids[0:first:2], ids[1:first:2], strict=True))
        sizes.add(len(answers))
        assert len(asked) == (64 - first) // 2
        assert all(labels[at] == ids[at] == answers[ids[at - 1]] for at in asked)
        # nobody is asked a second time before all were asked once
        rounds = [ids[at - 1] for at in asked]
        assert len(set(rounds[: len(answers)])) == min(len(rounds), len(answers))
    assert min(sizes) >= 2
    assert max(sizes) <= 16
    assert len(sizes) > 8


@pytest.mark.parametrize(
    "options", [{"min_pairs": 0}, {"min_pairs": 5}, {"min_pairs": 2, "queries": 3}]
)
def test_sizes_that_do_not_fit_are_named(options):
    with pytest.raises(ValueError, match="min_pairs"):
        mqar(sequence_length=64, pairs=4, **options)


@pytest.mark.slow
def test_one_softmax_layer_of_four_recalls_what_a_small_state_forgets(train):
    """The order of Zoology (arXiv 2312.04927) and of the quickstart, whose mixers these are."""
    from hybrid import HybridConfig, HybridForCausalLM

    size = {"sequence_length": 64, "pairs": 12}
    linear = {"num_heads": 4, "head_dim": 4, "value_head_dim": 19, "conv_size": 4}
    mixers = {
        "L": {**linear, "output_norm_eps": 10.0},
        "S": {"num_heads": 4, "conv_size": 4},
    }
    found = {}
    for layout in ("LLLS", "LLLL"):
        torch.manual_seed(0)
        config = HybridConfig(
            vocab_size=256,
            hidden_size=64,
            layout=layout,
            ffn="",
            mixers=mixers,
            initializer_range=0.08,
        )
        source = mqar(**size, min_pairs=2, repeat=True)
        model = train(
            HybridForCausalLM(config), source, steps=200, batch=16, rate=5e-3, betas=(0.9, 0.95)
        )
        found[layout] = evaluate_mqar(model, n=128, **size)
    hybrid, pure = found["LLLS"], found["LLLL"]
    assert hybrid["interval"].low > 0.5
    assert pure["interval"].high < 0.25
