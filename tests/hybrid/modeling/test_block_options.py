"""What stands around the mixers: norms, multipliers, mixers side by side, DeepNorm.

Formulas are written out again here, and the decoder layers of published models run beside ours with the
same parts in them, so that only what is around the parts can differ.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.minimax import modeling_minimax
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_next import modeling_qwen3_next

import hybrid

D = 32
MIXERS = {"S": {"num_heads": 2}, "L": {"num_heads": 2}, "M": {"num_heads": 2, "head_dim": 8}}
SMALL = {"mixers": MIXERS, "feed_forwards": {"-": {"intermediate_size": 24}}}


def randomized(module):
    """The module with every parameter drawn anew, norms around 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (parameter.ndim == 1))
    return module


def stream(ids, model):
    return model.model.embed_tokens(ids(2, 7))


def run_layer(model, x, number=0):
    """One of our layers on the stream x, and what its mixer and feed-forward do to their inputs."""
    layer = model.model.layers[number]
    time = x.shape[1]
    masks = {"full_attention": torch.ones(time, time, dtype=torch.bool).tril()[None, None]}
    positions = {s: r(x, torch.arange(time)[None]) for s, r in model.model.rotary.items()}
    call = {"attention_mask": masks["full_attention"]}

    def branch(mixer, symbol):
        return lambda h: mixer(h, position_embeddings=positions.get(symbol), **call)[0]

    mixers = layer.mixer.branches if len(layer.symbols) > 1 else [layer.mixer]
    found = layer(x, attention_mask=masks, position_embeddings=positions)
    return found, [branch(*pair) for pair in zip(mixers, layer.symbols, strict=True)], layer


# Norms.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centered_norm_of_gemma_and_qwen(build, dtype):
    model = build(layout="S", norm="zero_centered_rmsnorm", dtype=dtype, **SMALL)
    ours = model.model.norm
    assert not ours.weight.any()  # it starts as a plain norm
    randomized(ours)
    x = 3 * torch.randn(2, 5, D, dtype=dtype)
    for cls in (modeling_gemma3.Gemma3RMSNorm, modeling_qwen3_next.Qwen3NextRMSNorm):
        theirs = cls(D, eps=1e-6).to(dtype)
        theirs.load_state_dict(ours.state_dict())
        found, expected = ours(x), theirs(x)
        assert found.dtype == expected.dtype == dtype
        assert_close(found, expected)


