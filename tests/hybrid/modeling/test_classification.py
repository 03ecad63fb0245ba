"""Classification heads: the last real token of each row, whatever the side and the sign of padding."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import hybrid

MIXERS = {"S": {"num_heads": 2}, "L": {"num_heads": 2}, "D": {"num_heads": 2}}
LAYOUTS = ["SS", "LL", "LS", "DS"]
PAD = 0


def build(auto, layout, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = hybrid.HybridConfig(
        layout=layout,
        hidden_size=32,
        vocab_size=61,
        num_labels=3,
        mixers={s: MIXERS[s] for s in set(layout)},
        initializer_range=0.2,
        **kwargs,
    )
    return auto.from_config(config).double().eval()


def padded(rows, side):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@pytest.fixture
def rows(ids):
    # The pad token also ends a text here, as where it is the token of the end.
    return [torch.cat([ids(1, 7)[0] + 1, torch.tensor([PAD])]), ids(1, 4)[0] + 1, ids(1, 1)[0] + 1]


@pytest.mark.compat
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_row_is_classified_as_alone(layout, side, rows):
    model = build(AutoModelForSequenceClassification, layout)
    ids, mask = padded(rows, side)
    hidden = [model.model(row[None]).last_hidden_state[0, -1] for row in rows]
    expected = torch.stack(hidden) @ model.score.weight.T
    assert_close(model(ids, attention_mask=mask).logits, expected)
    embedded = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embedded, attention_mask=mask).logits, expected)


def test_without_a_mask_the_pad_token_tells(ids):
    model = build(AutoModelForSequenceClassification, "SS", pad_token_id=PAD)
    rows = [ids(1, 6)[0] + 1, ids(1, 3)[0] + 1]
    inputs, _ = padded(rows, "right")
    expected = torch.cat([model(row[None]).logits for row in rows])
    assert_close(model(inputs).logits, expected)


def test_rows_whose_end_nobody_knows_are_refused(ids):
    model = build(AutoModelForSequenceClassification, "SS")
    assert model(ids(1, 5)).logits.shape == (1, 3)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected .* or pad_token_id in the config"
    ):
        model(ids(2, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_torch(layout, rows):
    model = build(AutoModelForSequenceClassification, layout)
    ids, mask = padded(rows, "right")
    labels = torch.tensor([2, 0, 1])
    out = model(ids, attention_mask=mask, labels=labels)
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_saved_and_loaded(auto, ids, tmp_path):
    model = build(auto, "LS")
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(again) is type(model)
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    assert_close(again(ids(1, 6)).logits, model(ids(1, 6)).logits)


@pytest.mark.parametrize(
    "auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_the_stack_of_a_language_model_is_taken_over(auto, ids, tmp_path):
    language_model = build(AutoModelForCausalLM, "LS")
    language_model.save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path, dtype=torch.float64, num_labels=2)
    assert model.score.weight.shape == (2, 32)
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor)


def test_every_token_is_classified(ids):
    model = build(AutoModelForTokenClassification, "LS")
    x = ids(2, 5)
    head = model.score
    expected = model.model(x).last_hidden_state @ head.weight.T + head.bias
    labels = torch.randint(0, 3, (2, 5))
    out = model(x, labels=labels)
    assert_close(out.logits, expected)
    flat = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert_close(out.loss, flat.float())  # transformers takes it in float32
