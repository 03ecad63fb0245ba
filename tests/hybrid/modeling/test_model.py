"""The model as any other of transformers: initialisation, norms, precision, loading, PEFT, export."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

import hybrid

pytestmark = pytest.mark.compat

MIXERS = {
    "S": {"num_heads": 2, "num_kv_heads": 1},
    "L": {"num_heads": 2},
    "C": {"type": "lightning_attention", "num_heads": 2, "conv_size": 3},
}
SMALL = {"mixers": MIXERS, "feed_forwards": {"-": {"intermediate_size": 24}}}


@pytest.fixture
def model(build):
    return build(layout="LCS", **SMALL)


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, use_cache=False, **kwargs).logits


# Initialisation: the spread of each kind of weight, on matrices large enough to measure it.


def spread(init, **config):
    """Measured std of each kind of weight in a wide model; expected within 3%."""
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        **{"vocab_size": 1000, "hidden_size": 256, "layout": "LS", "init": init, **config}
    )
    model = hybrid.HybridForCausalLM(config)
    found = {"embedding": model.model.embed_tokens.weight}
    for layer in model.model.layers:
        if layer.mixer is not None:
            found[f"{layer.symbols[0]}.q_proj"] = layer.mixer.q_proj.weight
            found[f"{layer.symbols[0]}.o_proj"] = layer.mixer.o_proj.weight
        if layer.ffn is not None:
            found["up_proj"] = layer.ffn.up_proj.weight
            found["down_proj"] = layer.ffn.down_proj.weight
    if not config.tie_word_embeddings:
        found["lm_head"] = model.lm_head.weight
    return model, {name: w.std().item() for name, w in found.items()}


def test_fixed_init_has_one_std():
    _, found = spread("fixed", initializer_range=0.05, tie_word_embeddings=False)
    assert len(found) == 8  # embedding, head, and three or four of each layer
    for name, std in found.items():
        assert std == pytest.approx(0.05, rel=0.03), name


def test_depth_scaled_init_divides_what_writes_to_the_residual_stream():
    """By sqrt of the number of residual branches: a mixer and a feed-forward in each of 2 layers."""
    model, found = spread("depth_scaled", initializer_range=0.05)
    assert model.config.stack.sizes.num_residual_branches == 4
    for name, std in found.items():
        expected = 0.05 / 2 if name.endswith(("o_proj", "down_proj")) else 0.05
        assert std == pytest.approx(expected, rel=0.03), name


def test_depth_scaled_init_counts_literal_layers():
    model, found = spread("depth_scaled", initializer_range=0.05, layout="LS-")
    assert model.config.stack.sizes.num_residual_branches == 3  # two mixers, one feed-forward
    for name in ("L.o_proj", "S.o_proj", "down_proj"):
        assert found[name] == pytest.approx(0.05 / math.sqrt(3), rel=0.03)


def test_xavier_init_depends_on_the_shape():
    _, found = spread("xavier", initializer_range=0.05, tie_word_embeddings=False)
    inner = 704  # 8/3 of 256, rounded up to a multiple of 32
    assert found["L.q_proj"] == pytest.approx(math.sqrt(2 / 512), rel=0.03)
    assert found["up_proj"] == pytest.approx(math.sqrt(2 / (256 + inner)), rel=0.03)
    assert found["down_proj"] == pytest.approx(math.sqrt(2 / (256 + inner)), rel=0.03)
    assert found["embedding"] == pytest.approx(0.05, rel=0.03)
    assert found["lm_head"] == pytest.approx(0.05, rel=0.03)


def test_norms_start_at_one_and_biases_at_zero():
    torch.manual_seed(0)
    mixers = {"S": {"num_heads": 2, "bias": True, "output_bias": True}}
    config = hybrid.HybridConfig(
        vocab_size=50, hidden_size=32, layout="S", norm="layernorm", mixers=mixers
    )
    for name, weight in hybrid.HybridForCausalLM(config).named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name


def test_padding_embedding_is_zero_and_stays_so(build, ids):
    model = build(layout="LS", pad_token_id=3, tie_word_embeddings=False, **SMALL)
    weight = model.model.embed_tokens.weight
    assert not weight[3].any()
    model(torch.full((1, 4), 3), labels=ids(1, 4)).loss.backward()
    assert not weight.grad[3].any()


# Norms.


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("position", ["pre", "post", "sandwich", "reordered"])
def test_norm_positions(build, ids, norm, position):
    """Each against its formula, written out for one layer."""
    model = build(layout="S", norm=norm, norm_position=position, **SMALL)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2.0)
    layer = model.model.layers[0]
    x = model.model.embed_tokens(ids(2, 7))
    positions = {s: r(x, torch.arange(7)[None]) for s, r in model.model.rotary.items()}
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]

    def mixer(h):
        return layer.mixer(h, attention_mask=causal, position_embeddings=positions["S"])[0]

    for f, residual in ((mixer, layer.mixer_residual), (layer.ffn, layer.ffn_residual)):
        n, m = residual.norm_in, residual.norm_out
        if position == "pre":
            x = x + f(n(x))
        elif position == "post":
            x = m(x + f(x))
        elif position == "sandwich":
            x = x + m(f(n(x)))
        else:
            x = x + m(f(x))
    kind = nn.RMSNorm if norm == "rmsnorm" else nn.LayerNorm
    assert (position == "post") == isinstance(model.model.norm, nn.Identity)
    assert position == "post" or isinstance(model.model.norm, kind)
    assert_close(model.lm_head(model.model.norm(x)), model(ids(2, 7)).logits)


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_parallel_mixers_are_combined(build, ids, combine):
    model = build(layout="[LC]", ffn="", parallel_combine=combine, **SMALL)
    layer = model.model.layers[0]
    x = model.model.embed_tokens(ids(2, 7))
    h, _ = layer.mixer_residual.enter(x)
    total = sum(branch(h)[0] for branch in layer.mixer.branches)
    expected = x + (total / 2 if combine == "mean" else total)
    assert_close(model.model(ids(2, 7)).last_hidden_state, model.model.norm(expected))


# Attention implementations.


# transformers' flex mask passes a deprecated flag, its import of the compiler finds deprecated parts of
# torch, and without compilation torch warns that flex is slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(build, ids, implementation, side):
    model = build(dtype=torch.float32, layout="LSS", **SMALL)
    x, mask = ids(3, 16), torch.ones(3, 16, dtype=torch.long)
    if side:
        for i, n in enumerate((0, 3, 7)):
            mask[i, slice(0, n) if side == "left" else slice(16 - n, 16)] = 0
    real = mask.bool()
    model.set_attn_implementation("eager")
    expected = logits(model, x, attention_mask=mask)[real]
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.compiler.set_stance("force_eager"):  # a minute of compilation otherwise
        found = logits(model, x, attention_mask=mask)[real]
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_in_every_implementation(build, ids, implementation):
    model = build(layout="LS", **SMALL)
    model.set_attn_implementation(implementation)
    x = ids(1, 11)
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    alone = torch.cat([logits(model, x[:, :4]), logits(model, x[:, 4:])], dim=1)
    assert_close(logits(model, x, position_ids=positions), alone)


def test_a_custom_mask_for_a_softmax_stack(build, ids):
    """A 4-dimensional mask is used as it is: here a shared prefix with two branches."""
    model = build(layout="SS", **SMALL)
    prefix, a, b = ids(1, 4), ids(1, 2, seed=1), ids(1, 2, seed=2)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[6:, 4:6] = False
    bias = torch.zeros(1, 1, 8, 8, dtype=torch.float64).masked_fill(~mask, -1e30)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    x = torch.cat([prefix, a, b], dim=1)
    tree = logits(model, x, attention_mask=bias, position_ids=positions)
    assert_close(tree[:, 4:6], logits(model, torch.cat([prefix, a], dim=1))[:, 4:])
    assert_close(tree[:, 6:], logits(model, torch.cat([prefix, b], dim=1))[:, 4:])


def test_a_custom_mask_is_refused_where_a_state_would_ignore_it(model, ids):
    with pytest.raises(ValueError, match="no meaning for layers that carry a state"):
        model(ids(1, 4), attention_mask=torch.zeros(1, 1, 4, 4, dtype=torch.float64))


# Outputs.


def test_hidden_states_and_attentions(build, ids):
    model = build(layout="LS[LS]", attn_implementation="eager", **SMALL)
    out = model(ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids(2, 7)))
    assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert [tuple(a.shape) for a in out.attentions] == [
        (2, 2, 7, 7)
    ] * 2  # layers without have none
    assert_close(out.attentions[0].sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))


def test_tuples_and_input_embeddings(model, ids, assert_close_to_rounding):
    x = ids(2, 7)
    embeds = model.get_input_embeddings()(x)
    assert_close_to_rounding(logits(model, None, inputs_embeds=embeds), logits(model, x))
    assert_close_to_rounding(model(x, return_dict=False)[0], model(x).logits)
    assert AutoModel.from_config(model.config).get_input_embeddings() is not None
    with pytest.raises(ValueError, match="exactly one of"):
        model(x, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of"):
        model()


def test_loss_is_the_mean_over_predicted_tokens(model, ids):
    x, labels = ids(2, 7), ids(2, 7, seed=1)
    labels[0, 3:] = -100
    flat = logits(model, x)[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
    assert_close(model(x, labels=labels).loss, expected)


# Embeddings.


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(
    build, ids, tied, tmp_path, assert_same_weights, assert_close_to_rounding
):
    model = build(layout="LS", tie_word_embeddings=tied, **SMALL)
    x = ids(2, 7)
    before = logits(model, x)
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_close(logits(model, x)[..., :61], before)
    assert model(torch.full((1, 3), 69), labels=torch.full((1, 3), 69)).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert_close_to_rounding(logits(again, x), logits(model, x))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_a_tied_checkpoint_can_be_untied(build, tmp_path):
    model = build(layout="LS", tie_word_embeddings=True, **SMALL)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_the_body_alone_loads_from_a_whole_model_and_back(
    model, ids, tmp_path, assert_same_weights, assert_close_to_rounding
):
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(body, hybrid.HybridModel)
    x = ids(2, 7)
    with torch.no_grad():
        assert_same_weights(body, model.model)
        assert_close_to_rounding(body(x).last_hidden_state, model.model(x).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert_same_weights(again, model)
    assert_close_to_rounding(logits(again, x), logits(model, x))


# Precision and placement.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["LCS", "[LS]", "LL"])
def test_low_precision_load_is_near_and_generates(build, ids, dtype, layout, tmp_path):
    model = build(dtype=torch.float32, layout=layout, initializer_range=0.05, **SMALL)
    model.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert {b.dtype for b in low.buffers()} <= {torch.float32}  # decays and frequencies
    x = ids(2, 20)
    a, b = logits(model, x), logits(low, x)
    assert b.dtype == dtype
    assert (a - b.float()).square().mean().sqrt() <= 0.05 * a.square().mean().sqrt()
    out = low.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 25)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(
    model, ids, device_map, tmp_path, assert_same_weights, assert_close_to_rounding
):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert_same_weights(again, model)
    assert_close_to_rounding(logits(again, ids(2, 7)), logits(model, ids(2, 7)))


def test_layers_offloaded_to_disk(model, ids, tmp_path, assert_close_to_rounding):
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary": "cpu", "model.layers.0": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert again.model.layers[1].mixer.q_proj.weight.device.type == "meta"
    assert_close_to_rounding(logits(again, ids(2, 7)), logits(model, ids(2, 7)))


def test_built_on_the_meta_device_and_filled_from_a_checkpoint(
    model, ids, tmp_path, assert_same_weights, assert_close_to_rounding
):
    with torch.device("meta"):
        empty = hybrid.HybridForCausalLM(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert_close_to_rounding(logits(again, ids(2, 7)), logits(model, ids(2, 7)))


def test_copies(model, ids, tmp_path, assert_same_weights, assert_close_to_rounding):
    x = ids(2, 7)
    expected = logits(model, x)
    twin = copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model))
    for other in (twin, restored):
        assert_same_weights(other, model)
        assert_close_to_rounding(logits(other, x), expected)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    assert torch.equal(logits(model, x), expected)


# Training.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(build, ids, use_reentrant):
    model = build(layout="LC[LS]", **SMALL).train()
    x = ids(2, 9)
    model(x, labels=x).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    old_name = model.gradient_checkpointing_enable  # until transformers 5.2x
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # without it nothing enters a reentrant checkpoint
    runs = []
    model.model.layers[0].mixer.register_forward_hook(lambda *_: runs.append(1))
    model(x, labels=x).loss.backward()
    assert len(runs) == 2  # once forward, once again for the backward
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name])


def test_dropout_only_in_training(build, ids):
    mixers = {"S": {"num_heads": 2, "dropout": 0.5}}
    model = build(layout="S", mixers=mixers)
    x = ids(1, 9)
    assert torch.equal(logits(model, x), logits(model, x))
    model.train()
    assert not torch.equal(logits(model, x), logits(model, x))


# peft asks by the older of two names
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_saves_and_loads(build, ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = build(dtype=torch.float32, layout="LS", **SMALL)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    tuned = peft.get_peft_model(model, config)
    x = ids(2, 9)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert len(trained) == 8  # A and B of q_proj and v_proj in two layers
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = tuned(x, labels=x).loss
    before.backward()
    optimizer.step()
    assert tuned(x, labels=x).loss < before
    tuned.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(logits(again, x), logits(tuned, x))
    merged = again.merge_and_unload()
    assert_close(logits(merged, x), logits(tuned, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["LL", "SS", "LCS"])
def test_exported(build, ids, layout):
    model = build(dtype=torch.float32, layout=layout, **SMALL)
    x = ids(2, 16)
    program = torch.export.export(model, (x,), {"use_cache": False}, strict=False)
    assert_close(program.module()(x, use_cache=False).logits, logits(model, x))


@pytest.mark.parametrize(("ffn", "experts"), [("-", False), ("-E", True)])
def test_what_only_experts_have_is_claimed_for_experts_only(build, ffn, experts):
    feed_forwards = {"E": {"num_experts": 4, "top_k": 2, "score_correction_bias": True}}
    model = build(layout="LS", ffn=ffn, mixers=MIXERS, feed_forwards=feed_forwards)
    assert model._can_set_experts_implementation() == experts
    assert model._keep_in_fp32_modules_strict == ({"score_correction_bias"} if experts else set())


# Padding.


class Waits(TorchDispatchMode):
    """Counts how often a value is read from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_padded_prefill_asks_the_mask_once(build, ids):
    model = build(layout="LL", **SMALL)
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    counts = []
    for given in (mask, None):
        call = {"attention_mask": given, "position_ids": positions if given is not None else None}
        with torch.no_grad(), Waits() as waits:
            model.model._segments(*call.values(), None, 2, 9)
        counts.append(waits.count)
    assert counts == [1, 0]
    with torch.no_grad():
        found = model(x, attention_mask=mask, position_ids=positions).logits[0, 3:]
        assert_close(found, model(x[:1, 3:]).logits[0])
