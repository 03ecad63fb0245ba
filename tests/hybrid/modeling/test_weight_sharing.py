"""Layers that share weights: tied at every depth, counted once, and Zamba2 made of them."""

import copy
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.models.zamba2 import modeling_zamba2

import hybrid
from hybrid.layout import LayoutError, resolve
from hybrid.modeling.weight_sharing import AdaptedLinear
from hybrid.plan import plan

D = 32
MIXERS = {"S": {"num_heads": 2}, "L": {"num_heads": 2}, "M": {"num_heads": 4, "head_dim": 8}}
EXPERTS = {"num_experts": 4, "top_k": 1, "intermediate_size": 8}
SMALL = {"mixers": MIXERS, "feed_forwards": {"-": {"intermediate_size": 24}, "E": EXPERTS}}
LORA = {"lora_rank": 3, "lora_targets": ["q_proj", "gate_proj", "up_proj"]}


def test_one_block_at_every_depth(build, ids, assert_close_to_rounding):
    """The universal transformer: the same layer again and again."""
    shared, own = (build(layout="S3", **SMALL, **c) for c in ({"shared": {"S": {}}}, {}))
    for layer in own.model.layers:
        layer.load_state_dict(shared.model.layers[0].state_dict())
    own.model.embed_tokens.load_state_dict(shared.model.embed_tokens.state_dict())
    assert_close_to_rounding(shared(ids(2, 7)).logits, own(ids(2, 7)).logits)


def test_blocks_take_turns(build):
    model = build(layout="SLS2LS", shared={"S": {"blocks": 2, **LORA}}, **SMALL)
    layers = [layer for layer in model.model.layers if layer.symbols == ("S",)]
    for i, layer in enumerate(layers):
        block = layers[i % 2]
        pairs = zip(layer.named_parameters(), block.named_parameters(), strict=True)
        for (name, a), (_, b) in pairs:
            assert (a is b) == (i < 2 or "lora" not in name), name
    assert layers[0].mixer.q_proj.weight is not layers[1].mixer.q_proj.weight
    first, last = (model.model.layers[i].mixer for i in (1, 4))
    assert first.q_proj.weight is not last.q_proj.weight  # only S shares


def test_gradients_add_up_and_a_step_keeps_the_tie(build, ids):
    x = ids(2, 9)
    shared, own = (build(layout="S3", **SMALL, **c) for c in ({"shared": {"S": {}}}, {}))
    for layer in own.model.layers:
        layer.load_state_dict(shared.model.layers[0].state_dict())
    own.model.embed_tokens.load_state_dict(shared.model.embed_tokens.state_dict())
    for model in (shared, own):
        model(x, labels=x).loss.backward()
    for name, parameter in shared.model.layers[0].named_parameters():
        each = [dict(layer.named_parameters())[name].grad for layer in own.model.layers]
        assert_close(parameter.grad, sum(each))
    torch.optim.SGD(shared.parameters(), lr=0.1).step()
    first, last = shared.model.layers[0], shared.model.layers[2]
    assert torch.equal(first.ffn.up_proj.weight, last.ffn.up_proj.weight)


def test_adapters_begin_as_nothing_and_learn(build, ids, assert_close_to_rounding):
    x, block = ids(2, 9), {"S": {"blocks": 1, **LORA}}
    model, plain = build(layout="S2", shared=block, **SMALL), build(
        layout="S2", shared={"S": {}}, **SMALL
    )  # fmt: skip
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if "lora" not in n})
    assert_close_to_rounding(model(x).logits, plain(x).logits)
    model(x, labels=x).loss.backward()
    adapters = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    assert len(adapters) == 6
    assert all(m.lora_b.weight.grad.abs().sum() > 0 for m in adapters)


def test_an_adapter_is_a_product_of_two_matrices(build, awake):
    model = awake(build(layout="S2", shared={"S": LORA}, **SMALL))
    adapted = model.model.layers[1].mixer.q_proj
    x = torch.randn(2, D, dtype=torch.float64)
    weight = adapted.weight + adapted.lora_b.weight @ adapted.lora_a.weight
    assert_close(adapted(x), x @ weight.T)
    ffn = model.model.layers[1].ffn  # as of a fused projection: one A
    assert ffn.gate_proj.lora_a.weight is ffn.up_proj.lora_a.weight
    assert ffn.gate_proj.lora_b.weight is not ffn.up_proj.lora_b.weight


