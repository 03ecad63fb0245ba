"""Multi-token prediction: its loss by definition, and speculative decoding that changes nothing."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.ffn import balance
from hybrid.modeling.mtp import module_config
from hybrid.modeling.speculative import MTPDrafts
from hybrid.plan import plan

MIXERS = {s: {"num_heads": 2} for s in "LSD"}
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture
def make(build):
    def make_model(layout="LLLS", modules=2, **config):
        config = {"feed_forwards": {"-": {"intermediate_size": 24}}, "mixers": MIXERS, **config}
        return build(layout=layout, num_mtp_layers=modules, pad_token_id=0, **config)

    return make_model


# What a module is made of.


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"layout": "LLLS"}, ["S-"]),
        ({"layout": "LS", "ffn": "-E"}, ["SE"]),
        ({"layout": "LS", "ffn": ""}, ["S"]),
        ({"layout": "L[LS]"}, ["[LS]-"]),
        ({"layout": "L-S-"}, ["S", "-"]),
        ({"layout": "L-SE"}, ["S", "E"]),
        ({"layout": "LLLS", "mtp_layout": "L"}, ["L-"]),
        ({"layout": "LLLS", "mtp_layout": "LE"}, ["L", "E"]),
        ({"layout": "L-SE", "mtp_layout": "L"}, ["LE"]),
    ],
)
def test_layers_of_a_module(config, layers):
    config = HybridConfig(num_mtp_layers=1, **config)
    assert [str(layer) for layer in module_config(config).layers] == layers
    assert config.num_hidden_layers == len(config.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mtp_layers": -1}, "num_mtp_layers: expected at least 0"),
        ({"mtp_layout": "S"}, "mtp_layout: expected null with num_mtp_layers: 0"),
        ({"num_mtp_layers": 1, "mtp_layout": "SQ"}, "mtp_layout: .*unknown symbol 'Q'"),
        (
            {"num_mtp_layers": 1, "mtp_layout": "-"},
            "mtp_layout: expected at least one mixer, got '-'",
        ),
        ({"num_mtp_layers": 1, "mtp_loss_weight": -0.1}, "mtp_loss_weight: expected at least 0"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**options)


# The loss.


def by_definition(model, x, labels, count):
    """The mean over modules, each on the positions alone that have a target."""
    embeddings, hidden = model.model.embed_tokens(x), model.model(x).last_hidden_state
    total = 0
    for k, module in enumerate(model.mtp.depths, start=1):
        hidden = module(hidden[:, : x.shape[1] - k], embeddings[:, k:]).last_hidden_state
        logits = model.compute_logits(hidden[:, :-1]).flatten(0, 1)
        targets = labels[:, k + 1 :].flatten()
        total += nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / len(model.mtp.depths) / count


def test_loss_by_definition(make, ids):
    model = make(modules=3).train()
    x, labels = ids(2, 11), ids(2, 11, seed=1)
    labels[0, :4] = labels[1, 7] = -100
    count = (labels[:, 1:] != -100).sum()
    out = model(x, labels=labels)
    assert_close(out.mtp_loss, by_definition(model, x, labels, count), **CLOSE)
    main = make(modules=0).train()
    main.load_state_dict(model.state_dict(), strict=False)
    expected = main(x, labels=labels)
    assert expected.mtp_loss is None
    assert_close(out.loss, expected.loss + 0.3 * out.mtp_loss, **CLOSE)
    shared = model(x, labels=labels, num_items_in_batch=torch.tensor(70))
    assert_close(shared.mtp_loss, out.mtp_loss * count / 70, **CLOSE)
    model.config.mtp_loss_weight = 0.1
    assert_close(model(x, labels=labels).loss, expected.loss + 0.1 * out.mtp_loss, **CLOSE)
    assert model.eval()(x, labels=labels).mtp_loss is None
    assert_close(model(x, labels=labels).loss, expected.loss, **CLOSE)


@pytest.mark.parametrize("first_label", [True, False])
def test_no_target_lies_beyond_the_end_of_a_document(make, ids, first_label):
    """Packed, the loss and its gradient are those of each document alone; one is shorter than n + 1."""
    model = make("LS", modules=3).train()
    sizes = (6, 3, 9)
    x = ids(1, sum(sizes))
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    labels = x.clone()
    if not first_label:
        labels[positions == 0] = -100
    model.zero_grad()
    packed = model(x, labels=labels, position_ids=positions, num_items_in_batch=10).mtp_loss
    packed.backward()
    found = {n: p.grad.clone() for n, p in model.mtp.named_parameters()}
    model.zero_grad()
    parts = [model(d, labels=d, num_items_in_batch=10).mtp_loss for d in x.split(sizes, dim=1)]
    total = torch.stack(parts).sum()
    total.backward()
    assert_close(packed, total, **CLOSE)
    for name, parameter in model.mtp.named_parameters():
        assert_close(found[name], parameter.grad, **CLOSE)


def test_every_parameter_learns_and_checkpointing_changes_nothing(make, ids):
    x = ids(2, 9)
    gradients = []
    for checkpointed in (False, True):
        model = make("LS", modules=1).train()
        if checkpointed:
            old_name = model.gradient_checkpointing_enable  # until transformers 5.2x
            getattr(model, "activation_checkpointing_enable", old_name)()
        model(x, labels=x).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, **CLOSE)


def test_compiled_without_graph_breaks(build, ids):
    torch.compiler.reset()
    model = build(dtype=torch.float32, layout="S", num_mtp_layers=1).train()
    x = ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (m(x, labels=x, use_cache=False).loss for m in (compiled, model))
    assert_close(found, expected)


def test_routers_of_modules_are_balanced_too(make, ids):
    moe = {"num_experts": 4, "top_k": 2, "intermediate_size": 16, "balance_loss": 0.1}
    model = make("LS", modules=1, ffn="-E", feed_forwards={"E": moe}).train()
    x = ids(2, 9)
    out = model(x, labels=x)
    routers = balance.routers(model)
    assert list(routers) == ["model.layers.1.ffn.router", "mtp.depths.0.stack.layers.0.ffn.router"]
    assert [r.load.sum().item() for r in routers.values()] == [2 * 18] * 2
    out.aux_loss.backward()
    assert all(r.weight.grad.abs().max() > 0 for r in routers.values())
    assert len(balance.finish_step(model)) == 2
    model.set_experts_implementation("batched_mm")
    assert model.mtp.depths[0].stack.config._experts_implementation == "batched_mm"


# At inference.


def test_the_plan_counts_modules_apart(make):
    """A module costs what a model of its layer and the head costs, and its projection."""
    model = make("LLLS", 2)
    found, plain = plan(model.config, 100), plan(make("LLLS", 0).config, 100)
    alone = plan(make("S", 0).config, 100)
    d_model = model.config.hidden_size
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters - found.mtp_parameters == plain.parameters
    assert found.active_parameters == plain.active_parameters
    assert found.flops_per_token == plain.flops_per_token
    assert found.cache_bytes == plain.cache_bytes
    each = alone.flops_per_token + 2 * 2 * d_model**2
    assert found.mtp_flops_per_token == 2 * each
    assert found.training_flops_per_token == 3 * (plain.flops_per_token + 2 * each)
    norms = 2 * d_model
    weights = alone.parameters - alone.embedding_parameters + 2 * d_model**2 + norms
    assert found.mtp_parameters == 2 * weights


def test_saved_and_loaded(make, ids, tmp_path, assert_same_weights, assert_close_to_rounding):
    model = make().float()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    x = ids(2, 9)
    losses = [m.train()(x, labels=x).mtp_loss for m in (model, again)]
    assert_close_to_rounding(*losses)


def train(model, text, steps=25):
    """Teach a model a text that repeats itself."""
    steps_of = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        model(text, labels=text).loss.backward()
        steps_of.step()
        steps_of.zero_grad()
    return model.eval()


def generate(model, prompt, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, **kwargs}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)


@pytest.mark.parametrize(("layout", "modules"), [("LLLS", 1), ("DDDS", 2), ("DD", 1), ("L-S-", 3)])
def test_speculation_changes_no_token(make, ids, layout, modules):
    """On a text it has learnt, where drafts are taken, and on strange ones, where hardly any is."""
    period = ids(1, 7)
    model = train(make(layout, modules, initializer_range=0.1), period.repeat(1, 4))
    accepted = drafted = 0
    for prompt in (period.repeat(1, 2), period[:, :2], ids(1, 9, seed=5), ids(1, 1, seed=6)):
        expected = generate(model, prompt)
        assert torch.equal(generate(model, prompt, use_mtp=True), expected)
        accepted, drafted = accepted + model.mtp.accepted, drafted + model.mtp.drafted
    print(f"{accepted} of {drafted} drafts accepted")  # a figure to read, with -s
    assert 0 < accepted < drafted


def from_scratch(model, ids, count):
    """Drafts without any cache: the whole text through the stack and each module."""
    known = ids.shape[1]
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    for k, module in enumerate(model.mtp.depths, start=1):
        embeddings = model.model.embed_tokens(ids[:, k:])
        hidden = module(hidden, embeddings, use_cache=False).last_hidden_state
        token = model.compute_logits(hidden[:, -1:]).argmax(-1)
        ids = torch.cat([ids, token], dim=1)
    return ids[:, known : known + count]


@pytest.mark.parametrize("mtp_layout", ["S", "LS"])
def test_drafts_are_those_of_the_whole_text(make, ids, monkeypatch, mtp_layout):
    """After any number of accepted tokens, for the caches of modules are rolled back as well."""
    model = make("LS", 3, initializer_range=0.1, mtp_layout=mtp_layout)
    train(model, ids(1, 7).repeat(1, 4), steps=20)
    taken, rounds = [], []
    original = MTPDrafts.get_candidates

    def checked(self, input_ids, **kwargs):
        found, logits = original(self, input_ids, **kwargs)
        drafts = found[:, input_ids.shape[1] :]
        if drafts.shape[1]:
            expected = from_scratch(model, input_ids, drafts.shape[1])
            assert torch.equal(drafts, expected)
            rounds.append(drafts.shape[1])
            taken.append(int(kwargs["n_last_matches"]))
        return found, logits

    monkeypatch.setattr(MTPDrafts, "get_candidates", checked)
    for prompt in (ids(1, 7)[:, :5], ids(1, 12, seed=3), ids(1, 1, seed=9)):
        generate(model, prompt, use_mtp=True)
    assert max(rounds) == 3
    assert {0, 3} < set(taken)  # none, some, all


def test_the_end_of_a_text_and_the_longest_length(make, ids):
    period = ids(1, 7)
    model = train(make("LS", 3, initializer_range=0.1), period.repeat(1, 4))
    for length in range(1, 7):
        expected = generate(model, period, max_new_tokens=length)
        assert torch.equal(generate(model, period, use_mtp=True, max_new_tokens=length), expected)
    for end in period[0, 1:5].tolist():
        expected = generate(model, period, eos_token_id=end)
        assert torch.equal(generate(model, period, use_mtp=True, eos_token_id=end), expected)


def test_sampling_follows_the_main_model(make, ids):
    """Each token is drawn from the main model: at a temperature near zero, the greedy one."""
    model = make("LS", 2)
    prompt = ids(1, 6)
    sampled = generate(model, prompt, use_mtp=True, do_sample=True, temperature=1e-4)
    assert torch.equal(sampled, generate(model, prompt))


def test_a_model_without_modules_says_so(make, ids):
    with pytest.raises(ValueError, match="num_mtp_layers is 0"):
        generate(make(modules=0), ids(1, 4), use_mtp=True)


def test_modules_without_experts_beside_experts():
    config = HybridConfig(
        layout="LS", ffn={"L": "E", "default": "-"}, hidden_size=32, vocab_size=61, num_mtp_layers=1
    )
    model = HybridForCausalLM(config)
    assert model.config._experts_implementation == "grouped_mm"
    assert model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.isfinite()
