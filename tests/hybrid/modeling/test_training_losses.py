"""The losses of a whole model: which are taken when, and that the fused way is transformers' loss."""

import pytest
import torch
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from hybrid import HybridConfig
from hybrid.modeling.losses import cross_entropy, is_plain

pytestmark = pytest.mark.compat


CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two tokens."""
    monkeypatch.setitem(cross_entropy.__kwdefaults__, "chunk_elements", 2 * 61)


def labels_for(x):
    labels = x.clone()
    labels[0, :4] = -100
    return labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("items", [None, 50])
def test_training_takes_the_loss_of_transformers_without_logits(build, ids, tied, items, autocast):
    model = build(dtype=torch.float32, layout="LS", tie_word_embeddings=tied).train()
    x = ids(2, 9)
    labels = labels_for(x)
    full = {"labels": labels, "vocab_size": 61, "num_items_in_batch": items}
    exact = gradients(model, ForCausalLMLoss(model(x).logits, **full))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, labels=labels, num_items_in_batch=items)
        expected = ForCausalLMLoss(model(x).logits, **full)
    assert out.logits is None
    assert_close(out.loss, expected, **CLOSE)
    found, theirs = gradients(model, out.loss), gradients(model, expected)
    assert found.keys() == theirs.keys()
    for name, gradient in exact.items():
        # no further from float32 than transformers is
        error, band = ((g[name] - gradient).norm() for g in (found, theirs))
        assert error <= 1.5 * band + 1e-5 * gradient.norm(), name


def test_logits_where_they_are_expected(build, ids):
    model = build(layout="LS")
    x = ids(2, 9)
    assert model(x, labels=x).logits.shape == (2, 9, 61)
    assert model(x, labels=x, skip_logits=True).logits is None
    model.train()
    assert model(x).logits is not None
    asked = model(x, labels=x, skip_logits=False)
    assert asked.logits.shape == (2, 9, 61)
    assert_close(model(x, labels=x).loss, asked.loss)
    assert_close(model.eval()(x, labels=x).loss, asked.loss)


def test_a_loss_function_of_the_users_gets_logits(build, ids):
    model = build(layout="LS").train()
    seen = []

    def own(logits, labels, vocab_size, **kwargs):
        seen.append((logits.shape, vocab_size, kwargs))
        return logits.sum()

    model.loss_function = own
    x = ids(2, 9)
    out = model(x, labels=x, num_items_in_batch=7)
    assert seen == [((2, 9, 61), 61, {"num_items_in_batch": 7})]
    assert_close(out.loss, out.logits.sum())


def test_shift_labels_are_taken_as_they_are(build, ids):
    model = build(layout="LS").train()
    x = ids(2, 9)
    shifted = torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100)
    found = model(x, labels=x, shift_labels=shifted).loss
    assert_close(found, model(x, labels=x).loss)


def test_z_loss_is_added_in_training_alone(build, ids, assert_close_to_rounding):
    plain, model = build(layout="LS"), build(layout="LS", z_loss=0.01)
    x = ids(2, 9)
    assert_close_to_rounding(model(x, labels=x).loss, plain(x, labels=x).loss)
    logits = plain(x).logits[:, :-1]
    term = 0.01 * logits.exp().sum(-1).log().square().mean()
    found = model.train()(x, labels=x).loss
    assert_close(found, plain(x, labels=x).loss + term)
    assert_close(model(x, labels=x, skip_logits=False).loss, found)


EXPERTS = {"num_experts": 4, "top_k": 2, "balance_loss": 0.1, "router_z_loss": 0.05}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_label_smoothing_keeps_every_other_term(build, ids, given):
    """Smoothing changes the cross entropies alone; the other terms are what they were."""
    options = {"layout": "LS", "ffn": "E", "num_mtp_layers": 1, "z_loss": 0.02}
    model = build(**options, feed_forwards={"E": EXPERTS}).train()
    x, e = ids(2, 9), 0.2
    labels = labels_for(x)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    shifted = {"shift_labels": targets} if given == "shift_labels" else {}
    plain = model(x, labels=labels, **shifted)
    smooth = model(x, labels=labels, label_smoothing=e, **shifted)
    logits = model(x).logits[targets != -100]
    difference = e * (logits.gather(-1, targets[targets != -100][:, None])[:, 0] - logits.mean(-1))
    main = smooth.loss - plain.loss
    weight = model.config.mtp_loss_weight
    assert_close(smooth.aux_loss, plain.aux_loss)
    assert smooth.mtp_loss != plain.mtp_loss
    expected = difference.mean() + weight * (smooth.mtp_loss - plain.mtp_loss)
    assert_close(main, expected.to(main.dtype))


def test_label_smoothing_with_a_loss_function_of_the_users_is_refused(build, ids):
    model = build(layout="S")
    model.loss_function = lambda logits, **kwargs: logits.sum()
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 .* got 0\.1"):
        model(ids(2, 5), labels=ids(2, 5), label_smoothing=0.1)


@pytest.mark.usefixtures("small_chunks")
def test_softcap_in_logits_loss_and_generation(build, ids):
    cap = 0.5
    plain, model = build(layout="LS"), build(layout="LS", logit_softcap=cap)
    x = ids(2, 9)
    logits = cap * torch.tanh(plain(x).logits / cap)
    assert_close(model(x).logits, logits)
    expected = ForCausalLMLoss(logits, x, 61)
    assert_close(model(x, labels=x).loss.float(), expected)
    assert_close(model.train()(x, labels=x).loss.float(), expected)
    out = model.eval().generate(
        x,
        attention_mask=torch.ones_like(x),
        max_new_tokens=3,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert_close(out.logits[0], logits[:, -1].float())
    assert torch.stack(out.logits).abs().max() <= cap


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_on_the_head(build, ids):
    """PEFT wraps the head: it is called, and its adapter learns."""
    peft = pytest.importorskip("peft")
    base = build(dtype=torch.float32, layout="S", tie_word_embeddings=False)
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config).train()
    assert not is_plain(base.lm_head)
    x = ids(2, 9)
    found = model(input_ids=x, labels=x).loss
    expected = ForCausalLMLoss(model(input_ids=x).logits, x, 61)
    assert_close(found, expected, **CLOSE)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert any("lora" in name for name in ours)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_hook_on_the_head_is_kept(build, ids):
    """As accelerate's and FSDP's, which put the weights in place."""
    model = build(layout="S").train()
    calls = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    x = ids(2, 9)
    model(x, labels=x).loss.backward()
    assert calls[0] == (18, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_loss": -1e-4}, "z_loss: expected at least 0, got -0.0001"),
        ({"logit_softcap": 0.0}, "logit_softcap: expected above 0, got 0.0"),
        ({"loss_backend": "chunk"}, "loss_backend: expected one of .*, got 'chunk'; try 'chunked'"),
        ({"final_logit_softcapping": 30.0}, "did you mean 'logit_softcap'"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**options)


def test_labels_with_a_few_logits_are_refused(build, ids):
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        build(layout="S")(ids(2, 9), labels=ids(2, 9), logits_to_keep=1)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_without_targets_costs_nothing(build, ids, items):
    model, x = build(dtype=torch.float32, layout="LS").train(), ids(2, 5)
    loss = model(x, labels=torch.full_like(x, -100), num_items_in_batch=items).loss
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())