@pytest.mark.parametrize("tie", [True, False])
def test_saved_once_and_tied_again(
    build, awake, ids, tmp_path, tie, assert_same_weights, assert_close_to_rounding
):
    block = {"S": {"blocks": 2, "depth_projection": True, "output": "add", **LORA}}
    model = awake(build(layout="S4", shared=block, tie_word_embeddings=tie, **SMALL))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    again = hybrid.HybridForCausalLM.from_pretrained(tmp_path)
    assert stored == again.num_parameters() == model.num_parameters()
    assert_same_weights(again, model)
    assert_close_to_rounding(again(ids(2, 7)).logits, model(ids(2, 7)).logits)
    for found in (again, copy.deepcopy(model)):
        first, last = found.model.layers[1], found.model.layers[3]
        assert first.mixer.v_proj.weight is last.mixer.v_proj.weight
        assert first.depth_projection.weight is not last.depth_projection.weight
    body = hybrid.HybridModel.from_pretrained(tmp_path)
    assert body.layers[1].ffn.up_proj.weight is body.layers[3].ffn.up_proj.weight


@pytest.mark.parametrize("output", ["replace", "add", "next"])
def test_what_becomes_of_the_output(build, ids, output):
    block = {"S": {"depth_projection": True, "concat_embeddings": True, "output": output}}
    model = build(layout="LSL", ffn="", shared=block, **SMALL)
    a, b, c = model.model.layers
    e = model.model.embed_tokens(ids(2, 7))
    call = {
        "attention_mask": {"full_attention": torch.ones(7, 7, dtype=torch.bool).tril()[None, None]},
        "position_embeddings": {
            s: r(e, torch.arange(7)[None]) for s, r in model.model.rotary.items()
        },
    }
    x = a(e, **call)
    h = b.mixer_residual.norm_in(torch.cat([x, e], dim=-1))
    softmax = {"attention_mask": call["attention_mask"]["full_attention"]}
    positions = call["position_embeddings"]["S"]
    y = b.depth_projection(x + b.mixer(h, position_embeddings=positions, **softmax)[0])
    if output == "next":
        x = x + c.mixer(c.mixer_residual.norm_in(x + y))[0]
    else:
        x = c(x + y if output == "add" else y, **call)
    assert_close(model.model(ids(2, 7)).last_hidden_state, model.model.norm(x))


# Cost.


def test_weights_are_counted_once_and_work_at_every_depth(build):
    config = {"layout": "S4", **SMALL}
    shared, one, four = (
        build(**c) for c in ({**config, "shared": {"S": {}}}, {**config, "layout": "S"}, config)
    )
    costs = [plan(m.config, 64) for m in (shared, one, four)]
    assert costs[0].parameters == shared.num_parameters() == costs[1].parameters
    assert costs[0].flops_per_token == costs[2].flops_per_token
    assert costs[0].kv_bytes_per_token == costs[2].kv_bytes_per_token


def test_what_a_depth_has_to_itself_is_counted():
    config = {"layout": "S4", "hidden_size": D, "vocab_size": 61, **SMALL}
    own = {"lora_rank": 3, "lora_targets": ["gate_proj", "up_proj"], "depth_projection": True}
    cost, without = (
        plan(hybrid.HybridConfig(**config, shared={"S": s}), 64) for s in ({**own}, {})
    )
    a, b, projection = 3 * D, 3 * 24, D * D
    assert cost.parameters - without.parameters == 4 * (a + 2 * b + projection)
    # A is multiplied for the gate and for what it gates
    assert cost.flops_per_token - without.flops_per_token == 2 * 4 * (2 * a + 2 * b + projection)


def test_the_active_share_of_a_shared_mixture_of_experts():
    config = {"hidden_size": D, "vocab_size": 61, "ffn": "E", **SMALL}
    shared = plan(hybrid.HybridConfig(layout="S4", shared={"S": {}}, **config))
    one = plan(hybrid.HybridConfig(layout="S", **config))
    assert shared.active_parameters == one.active_parameters < shared.parameters


# Feed-forwards by symbol, which let a block have one where the other layers have none.


@pytest.mark.parametrize(
    ("layout", "ffn", "expected"),
    [
        ("MSM", {"S": "-", "default": ""}, "M S- M"),
        ("MSMS", {"S": "E"}, "M- SE M- SE"),
        ("MSMS", {"S": "E-", "M": ""}, "M SE M S-"),
        ("[MS]S", {"S": "E", "default": "-"}, "[MS]E SE"),
        ("[MS]S", {"S": "E", "M": "-"}, "[MS]- SE"),
    ],
)
def test_feed_forwards_by_symbol(layout, ffn, expected):
    assert " ".join(map(str, resolve(layout, ffn))) == expected


