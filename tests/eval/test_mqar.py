import numpy as np
import pytest

from hybrid_eval.mqar import evaluate_mqar, mqar


def test_a_row_asks_for_keys_of_its_pairs_and_the_labels_are_their_values():
    for row in mqar(sequence_length=160, pairs=16, gap="uniform").take(20):
        ids, labels = row["input_ids"], row["labels"]
        table = dict(zip(ids[0:32:2], ids[1:32:2], strict=True))
        asked = np.flatnonzero(labels != -100)
        assert len(table) == len(asked) == 16
        for at in asked:
            assert at >= 33
            assert labels[at] == ids[at] == table[ids[at - 1]]
        # no filler may look like a query
        assert {int(t) for t in ids[32:] if 128 <= t < 192} == set(table)


def test_rows_depend_on_seed_and_index_alone():
    first = mqar(pairs=8, seed=3).take(10)
    again = mqar(pairs=8, seed=3)[7]
    np.testing.assert_array_equal(first[7]["input_ids"], again["input_ids"])
    resumed = next(iter(mqar(pairs=8, seed=3).skip(7)))
    np.testing.assert_array_equal(first[7]["input_ids"], resumed["input_ids"])
    other = mqar(pairs=8, seed=4)[7]
    assert (first[7]["input_ids"] != other["input_ids"]).any()


def test_the_power_law_asks_early_and_uniform_does_not():
    def mean_place(gap):
        rows = mqar(sequence_length=256, pairs=8, gap=gap).take(60)
        return np.mean([np.flatnonzero(row["labels"] != -100).mean() for row in rows])

    # uniform slots lie around the middle of what follows the pairs: (16 + 256) / 2
    assert mean_place("uniform") == pytest.approx(136, abs=10)
    assert mean_place("power") < 80


def test_one_who_recalls_scores_one_and_one_who_does_not_scores_zero(recall_model, rule_model):
    result = evaluate_mqar(recall_model, n=10, pairs=8, sequence_length=64)
    assert result["accuracy"] == 1.0
    assert result["interval"][1] == 1.0
    assert result["queries"] == 80
    never = evaluate_mqar(rule_model(lambda ids: 0), n=10, pairs=8, sequence_length=64)
    assert never["accuracy"] == 0.0
    assert never["chance"] == 1 / 8


def test_evaluation_rows_are_not_training_rows():
    trained = {tuple(row["input_ids"]) for row in mqar(pairs=4, sequence_length=32).take(50)}
    tested = mqar(pairs=4, sequence_length=32)
    tested.stream = "test"
    assert trained.isdisjoint({tuple(row["input_ids"]) for row in tested.take(50)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 65, "sequence_length": 512}, "65 pairs need as many different keys"),
        ({"pairs": 32, "sequence_length": 100}, "take 128 tokens, sequence_length is 100"),
        ({"pairs": 4, "queries": 5}, "queries=5"),
        ({"gap": "poisson"}, "gap must be 'power' or 'uniform'"),
        ({"filler_ids": (0, 130)}, "overlap key_ids"),
        ({"key_ids": (9, 9)}, "key_ids must be"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        mqar(**options)


def test_ids_outside_the_vocabulary_are_named(tiny_llama):
    with pytest.raises(ValueError, match=r"token id 29\d does not exist in a vocabulary of 256"):
        evaluate_mqar(tiny_llama, n=2, pairs=8, sequence_length=64, value_ids=(290, 300))
