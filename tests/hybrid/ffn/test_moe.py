"""`mixture_of_experts` alone, in the model, and under bad configs; see also test_moe_published.py."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hybrid import HybridConfig
from hybrid.ffn import balance
from hybrid.ffn.moe import MixtureOfExperts
from hybrid.ffn.moe_options import MoEOptions
from hybrid.train.optim import decaying

D, WIDTH, E, K = 32, 24, 8, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BACKENDS = ("eager", "batched_mm", "grouped_mm")
OPTIONS = {
    "num_experts": 6,
    "top_k": 2,
    "intermediate_size": 16,
    "num_shared_experts": 1,
    "shared_gate": True,
    "bias_update_rate": 0.01,
}


@pytest.mark.parametrize("implementation", BACKENDS[1:])
def test_the_backend_of_that_name_runs(layer, monkeypatch, implementation):
    calls = []
    original = ALL_EXPERTS_FUNCTIONS[implementation]

    def spy(*args):
        calls.append(implementation)
        return original(*args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, implementation, spy)
    layer({}, implementation).eval()(torch.zeros(1, 2, D))
    assert calls == [implementation]


@pytest.mark.parametrize(
    "more",
    [
        {"activation": "relu2", "bias": True},
        {"activation": "geglu", "latent_size": 16},
        {"activation": "clamped_swiglu", "bias": True, "router_bias": True},
    ],
)
def test_backends_agree_for_other_options(layer, more):
    options = {"num_experts": E, "intermediate_size": WIDTH, **more}
    x = torch.randn(2, 9, D)
    outputs = []
    for implementation in BACKENDS:
        torch.manual_seed(0)
        moe = layer(options, implementation)
        for p in moe.parameters():
            torch.nn.init.normal_(p, std=0.3)
        outputs.append(moe(x))
    for found in outputs[1:]:
        assert_close(found, outputs[0], **CLOSE)


def test_group_score_of_deepseek_v2_is_the_best_of_a_group(layer):
    options = {"num_experts": 4, "top_k": 1, "num_groups": 2, "top_k_groups": 1}
    scores = torch.tensor([[0.6, 0.0, 0.5, 0.4]])
    for group_score, expert in (("max", 0), ("top2", 2)):
        router = layer({**options, "group_score": group_score}).router
        assert router.choose(scores).tolist() == [[expert]]


def test_the_bias_chooses_and_does_not_weigh(layer):
    moe = layer({"num_experts": 4, "top_k": 1, "normalize_weights": False, **sigmoid()})
    torch.nn.init.zeros_(moe.router.weight)
    moe.router.score_correction_bias[3] = 1.0
    _, weights, indices = moe.router(torch.randn(5, D))
    assert indices.flatten().tolist() == [3] * 5
    assert_close(weights, torch.full((5, 1), 0.5))


def sigmoid():
    return {"score_function": "sigmoid", "score_correction_bias": True}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_is_computed_in_float32(layer, autocast):
    """In bfloat16 the scores of two experts this near would be equal."""
    moe = layer({"num_experts": 2, "top_k": 1}).to(torch.float32 if autocast else torch.bfloat16)
    torch.nn.init.ones_(moe.router.weight)
    with torch.no_grad():
        moe.router.weight[1, 0] += 2**-7
    x = torch.ones(1, D, dtype=moe.router.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, weights, indices = moe.router(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert logits[0].tolist() == [D, D + 2**-7]
    assert indices.item() == 1


# In the model.


@pytest.fixture
def stack(build):
    """Two mixers with a mixture of experts each, in float64."""
    return build(layout="LS", ffn="E", feed_forwards={"E": OPTIONS})


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def test_causality(stack, ids):
    x = ids(2, 15)
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % stack.config.vocab_size
    before, after = logits(stack, x), logits(stack, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_rows_packed_documents_and_splits_do_not_meet(stack, ids):
    close = {"rtol": 1e-8, "atol": 1e-9}
    x = ids(3, 15)
    whole = logits(stack, x)
    assert_close(whole[1:2], logits(stack, x[1:2]), **close)
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(3, 15)
    packed = logits(stack, x, position_ids=positions)
    assert_close(packed[:, 6:], logits(stack, x[:, 6:]), **close)
    cache = DynamicCache(config=stack.config)
    with torch.no_grad():
        pieces = [stack(p, past_key_values=cache).logits for p in x.split([7, 1, 7], dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole, **close)


def test_gradcheck_of_the_layer(stack):
    x = torch.randn(1, 4, stack.config.hidden_size, dtype=torch.float64, requires_grad=True)
    ffn = stack.model.layers[0].ffn
    assert torch.autograd.gradcheck(lambda x: ffn(x).sin().sum(), (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit_with_the_bias(
    build, ids, tmp_path, dtype, assert_same_weights, assert_close_to_rounding
):
    model = build(dtype=dtype, layout="LS", ffn="E", feed_forwards={"E": OPTIONS})
    bias = model.model.layers[1].ffn.router.score_correction_bias
    bias.copy_(torch.randn(6))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    router = again.model.layers[1].ffn.router
    assert router.score_correction_bias.dtype == torch.float32
    assert_same_weights(again, model)
    x = ids(2, 9)
    assert_close_to_rounding(logits(again, x), logits(model, x))


def test_generate_with_every_backend(build, ids):
    model = build(dtype=torch.float32, layout="LS", ffn="E", feed_forwards={"E": OPTIONS})
    texts = []
    for implementation in BACKENDS:
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        texts.append(model.generate(ids(2, 5), max_new_tokens=8, do_sample=False))
    assert texts[0].shape == (2, 13)
    assert all(torch.equal(t, texts[0]) for t in texts)


def test_an_unknown_backend_is_named(build):
    with pytest.raises(ValueError, match="quick_mm"):
        build(layout="S", ffn="E", experts_implementation="quick_mm")


def test_layouts_with_dense_layers_first():
    config = HybridConfig(layout="L4S", ffn="-E4", hidden_size=D)
    assert [layer.ffn for layer in config.layers] == list("-EEEE")


@pytest.mark.parametrize("init", ["fixed", "depth_scaled", "xavier"])
def test_experts_start_as_dense_layers_do(build, init):
    model = build(layout="S", ffn="E-", init=init, num_hidden_layers=2, hidden_size=64)
    moe, dense = (layer.ffn for layer in model.model.layers)
    share = (2 / (64 + moe.options.intermediate_size)) ** 0.5 if init == "xavier" else None
    down = dense.down_proj.weight.std().item() if share is None else share
    assert moe.experts.down_proj.std().item() == pytest.approx(down, rel=0.05)
    assert moe.router.weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_biases_start_at_zero_and_do_not_decay(build):
    options = {"num_experts": E, "intermediate_size": WIDTH, "bias": True, "router_bias": True}
    model = build(layout="S", ffn="E", feed_forwards={"E": options})
    biases = {n: p for n, p in model.named_parameters() if "bias" in n}
    assert sorted(n.split("ffn.")[1] for n in biases) == [
        "experts.down_proj_bias",
        "experts.gate_up_proj_bias",
        "router.bias",
    ]
    assert all((p == 0).all() for p in biases.values())
    assert not set(biases) & set(decaying(model))
    assert "model.layers.0.ffn.experts.down_proj" in decaying(model)


def test_the_way_through_a_latent_space_is_scaled_with_depth_once(build):
    options = {"num_experts": E, "intermediate_size": 64, "latent_size": 64}
    model = build(layout="SS", ffn="E", feed_forwards={"E": options}, hidden_size=64)
    moe = model.model.layers[0].ffn
    assert moe.latent_out.weight.std().item() == pytest.approx(0.3 / 2, rel=0.05)
    assert moe.experts.down_proj.std().item() == pytest.approx(0.3, rel=0.05)


# transformers 5.17 cannot compile the gradient of grouped products in float32.
COMPILED_GRADIENT = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_without_graph_breaks(build, ids, training):
    torch.compiler.reset()
    options = {**OPTIONS, "balance_loss": 0.1}
    model = build(dtype=torch.float32, layout="S", ffn="E", feed_forwards={"E": options})
    if not COMPILED_GRADIENT:
        model.set_experts_implementation("batched_mm")
    x = ids(2, 9)
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (m(x, labels=x, use_cache=False) for m in (compiled, model))
    assert_close(found.loss, expected.loss, **CLOSE)
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_router_logits_on_request(stack, ids):
    out = stack(ids(2, 5), output_router_logits=True)
    assert [tuple(x.shape) for x in out.router_logits] == [(10, 6)] * 2
    assert stack(ids(2, 5)).router_logits is None


def test_defaults_fill_in_the_widths(layer):
    done = MoEOptions(num_shared_experts=1).complete(768)
    assert done.intermediate_size == done.shared_intermediate_size == 672  # 8 * 768 / 3 / 3, by 32
    assert isinstance(layer({}), MixtureOfExperts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k: expected at most num_experts 8, got 9"),
        ({"num_groups": 3}, "num_groups: expected a divisor of num_experts 8, got 3; try 2 or 4"),
        ({"num_groups": 16}, "num_groups: expected a divisor of num_experts 8, got 16; try 8"),
        (
            {"num_groups": 4, "top_k_groups": 5},
            "top_k_groups: expected at most num_groups 4, got 5",
        ),
        ({"num_groups": 4, "top_k": 3}, "top_k: expected at most 2, the experts in top_k_groups"),
        (
            {"num_groups": 8, "top_k_groups": 2},
            "group_score: expected 'max' for groups of one expert",
        ),
        ({"score_function": "softmx"}, "score_function: .* try 'softmax'"),
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"balance_loss": -1}, "balance_loss: expected at least 0"),
        ({"scaling_factor": 0}, "scaling_factor: expected above 0"),
        ({"normalize_epsilon": -1}, "normalize_epsilon: expected above 0"),
        ({"latent_size": 0}, "latent_size: expected at least 1"),
        ({"activation": "clamped_swiglu", "swiglu_limit": 0}, "swiglu_limit: expected above 0"),
        (
            {"activation": "clamped_swiglu", "num_shared_experts": 1},
            "activation: expected another than 'clamped_swiglu'",
        ),
        ({"activation": "clamped_swigl"}, "activation: .* try 'clamped_swiglu'"),
        ({"shared_gate": True}, "shared_gate: expected the default with num_shared_experts: 0"),
        ({"num_expert": 4}, "num_expert: unknown key, did you mean 'num_experts'"),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=f"feed_forwards.E.{message}"):
        HybridConfig(layout="S", ffn="E", feed_forwards={"E": options})


def test_no_router_is_asked_where_there_is_none(build, ids):
    model = build(layout="S").train()
    assert not balance.routers(model)
    assert "aux_loss" not in model(ids(1, 4), labels=ids(1, 4))
