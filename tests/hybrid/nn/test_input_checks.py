"""Inputs that do not fit are one clear error, and masks by layer type are used or refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

B, T = 2, 8


@pytest.fixture
def model(build):
    return build(layout="LS", dtype=torch.float32)


@pytest.fixture
def x(ids):
    return ids(B, T)


ONES = torch.ones(B, T, dtype=torch.long)
PLACES = torch.arange(T).expand(B, T)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"labels": torch.ones(B, 5, dtype=torch.long)},
            r"labels: expected \(2, 8\), got \(2, 5\)",
        ),
        ({"labels": torch.ones(B, T)}, "labels: expected a tensor of integers, got torch.float32"),
        ({"labels": ONES, "shift_labels": ONES[:1]}, r"shift_labels: expected \(2, 8\)"),
        ({"labels": ONES, "label_smoothing": 1.5}, "label_smoothing: expected .* got 1.5"),
        ({"labels": ONES, "label_smoothing": float("nan")}, "label_smoothing: expected .* got nan"),
        ({"label_smoothing": 0.1}, "label_smoothing: .* without labels"),
        ({"attention_mask": -ONES}, "attention_mask: .* got a negative number"),
        ({"attention_mask": ONES.tolist()}, "attention_mask: expected a tensor, got list"),
        ({"attention_mask": ONES * float("nan")}, "attention_mask: expected 1 at tokens and 0"),
        ({"attention_mask": ONES[:, :5]}, "attention_mask: expected a column for each token"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 4.5, 8, 16])}, "cu_seq_lens_q: .* got torch.float32"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 4, 16])}, "cu_seq_lens_q: expected ascending"),
        ({"cu_seq_lens_q": torch.tensor([0, 8, 20])}, "cu_seq_lens_q: expected boundaries from 0"),
        ({"cu_seq_lens_q": [0, 8, 16]}, "cu_seq_lens_q: .* got list"),
        ({"seq_idx": torch.zeros(B, T)}, "seq_idx: .* got torch.float32"),
        ({"position_ids": PLACES.float()}, "position_ids: .* got torch.float32"),
        ({"position_ids": PLACES[None]}, "position_ids: expected .*; try"),
        ({"input_ids": ONES.float()}, "input_ids: .* got torch.float32"),
        ({"input_ids": ONES[0]}, r"input_ids: expected \(B, T\) .* got \(8,\)"),
        ({"input_ids": ONES.tolist()}, "input_ids: .* got list"),
        ({"input_ids": ONES[:0]}, r"input_ids: .* at least one token, got \(0, 8\); try"),
        ({"input_ids": ONES[:, :0]}, r"input_ids: .* at least one token, got \(2, 0\)"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(B, T, 16)},
            r"inputs_embeds: .*\(B, T, 32\)",
        ),
        (
            {"input_ids": None, "inputs_embeds": ONES[..., None]},
            "inputs_embeds: .* got torch.int64",
        ),
        (
            {"past_key_values": ((ONES, ONES),)},
            "cache: expected a Cache of transformers, got tuple",
        ),
    ],
)
def test_what_does_not_fit_is_named(model, x, given, words):
    with pytest.raises(ValueError, match=words):
        model(**{"input_ids": x, **given})


@pytest.mark.parametrize("label", [61, -5])
@pytest.mark.parametrize("training", [False, True])
def test_a_label_beyond_the_vocabulary_is_an_error(model, x, label, training):
    """Also a negative one, which is not -100."""
    message = (
        rf"labels: .* vocab_size is 61\), or -100 for none, got {label}, which is out of bounds"
    )
    with pytest.raises(IndexError, match=message) as found:
        model.train(training)(x, labels=torch.full_like(x, label))
    assert isinstance(found.value, ValueError)


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_it_is_named_in_every_loss(build, x, backend):
    labels = x.clone()
    labels[0, 3:5] = torch.tensor([-100, 200])
    for training in (False, True):
        model = build(layout="LS", loss_backend=backend).train(training)
        for options in ({}, {"label_smoothing": 0.1}):
            with pytest.raises(ValueError, match=r"labels: .* got 200"):
                model(x, labels=labels, **options)


@pytest.mark.parametrize("id", [61, -1])
def test_an_id_beyond_the_vocabulary_is_named(model, x, id):
    x[1, 2] = id
    with pytest.raises(ValueError, match=rf"input_ids: .* from 0 to 60 .*, got {id}, .*tokenizer"):
        model(x)


@pytest.mark.parametrize(
    "value", [-1, 1.5, True, "all", torch.tensor([0.5]), None], ids=lambda value: f"{value}"
)
def test_logits_to_keep_is_a_number_or_indices(model, x, value):
    with pytest.raises(ValueError, match="logits_to_keep: expected"):
        model(x, logits_to_keep=value)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -1, "3", torch.tensor(float("nan")), torch.tensor([3, 4])],
    ids=lambda value: f"{value}",
)
def test_num_items_in_batch_is_a_count(model, x, value):
    with pytest.raises(ValueError, match="num_items_in_batch: expected"):
        model(x, labels=x, num_items_in_batch=value)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("layout", "other"), [("LS", "SL"), ("SS", "LS"), ("LL", "LS")])
def test_the_cache_of_another_layout_is_refused_by_layer(build, x, layout, other, static):
    config = build(layout=other).config
    cache = StaticCache(config, max_cache_len=16) if static else DynamicCache(config=config)
    with pytest.raises(ValueError, match=r"cache(\.layers\[\d\]: expected one for| .*cannot hold)"):
        build(layout=layout)(x, past_key_values=cache)


def test_labels_of_another_kind_of_integer_are_taken(model, x):
    expected = model(x, labels=x).loss
    assert model(x, labels=x.int()).loss == expected


@pytest.mark.parametrize("layout", ["LL", "SS", "LSLS"])
def test_the_cache_of_another_model_is_refused(build, model, x, layout):
    other = build(layout=layout, dtype=torch.float32)
    cache = other(x[:, :4], use_cache=True).past_key_values
    with pytest.raises((ValueError, RuntimeError), match=r"cache|size"):
        model(x[:, 4:], past_key_values=cache)


def test_the_cache_of_another_batch_is_refused(model, ids, x):
    cache = model(ids(3, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="initial_state"):
        model(x, past_key_values=cache)


MASK = ONES.clone()
MASK[0, :3] = 0


def by_types(model, **changed):
    cache = {"cache": None, "past_key_values": None}
    embeddings = torch.zeros(B, T, 32)
    given = {"config": model.config, "inputs_embeds": embeddings, "attention_mask": MASK}
    return {**model.create_masks_for_generate(**given, **cache), **changed}


def test_masks_by_layer_type_are_used(model, x, assert_close_to_rounding):
    found = model(x, attention_mask=by_types(model)).logits
    real = MASK.bool()
    assert_close_to_rounding(found[real], model(x, attention_mask=MASK).logits[real])
    assert not torch.allclose(found[real], model(x).logits[real])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"full_atention": None}, "got 'full_atention'; did you mean 'full_attention'"),
        ({"linear_attention": MASK[:, :5]}, r"attention_mask: expected a column .* got \(2, 5\)"),
        ({"linear_attention": MASK[:1]}, r"attention_mask: expected a column .* got \(1, 8\)"),
        (
            {"linear_attention": MASK[:, None, None]},
            r"attention_mask\['linear_attention'\]: expected",
        ),
        ({"full_attention": torch.zeros(B, 1, T, 5)}, "attention_mask: expected .* at least 8"),
        ({"full_attention": torch.zeros(B, 1, 5, T)}, "attention_mask: expected .* got"),
        ({"full_attention": "causal"}, r"attention_mask\['full_attention'\]: .* got str"),
    ],
)
def test_masks_by_layer_type_that_do_not_fit_are_refused(model, x, changed, words):
    with pytest.raises(ValueError, match=words):
        model(x, attention_mask=by_types(model, **changed))


@pytest.mark.parametrize("missing", ["full_attention", "linear_attention"])
def test_masks_by_layer_type_that_lack_one_are_refused(model, x, missing):
    masks = by_types(model)
    del masks[missing]
    with pytest.raises(ValueError, match=f"expected a mask for '{missing}'"):
        model(x, attention_mask=masks)


def test_an_empty_cache_of_the_model_fits(model, x):
    out = model(x, past_key_values=DynamicCache(config=model.config))
    assert torch.allclose(out.logits, model(x).logits, atol=1e-5)