@pytest.mark.parametrize(
    ("layout", "ffn", "message"),
    [
        ("MS", {"S": "-E"}, "ffn.S: a pattern of 2 feed-forwards for 1 layers"),
        ("MS", {"defualt": "-"}, "a symbol is one character"),
        ("MS", {"S": "M"}, "'M' is no feed-forward"),
        ("M-S", {"S": "-"}, "names its own feed-forwards"),
    ],
)
def test_wrong_feed_forwards_by_symbol(layout, ffn, message):
    with pytest.raises(LayoutError, match=re.escape(message)):
        resolve(layout, ffn)
    with pytest.raises(hybrid.ConfigError, match=re.escape(message)):
        hybrid.HybridConfig(layout=layout, ffn=ffn)


def test_feed_forwards_by_symbol_survive_the_round_trip(tmp_path):
    config = hybrid.HybridConfig(layout="LSLS", ffn={"S": "-", "default": ""})
    config.save_pretrained(tmp_path)
    again = hybrid.HybridConfig.from_pretrained(tmp_path)
    assert again.ffn == config.ffn
    assert [layer.ffn for layer in again.layers] == [None, "-", None, "-"]


# Zamba2.


def zamba2(adapters, rope):
    """A small one of transformers' with random weights, and ours with the same."""
    torch.manual_seed(2)
    kinds = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"]
    config = modeling_zamba2.Zamba2Config(
        vocab_size=61, hidden_size=D, num_hidden_layers=5, layers_block_type=kinds,
        mamba_d_state=6, mamba_ngroups=2, n_mamba_heads=4, chunk_size=8, intermediate_size=24,
        num_attention_heads=2, num_mem_blocks=2, adapter_rank=3, use_mem_rope=rope,
        use_shared_attention_adapter=adapters, pad_token_id=None,
    )  # fmt: skip
    theirs = modeling_zamba2.Zamba2ForCausalLM(config).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    targets = ["gate_proj", "up_proj", *(["q_proj", "k_proj", "v_proj"] if adapters else [])]
    ours = hybrid.HybridForCausalLM(
        hybrid.HybridConfig(
            vocab_size=61, hidden_size=D, norm_eps=1e-5, layout="M ZM ZM M ZM",
            ffn={"Z": "-", "default": ""},
            mixers={
                "M": {"num_heads": 4, "head_dim": 16, "state_size": 6, "num_groups": 2,
                      "dt_limit": [0.001, float("inf")]},
                "Z": {"type": "softmax_attention", "num_heads": 2, "scale": (D / 2) ** -0.5,
                      "rope_parameters": config.rope_parameters if rope else None},
            },
            feed_forwards={"-": {"intermediate_size": 24, "activation": "geglu"}},
            residuals={"Z": {"skip_multiplier": 0.0}},
            shared={"Z": {"blocks": 2, "lora_rank": 3, "lora_targets": targets, "output": "next",
                          "concat_embeddings": True, "depth_projection": True}},
        )
    ).double().eval()  # fmt: skip
    place, block, weights = 0, 0, {"lm_head.weight": theirs.lm_head.weight}
    for layer in theirs.model.layers:
        if hasattr(layer, "shared_transformer"):
            found = zamba2_block(layer, block)
            weights |= {f"model.layers.{place}.{name}": w for name, w in found.items()}
            place, block, layer = place + 1, block + 1, layer.mamba_decoder
        weights |= {f"model.layers.{place}.{name}": w for name, w in zamba2_mamba(layer).items()}
        place += 1
    weights["model.embed_tokens.weight"] = theirs.model.embed_tokens.weight
    weights["model.norm.weight"] = theirs.model.final_layernorm.weight
    ours.load_state_dict(weights)
    return ours, theirs


def zamba2_block(layer, number):
    """The parts of the number-th layer of shared weights by our names."""
    block = layer.shared_transformer
    attention, mlp = block.self_attn, block.feed_forward
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    a, b = mlp.gate_up_proj_adapter_list[number]
    gate_b, up_b = b.weight.chunk(2)
    found = {
        "mixer_residual.norm_in.weight": block.input_layernorm.weight,
        "ffn_residual.norm_in.weight": block.pre_ff_layernorm.weight,
        "ffn.gate_proj.weight": gate, "ffn.up_proj.weight": up,
        "ffn.gate_proj.lora_a.weight": a.weight, "ffn.up_proj.lora_a.weight": a.weight,
        "ffn.gate_proj.lora_b.weight": gate_b, "ffn.up_proj.lora_b.weight": up_b,
        "ffn.down_proj.weight": mlp.down_proj.weight,
        "depth_projection.weight": layer.linear.weight,
    }  # fmt: skip
    for name in "qkvo":
        found[f"mixer.{name}_proj.weight"] = getattr(attention, f"{name}_proj").weight
        if adapters := getattr(attention, f"linear_{name}_adapter_list", None):
            for part, linear in zip("ab", adapters[number], strict=True):
                found[f"mixer.{name}_proj.lora_{part}.weight"] = linear.weight
    return found