def test_zero_centered_norm_stays_centred_when_loaded_and_trained(build, ids, tmp_path):
    model = build(layout="S", norm="zero_centered_rmsnorm", **SMALL)
    randomized(model)
    model.save_pretrained(tmp_path)
    again = hybrid.HybridForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    model(ids(2, 7), labels=ids(2, 7)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_norm_position_by_symbol(build, ids):
    """OLMo Hybrid: softmax layers normalise what leaves a branch, the others what enters."""
    position = {"S": "reordered", "default": "pre"}
    model = randomized(build(layout="LS", norm_position=position, **SMALL))
    x = stream(ids, model)
    found, (mixer,), layer = run_layer(model, x, 0)
    a, b = layer.mixer_residual, layer.ffn_residual
    y = x + mixer(a.norm_in(x))
    assert_close(found, y + layer.ffn(b.norm_in(y)))
    found, (mixer,), layer = run_layer(model, x, 1)
    a, b = layer.mixer_residual, layer.ffn_residual
    y = x + a.norm_out(mixer(x))
    assert_close(found, y + b.norm_out(layer.ffn(y)))


def test_a_feed_forward_named_does_not_follow_its_mixer(build):
    position = {"S": "reordered", "-": "sandwich"}
    model = build(layout="LS", norm_position=position, **SMALL)
    first, second = model.model.layers
    assert [first.mixer_residual.position, first.ffn_residual.position] == ["pre", "sandwich"]
    assert [second.mixer_residual.position, second.ffn_residual.position] == [
        "reordered", "sandwich"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("position", "ends"),
    [("post", True), ("normed", False), ({"-": "post"}, True), ({"S": "post", "-": "pre"}, False)],
)
def test_the_last_norm_is_left_out_where_the_stream_is_normalised(build, position, ends):
    model = build(layout="LS", norm_position=position, **SMALL)
    assert isinstance(model.model.norm, nn.Identity) == ends


# Multipliers.


def test_multipliers_of_one_branch(build, ids):
    residuals = {
        "S": {"input_multiplier": 0.5, "output_multiplier": 3.0, "skip_multiplier": 2.0},
        "-": {"output_multiplier": 0.1},
    }
    model = randomized(build(layout="S", residuals=residuals, **SMALL))
    x = stream(ids, model)
    found, (mixer,), layer = run_layer(model, x)
    y = 2.0 * x + 3.0 * mixer(0.5 * layer.mixer_residual.norm_in(x))
    assert_close(found, y + 0.1 * layer.ffn(layer.ffn_residual.norm_in(y)))


@pytest.mark.parametrize("position", ["reordered", "sandwich"])
def test_an_output_multiplier_stands_behind_the_norm(build, ids, position):
    residuals = {"default": {"output_multiplier": 3.0}}
    config = {"layout": "S", "ffn": "", "norm_position": position, **SMALL}
    model = randomized(build(residuals=residuals, **config))
    plain = build(**config)
    plain.load_state_dict(model.state_dict())
    x = stream(ids, model)
    scaled, unscaled = (run_layer(m, x)[0] for m in (model, plain))
    assert_close(scaled - x, 3.0 * (unscaled - x))


def test_a_stream_multiplied_by_zero_is_replaced(build, ids):
    model = build(layout="S", ffn="", residuals={"S": {"skip_multiplier": 0.0}}, **SMALL)
    x = stream(ids, model)
    found, (mixer,), layer = run_layer(model, x)
    assert_close(found, mixer(layer.mixer_residual.norm_in(x)))


def test_embedding_multipliers(build, ids, assert_close_to_rounding):
    x = ids(2, 7)
    model = build(layout="S", embedding_multiplier=12.0, **SMALL)
    plain = build(layout="S", **SMALL)
    embedded = plain.model.embed_tokens(x)
    assert_close(model.model.embed_tokens(x), 12.0 * embedded)
    # what is given as embeddings is taken as it is
    given = model(inputs_embeds=12.0 * embedded, use_cache=False).logits
    assert_close_to_rounding(given, model(x, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_square_root_is_rounded_as_gemmas(build, ids, dtype):
    model = build(layout="S", embedding_multiplier="sqrt_hidden_size", dtype=dtype, **SMALL)
    weight = model.model.embed_tokens.weight
    theirs = modeling_gemma3.Gemma3TextScaledWordEmbedding(*weight.shape, None, D**0.5).to(dtype)
    theirs.load_state_dict({"weight": weight})
    found = model.model.embed_tokens(ids(2, 7))
    assert torch.equal(found, theirs(ids(2, 7)))
    if dtype == torch.bfloat16:  # the rounding shows
        assert not torch.equal(found, model.model.embed_tokens.weight[ids(2, 7)] * D**0.5)


def test_logits_multiplier_is_in_the_logits_and_in_the_loss(build, ids):
    x = ids(2, 7)
    model, plain = build(layout="S", logits_multiplier=0.25, **SMALL), build(layout="S", **SMALL)
    logits = plain(x).logits / 4
    found = model(x, labels=x)
    assert_close(found.logits, logits)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert_close(found.loss, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_the_head_stays_tied_to_scaled_embeddings(build, tmp_path):
    config = {"embedding_multiplier": 12.0, "logits_multiplier": 0.25}
    model = build(layout="S", **config, **SMALL)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = hybrid.HybridForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert {k: getattr(again.config, k) for k in config} == config


def test_a_resized_vocabulary_keeps_the_multipliers(build, ids, assert_close_to_rounding):
    x = ids(2, 7)
    config = {"embedding_multiplier": 12.0, "logits_multiplier": 0.25}
    model = build(layout="S", **config, **SMALL)
    before = model(x).logits
    model.resize_token_embeddings(70)
    assert_close_to_rounding(model(x).logits[..., :61], before)


# Mixers side by side.


@pytest.mark.parametrize("combine", ["mean", "sum", "concat", "learned", "learned_scalar"])
def test_combinations(build, ids, combine):
    residuals = {
        "S": {"input_multiplier": 0.5, "output_multiplier": 3.0},
        "M": {"output_multiplier": -0.7},
    }
    model = build(layout="[MS]", ffn="", parallel_combine=combine, residuals=residuals, **SMALL)
    if combine == "learned_scalar":  # it starts as the mean
        assert_close(model.model.layers[0].mixer.weights, torch.full((2,), 0.5).double())
    randomized(model)
    x = stream(ids, model)
    found, (ssm, softmax), layer = run_layer(model, x)
    h = layer.mixer_residual.norm_in(x)
    a, b = -0.7 * ssm(h), 3.0 * softmax(0.5 * h)
    parts = layer.mixer
    if combine in ("mean", "sum"):
        y = (a + b) / (2 if combine == "mean" else 1)
    elif combine == "concat":
        y = torch.cat([a, b], dim=-1) @ parts.projection.weight.T
    elif combine == "learned":

        def rms_norm(v, weight):
            return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

        y = (rms_norm(a, parts.norms[0].weight) + rms_norm(b, parts.norms[1].weight)) / 2
    else:
        y = parts.weights[0] * a + parts.weights[1] * b
    assert_close(found, x + y)


@pytest.mark.parametrize("combine", ["concat", "learned", "learned_scalar"])
def test_learned_combinations_learn(build, ids, combine):
    model = build(layout="[MS]", parallel_combine=combine, **SMALL)
    model(ids(2, 7), labels=ids(2, 7)).loss.backward()
    learned = model.model.layers[0].mixer
    names = {"concat": "projection", "learned": "norms", "learned_scalar": "weights"}
    grads = [p.grad for n, p in learned.named_parameters() if n.startswith(names[combine])]
    assert grads
    assert all(grad.abs().sum() > 0 for grad in grads)


# DeepNorm (arXiv 2203.00555, figure 2: a decoder of N layers has alpha (2N)^(1/4), beta (8N)^(-1/4)).


def test_deepnorm_scales_the_stream_and_the_values():
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        vocab_size=1000, hidden_size=256, layout="S4", init="deepnorm", norm_position="post",
        residuals={"-": {"skip_multiplier": 1.5}},
    )  # fmt: skip
    model = hybrid.HybridForCausalLM(config)
    layer = model.model.layers[2]
    assert layer.mixer_residual.skip_multiplier == pytest.approx((2 * 4) ** 0.25)
    assert layer.ffn_residual.skip_multiplier == 1.5  # what is said counts
    beta, xavier = (8 * 4) ** -0.25, math.sqrt(2 / 512)
    for name in ("q_proj", "k_proj"):
        assert getattr(layer.mixer, name).weight.std().item() == pytest.approx(xavier, rel=0.03)
    for name in ("v_proj", "o_proj"):
        weight = getattr(layer.mixer, name).weight
        assert weight.std().item() == pytest.approx(beta * xavier, rel=0.03)
    for weight in (layer.ffn.up_proj.weight, layer.ffn.down_proj.weight):
        expected = beta * math.sqrt(2 / sum(weight.shape))
        assert weight.std().item() == pytest.approx(expected, rel=0.03)


def test_deepnorm_scales_experts():
    torch.manual_seed(0)
    experts = {"E": {"num_experts": 4, "top_k": 2, "intermediate_size": 64}}
    config = hybrid.HybridConfig(
        vocab_size=100, hidden_size=256, layout="S2", ffn="E", init="deepnorm",
        norm_position="normed", feed_forwards=experts,
    )  # fmt: skip
    model = hybrid.HybridForCausalLM(config)
    weight = model.model.layers[0].ffn.experts.down_proj
    expected = (8 * 2) ** -0.25 * math.sqrt(2 / (256 + 64))
    assert weight.std().item() == pytest.approx(expected, rel=0.03)


def test_a_deep_deepnorm_stack_stays_bounded(ids):
    """40 layers, at the start and after a step of a large rate."""
    torch.manual_seed(0)
    model = hybrid.HybridForCausalLM(
        hybrid.HybridConfig(
            vocab_size=61,
            hidden_size=D,
            layout="S40",
            init="deepnorm",
            norm_position="post",
            **SMALL,
        )
    )
    loss = model(ids(2, 7), labels=ids(2, 7)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model(ids(2, 7), labels=ids(2, 7)).loss < loss


# Decoder layers of published models around the same mixer and feed-forward.


class Part(nn.Module):
    """Stands in for a mixer or a feed-forward of ours and of theirs alike."""

    layer_type = "linear_attention"
    is_ffn = False

    def __init__(self, seed, is_ffn=False):
        super().__init__()
        self.is_ffn = is_ffn
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight / D**0.5)

    def forward(self, hidden_states, **kwargs):
        return torch.tanh(hidden_states @ self.weight)


class PairPart(Part):
    """One that returns its output and no weights, as softmax layers of transformers do."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states), None


def ours_around(mixer, ffn, norms, **config):
    """Our layer with the parts of theirs, in float64."""
    config = hybrid.HybridConfig(hidden_size=D, vocab_size=7, norm_eps=1e-5, **SMALL, **config)
    layer = hybrid.HybridForCausalLM(config).double().model.layers[0]
    ours = [p for p in layer.named_modules() if p[0].endswith(("norm_in", "norm_out"))]
    for (_, norm), weight in zip(ours, norms, strict=True):
        norm.weight.data.copy_(weight)
    layer.mixer, layer.ffn = mixer, ffn
    return lambda x: layer(x, attention_mask={}, position_embeddings={})


def theirs_around(layer, mixer, ffn, norms):
    layer = layer.double().eval()
    for name, part in {**mixer, **ffn}.items():
        assert isinstance(getattr(layer, name), nn.Module)
        setattr(layer, name, part)
    weights = []
    for name in norms:
        norm = getattr(layer, name)
        randomized(norm)
        weights.append(norm.weight)
    return layer, weights


X = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PRE = ("input_layernorm", "post_attention_layernorm")
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
SIZES = {"hidden_size": D, "intermediate_size": 24, "rms_norm_eps": 1e-5, **HEADS}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # transformers' norms compute in float32


def test_granites_decoder_layer():
    config = modeling_granitemoehybrid.GraniteMoeHybridConfig(
        **SIZES, layers_block_type=["full_attention"], residual_multiplier=0.22,
        num_local_experts=0, shared_intermediate_size=24, mamba_n_heads=4,
    )  # fmt: skip
    theirs = modeling_granitemoehybrid.GraniteMoeHybridDecoderLayer(config, 0)
    mixer, ffn = {"self_attn": PairPart(1)}, {"shared_mlp": Part(2)}
    theirs, norms = theirs_around(theirs, mixer, ffn, PRE)
    residuals = {"default": {"output_multiplier": 0.22}}
    ours = ours_around(PairPart(1), Part(2), norms, layout="S", residuals=residuals)
    assert_close(ours(X), theirs(X), **CLOSE)


@pytest.mark.parametrize("symbol", ["L", "S"])
def test_minimaxs_decoder_layer(symbol):
    kind = {"L": "linear_attention", "S": "full_attention"}[symbol]
    config = modeling_minimax.MiniMaxConfig(
        **SIZES, layer_types=[kind], head_dim=16, num_local_experts=2,
        full_attn_alpha_factor=3.5, full_attn_beta_factor=0.9, linear_attn_alpha_factor=2.5,
        linear_attn_beta_factor=1.1, mlp_alpha_factor=1.5, mlp_beta_factor=0.7,
    )  # fmt: skip
    theirs = modeling_minimax.MiniMaxDecoderLayer(config, 0)
    theirs, norms = theirs_around(theirs, {"self_attn": PairPart(1)}, {"mlp": Part(2)}, PRE)
    residuals = {
        "S": {"skip_multiplier": 3.5, "output_multiplier": 0.9},
        "L": {"skip_multiplier": 2.5, "output_multiplier": 1.1},
        "-": {"skip_multiplier": 1.5, "output_multiplier": 0.7},
    }
    ours = ours_around(
        PairPart(1), Part(2), norms, layout=symbol, norm_position="normed", residuals=residuals
    )
    assert_close(ours(X), theirs(X), **CLOSE)


@pytest.mark.parametrize("symbol", ["L", "S"])
def test_olmo_hybrids_decoder_layers(symbol):
    config = modeling_olmo_hybrid.OlmoHybridConfig(
        **{**SIZES, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    if symbol == "S":
        theirs = modeling_olmo_hybrid.OlmoHybridAttentionDecoderLayer(config, 1)
        mixer = {"self_attn": PairPart(1)}
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
    else:
        theirs = modeling_olmo_hybrid.OlmoHybridLinearAttentionDecoderLayer(config, 0)
        mixer, names = {"linear_attn": Part(1)}, PRE
    theirs, norms = theirs_around(theirs, mixer, {"mlp": Part(2)}, names)
    position = {"S": "reordered", "default": "pre"}
    ours = ours_around(PairPart(1), Part(2), norms, layout=symbol, norm_position=position)
    assert_close(ours(X), theirs(X), **CLOSE)


FALCON = {
    "attention_in_multiplier": 0.6, "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.24, "ssm_multipliers": [0.7, 0.5, 0.35, 1.4, 0.6],
    "mlp_multipliers": [0.8, 0.2], "key_multiplier": 0.4,
}  # fmt: skip


def test_falcon_h1s_decoder_layer():
    """With its own mixers and feed-forward, whose multipliers are options of ours."""
    config = modeling_falcon_h1.FalconH1Config(
        **SIZES, head_dim=16, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=6,
        mamba_n_groups=2, mamba_d_conv=4, mamba_chunk_size=8, vocab_size=7, rope_theta=1e4,
        mamba_rms_norm=False, **FALCON,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = randomized(modeling_falcon_h1.FalconH1Model(config).double().eval())
    theirs = model.layers[0]
    k = FALCON
    ours = hybrid.HybridForCausalLM(
        hybrid.HybridConfig(
            layout="[MS]", hidden_size=D, vocab_size=7, norm_eps=1e-5, parallel_combine="sum",
            mixers={
                "M": {"num_heads": 8, "head_dim": 8, "state_size": 6, "num_groups": 2,
                      "output_norm": "none", "projection_multipliers": k["ssm_multipliers"]},
                "S": {"num_heads": 2, "num_kv_heads": 1, "scale": 16**-0.5 * k["key_multiplier"]},
            },
            residuals={
                "M": {"input_multiplier": k["ssm_in_multiplier"],
                      "output_multiplier": k["ssm_out_multiplier"]},
                "S": {"input_multiplier": k["attention_in_multiplier"],
                      "output_multiplier": k["attention_out_multiplier"]},
                "-": {"output_multiplier": k["mlp_multipliers"][1]},
            },
            feed_forwards={"-": {"intermediate_size": 24,
                                 "gate_multiplier": k["mlp_multipliers"][0]}},
        )
    ).double().eval()  # fmt: skip
    names = {
        "self_attn": "mixer.branches.1", "mamba": "mixer.branches.0", "feed_forward": "ffn",
        "input_layernorm": "mixer_residual.norm_in", "pre_ff_layernorm": "ffn_residual.norm_in",
    }  # fmt: skip
    weights = {}
    for name, weight in theirs.state_dict().items():
        if not name.endswith("mup_vector"):
            head, _, rest = name.partition(".")
            weights[f"{names[head]}.{rest}"] = weight
    ssm = "mixer.branches.0."
    parts = weights.pop(f"{ssm}in_proj.weight").split([64, 64, 12, 12, 8])
    for name, part in zip(("gate", "v", "k", "q", "dt"), parts, strict=True):
        weights[f"{ssm}{name}_proj.weight"] = part
    weights[f"{ssm}o_proj.weight"] = weights.pop(f"{ssm}out_proj.weight")
    for name in ("weight", "bias"):
        x, b, c = weights.pop(f"{ssm}conv1d.{name}").split([64, 12, 12])
        weights[f"{ssm}conv.{name}"] = torch.cat([c, b, x]).squeeze()
    ours.model.layers[0].load_state_dict(weights)
    cos_sin = model.rotary_emb(X, torch.arange(5)[None])
    mask = torch.full((5, 5), -1e9, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(X, attention_mask=mask, position_embeddings=cos_sin)[0]
    assert_close(run_layer(ours, X)[0], expected, **CLOSE)


# Mistakes.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_position": "front"}, "norm_position: expected one of 'pre'"),
        ({"norm_position": {"S": "reorderd"}}, "try 'reordered'"),
        (
            {"norm_position": {"defualt": "pre"}},
            "norm_position.defualt: expected the symbol of a mixer .* 'default'",
        ),
        ({"residuals": {"s": {}}}, "residuals.s: expected the symbol of a mixer or a feed-forward"),
        ({"residuals": {"S": {"ouput_multiplier": 2.0}}}, "mean 'output_multiplier'"),
        ({"residuals": {"S": 0.22}}, "residuals.S: expected mapping, got float 0.22$"),
        (
            {"residuals": {"S": {"skip_multiplier": math.nan}}},
            "residuals.S.skip_multiplier: expected finite number, got nan",
        ),
        ({"residuals": {"S": {"skip_multiplier": "2"}}}, "residuals.S.skip_multiplier: expected"),
        ({"embedding_multiplier": "sqrt_hidden"}, "try 'sqrt_hidden_size'"),
        ({"logits_multiplier": math.inf}, "logits_multiplier: expected finite number, got inf"),
        ({"init": "deepnorm"}, "norm_position: expected 'post' or 'normed' .*got 'pre'"),
        ({"layout": "[MS]", "norm_position": {"S": "post"}}, r"\[MS\], which share one residual"),
        ({"layout": "[MS]", "residuals": {"S": {"skip_multiplier": 2}}}, "M: 1.0, S: 2"),
        ({"parallel_combine": "add"}, "parallel_combine: expected one of"),
        (
            {"mixers": {"M": {"projection_multipliers": [1.0, 2.0]}}},
            "projection_multipliers: expected at least 5 entries",
        ),
        (
            {"feed_forwards": {"-": {"activation": "relu2", "gate_multiplier": 2.0}}},
            "'relu2' has no gate",
        ),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(hybrid.ConfigError, match=message):
        hybrid.HybridConfig(**{"layout": "MS", **config})


def test_settings_by_symbol_survive_the_round_trip(tmp_path):
    config = hybrid.HybridConfig(
        layout="LS",
        norm_position={"S": "reordered", "default": "pre"},
        residuals={"S": {"output_multiplier": 0.5}, "default": {"skip_multiplier": 2.0}},
        embedding_multiplier="sqrt_hidden_size",
    )
    config.save_pretrained(tmp_path)
    again = hybrid.HybridConfig.from_pretrained(tmp_path)
    assert again.norm_position == config.norm_position
    assert again.residuals == config.residuals
    assert again.embedding_multiplier == config.embedding_multiplier