def zamba2_mamba(layer):
    mamba, inner, states = layer.mamba, 64, 12
    parts = mamba.in_proj.weight.split([inner, inner, states, states, 4])
    found = {
        f"mixer.{name}_proj.weight": part
        for name, part in zip(("gate", "v", "k", "q", "dt"), parts, strict=True)
    }
    for name in ("weight", "bias"):
        x, b, c = getattr(mamba.conv1d, name).split([inner, states, states])
        found[f"mixer.conv.{name}"] = torch.cat([c, b, x]).squeeze()
    found |= {f"mixer.{name}": getattr(mamba, name) for name in ("A_log", "D", "dt_bias")}
    found["mixer.norm.weight"] = mamba.norm.weight
    found["mixer.o_proj.weight"] = mamba.out_proj.weight
    found["mixer_residual.norm_in.weight"] = layer.input_layernorm.weight
    return found


@pytest.mark.parametrize(("adapters", "rope"), [(True, True), (False, False)])
def test_zamba2(ids, adapters, rope):
    ours, theirs = zamba2(adapters, rope)
    x = ids(2, 13)
    with torch.no_grad():
        expected = theirs(x, logits_to_keep=0).logits
        found = ours(x).logits
        cache = DynamicCache(config=ours.config)
        pieces = [ours(piece, past_key_values=cache).logits for piece in x.split([6, 1, 1, 5], 1)]
    # transformers' norms compute in float32
    assert (found - expected).abs().max() <= 1e-5 * expected.std()
    assert_close(torch.cat(pieces, dim=1), found)
    assert ours.num_parameters() == theirs.num_parameters()
    assert plan(ours.config).parameters == ours.num_parameters()


# Mistakes.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shared": {"Z": {}}}, "shared.Z: expected the symbol of a mixer or a feed-forward"),
        ({"shared": {"-": {}}}, "shared.-: expected the letter of a mixer, got '-'"),
        ({"shared": {"S": {"block": 2}}}, "shared.S.block: unknown key, did you mean 'blocks'"),
        ({"shared": {"S": {"blocks": 0}}}, "shared.S.blocks: expected at least 1, got 0"),
        ({"shared": {"S": {"lora_rank": 0}}}, "shared.S.lora_rank: expected at least 1"),
        (
            {"shared": {"S": {"blocks": 3}}},
            "expected at most 2, the number of layers of 'S', got 3",
        ),
        (
            {"layout": "[MS]", "shared": {"S": {}}},
            "expected layers with the one mixer 'S', got [MS]",
        ),
        (
            {"ffn": "-E", "layout": "SS", "shared": {"S": {}}},
            "expected one feed-forward for all layers of a block, got '-' and 'E'",
        ),
        (
            {"shared": {"S": {"output": "next"}}},
            "expected 'replace' or 'add' for the last layer, got 'next'",
        ),
        ({"shared": {"S": {"output": "nxt"}}}, "got 'nxt'; try 'next'"),
        (
            {"norm_position": "normed", "shared": {"S": {"concat_embeddings": True}}},
            "expected another norm_position than 'normed'",
        ),
        (
            {"mixers": {"S": {"num_heads": 3}}, "shared": {"S": {"concat_embeddings": True}}},
            "num_heads: expected a divisor of hidden_size 128, got 3",
        ),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(hybrid.ConfigError, match=re.escape(message)):
        hybrid.HybridConfig(**{"layout": "MSMS", "hidden_size": 64, **config})


def test_a_projection_that_is_not_there_is_named():
    config = hybrid.HybridConfig(
        hidden_size=D, vocab_size=7, layout="SS",
        shared={"S": {"lora_rank": 2, "lora_targets": ["query"]}}, **SMALL,
    )  # fmt: skip
    message = (
        "expected projections of 'S', got 'query'; try down_proj, gate_proj, k_proj, o_proj, q_proj"
    )
    with pytest.raises(ValueError, match=message):
        hybrid.HybridForCausalLM(config)
