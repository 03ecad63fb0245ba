"""Softmax mixers with the options of published models, against transformers' layers on equal weights.

float32, outputs and the gradient of the input: root mean square of the difference against the
standard deviation of theirs.
"""

import pytest
import torch

import hybrid
from hybrid.modeling.backends import use_backends_of
from hybrid.nn.rotary import BY_LENGTH, REQUIRED

D, TIME = 32, 21
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": D, "head_dim": 8}
OURS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def published(family, layer_class, config_class, layer_idx=0, **config):
    """A layer of transformers with random weights, and its rotary embedding."""
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = getattr(modeling, config_class)(num_hidden_layers=4, **config)
    config._attn_implementation = "eager"
    layer = getattr(modeling, layer_class)(config, layer_idx).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return modeling, config, layer


def ours_like(layer, name, weights=None, norm_eps=1e-6, layer_idx=0, length=64, **options):
    """Our mixer with the weights of `layer`, and its rotary embedding."""
    config = hybrid.HybridConfig(
        layout="QQQQ", hidden_size=D, norm_eps=norm_eps, mixers={"Q": {"type": name, **options}},
        max_position_embeddings=length,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    spec = config.stack[layer_idx].mixers[0]
    mixer = spec.build(layer_idx)
    use_backends_of(config, mixer)
    mixer = mixer.eval()
    mixer.init_parameters(0.02)
    weights = dict(layer.named_parameters()) if weights is None else weights
    mixer.load_state_dict({name: w.detach() for name, w in weights.items()}, strict=True)
    rotary = spec.cls.rotary(spec.options, spec.sizes)
    positions = torch.arange(TIME)[None]

    def run(x):
        angles = None if rotary is None else rotary.eval()(x, positions)
        return mixer(x, position_embeddings=angles, position_ids=positions)[0]

    return run


def mask(sees=lambda t, s: True):
    """(1, 1, T, T), to be added to logits; causal, and what `sees` says."""
    rows = [[s <= t and sees(t, s) for s in range(TIME)] for t in range(TIME)]
    return torch.zeros(1, 1, TIME, TIME).masked_fill(~torch.tensor(rows), -1e30)


def window(size):
    return mask(lambda t, s: s > t - size)


def assert_same(ours, theirs):
    x = torch.randn(2, TIME, D, requires_grad=True)
    a, b = ours(x), theirs(x)
    direction = torch.randn_like(a)
    grads = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (a, b)]
    for found, expected in ((a, b), grads):
        assert expected.std() > 0
        error = (found - expected).square().mean().sqrt()
        assert error <= 1e-5 * expected.std()


def paired(weight, heads):
    """Rows of rotated pairs (2j, 2j + 1) in the order (j, j + K / 2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_llama4_chunked_layers(qk_norm):
    modeling, config, theirs = published(
        "llama4", "Llama4TextAttention", "Llama4TextConfig", **HEADS, rope_parameters=ROPE,
        use_qk_norm=qk_norm, attention_chunk_size=6, rms_norm_eps=1e-5,
    )  # fmt: skip
    weights = dict(theirs.named_parameters())
    weights["q_proj.weight"] = paired(weights["q_proj.weight"], 4)
    weights["k_proj.weight"] = paired(weights["k_proj.weight"], 2)
    norm = {"qk_norm": "head", "qk_norm_type": "weightless_rmsnorm"} if qk_norm else {}
    ours = ours_like(
        theirs, "chunked_attention", weights, norm_eps=1e-5, **OURS, rope_parameters=ROPE,
        chunk_size=6, **norm,
    )  # fmt: skip
    rotary = modeling.Llama4TextRotaryEmbedding(config)
    chunks = mask(lambda t, s: t // 6 == s // 6)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), chunks)[0])


def test_llama4_layers_without_positions_are_tuned():
    _, _, theirs = published(
        "llama4", "Llama4TextAttention", "Llama4TextConfig", 3, **HEADS, rope_parameters=ROPE,
        attn_temperature_tuning=True, floor_scale=4, attn_scale=0.7, no_rope_layers=[1, 1, 1, 0],
    )  # fmt: skip
    options = {"rope_parameters": None, "temperature": 0.7, "temperature_length": 4}
    ours = ours_like(theirs, "softmax_attention", **OURS, **options)
    assert_same(ours, lambda x: theirs(x, None, mask())[0])
    untuned = ours_like(theirs, "softmax_attention", **OURS, rope_parameters=None)
    x = torch.randn(1, TIME, D)
    assert (untuned(x) - ours(x)).abs().max() > 1e-2


def test_ministral3_scales_queries_in_every_layer():
    rope = {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 5,
    }  # fmt: skip
    modeling, config, theirs = published(
        "ministral3", "Ministral3Attention", "Ministral3Config", **HEADS,
        rope_parameters={**rope, "llama_4_scaling_beta": 0.6}, max_position_embeddings=20,
    )  # fmt: skip
    ours = ours_like(
        theirs, "softmax_attention", **OURS, rope_parameters=rope, temperature=0.6,
        temperature_length=5, temperature_offset=0,
    )  # fmt: skip
    rotary, at = modeling.Ministral3RotaryEmbedding(config), torch.arange(TIME)[None]
    assert_same(ours, lambda x: theirs(x, rotary(x, at), mask(), position_ids=at)[0])


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_gemma3(kind):
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    modeling, config, theirs = published(
        "gemma3", "Gemma3Attention", "Gemma3TextConfig", **HEADS, query_pre_attn_scalar=20,
        sliding_window=7, layer_types=[kind] * 4, rope_parameters=ropes,
    )  # fmt: skip
    options = {
        **OURS, "scale": 20**-0.5, "qk_norm": "head", "qk_norm_type": "zero_centered_rmsnorm",
        "rope_parameters": ropes[kind],
    }  # fmt: skip
    if kind == "full_attention":
        ours, sees = ours_like(theirs, "softmax_attention", **options), mask()
    else:
        ours = ours_like(theirs, "sliding_window_attention", window=7, **options)
        sees = window(7)
    rotary = modeling.Gemma3RotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None], kind), sees)[0])


def test_gemma2_sliding_layers_cap_their_logits():
    modeling, config, theirs = published(
        "gemma2", "Gemma2Attention", "Gemma2Config", **HEADS, query_pre_attn_scalar=20,
        sliding_window=7, layer_types=["sliding_attention"] * 4, attn_logit_softcapping=0.8,
    )  # fmt: skip
    ours = ours_like(
        theirs, "sliding_window_attention", window=7, **OURS, scale=20**-0.5, soft_cap=0.8
    )
    rotary = modeling.Gemma2RotaryEmbedding(config)
    at = torch.arange(TIME)[None]
    assert_same(ours, lambda x: theirs(x, rotary(x, at), window(7))[0])


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_gpt_oss(kind):
    rope = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 40,
    }  # fmt: skip
    modeling, config, theirs = published(
        "gpt_oss", "GptOssAttention", "GptOssConfig", **HEADS, attention_bias=True,
        sliding_window=7, layer_types=[kind] * 4, rope_parameters=rope,
    )  # fmt: skip
    options = {**OURS, "bias": True, "output_bias": True, "sinks": True, "rope_parameters": rope}
    if kind == "full_attention":
        ours, sees = ours_like(theirs, "softmax_attention", **options), mask()
    else:
        ours = ours_like(theirs, "sliding_window_attention", window=7, **options)
        sees = window(7)
    rotary = modeling.GptOssRotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), sees)[0])


def test_qwen3_next_gates_its_output():
    rope = {**ROPE, "partial_rotary_factor": 0.5}
    modeling, config, theirs = published(
        "qwen3_next", "Qwen3NextAttention", "Qwen3NextConfig", **HEADS, rope_parameters=rope
    )
    weights = dict(theirs.named_parameters())
    # rows come head by head: [q, gate]
    fused = weights["q_proj.weight"].unflatten(0, (4, 2, 8))
    weights["q_proj.weight"], weights["gate_proj.weight"] = (
        part.flatten(0, 1) for part in fused.unbind(1)
    )
    ours = ours_like(
        theirs, "softmax_attention", weights, **OURS, rope_parameters=rope, output_gate=True,
        qk_norm="head", qk_norm_type="zero_centered_rmsnorm",
    )  # fmt: skip
    rotary = modeling.Qwen3NextRotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), mask())[0])


@pytest.mark.parametrize("layer_idx", [0, 3])
def test_smollm3_has_no_positions_in_every_fourth_layer(layer_idx):
    modeling, config, theirs = published(
        "smollm3", "SmolLM3Attention", "SmolLM3Config", layer_idx, **HEADS, rope_parameters=ROPE
    )
    ours = ours_like(
        theirs, "softmax_attention", layer_idx=layer_idx, **OURS, rope_parameters=ROPE,
        nope_every=4,
    )  # fmt: skip
    rotary = modeling.SmolLM3RotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), mask())[0])


def test_falcon_h1_key_multiplier_is_a_scale():
    modeling, config, theirs = published(
        "falcon_h1", "FalconH1Attention", "FalconH1Config", **HEADS, key_multiplier=0.4,
        rope_parameters=ROPE,
    )  # fmt: skip
    scale = 0.4 * 8**-0.5
    ours = ours_like(theirs, "softmax_attention", **OURS, rope_parameters=ROPE, scale=scale)
    rotary = modeling.FalconH1RotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), mask())[0])


def test_recurrent_gemma():
    rope = {**ROPE, "partial_rotary_factor": 0.5}
    _, _, theirs = published(
        "recurrent_gemma", "RecurrentGemmaAttention", "RecurrentGemmaConfig",
        hidden_size=D, num_attention_heads=4, num_key_value_heads=1, attention_window_size=7,
        rope_parameters=rope,
    )  # fmt: skip
    ours = ours_like(
        theirs, "sliding_window_attention", num_heads=4, num_kv_heads=1, window=7,
        rope_parameters=rope, output_bias=True,
    )  # fmt: skip
    at = torch.arange(TIME)[None]
    assert_same(ours, lambda x: theirs(x, at, window(7))[0])


LATENT = {
    "hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
OUR_LATENT = {"num_heads": 4, "latent_dim": 16, "head_dim": 6, "rope_dim": 8, "value_head_dim": 10}
LATENT_NAMES = {
    "q_a_proj": "q_down_proj", "q_a_layernorm": "q_norm", "q_b_proj": "q_proj",
    "kv_a_proj_with_mqa": "kv_down_proj", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_proj",
}  # fmt: skip


def latent_weights(theirs):
    return {
        f"{LATENT_NAMES.get(name, name)}.{kind}": parameter
        for (name, kind), parameter in (
            (full.rsplit(".", 1), p) for full, p in theirs.named_parameters()
        )
    }


@pytest.mark.parametrize("mscale", [1.0, 0.7])
def test_deepseek_v3_scales_its_logits_with_yarn(mscale):
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": mscale, "original_max_position_embeddings": 16,
    }  # fmt: skip
    modeling, config, theirs = published(
        "deepseek_v3", "DeepseekV3Attention", "DeepseekV3Config", **LATENT, q_lora_rank=12,
        rope_parameters=rope, rope_interleave=True, max_position_embeddings=640,
    )  # fmt: skip
    weights = latent_weights(theirs)
    q, down = weights["q_proj.weight"].unflatten(0, (4, 14)), weights["kv_down_proj.weight"]
    q = torch.cat([q[:, :6], paired(q[:, 6:].flatten(0, 1), 4).unflatten(0, (4, 8))], dim=1)
    weights["q_proj.weight"] = q.flatten(0, 1)
    weights["kv_down_proj.weight"] = torch.cat([down[:16], paired(down[16:], 1)])
    ours = ours_like(
        theirs, "multi_head_latent_attention", weights, **OUR_LATENT, query_latent_dim=12,
        rope_parameters=rope,
    )  # fmt: skip
    rotary = modeling.DeepseekV3RotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), mask())[0])


def test_kimi_linear_has_no_positions_and_an_eps_of_its_own():
    _, _, theirs = published(
        "kimi_linear", "KimiLinearAttention", "KimiLinearConfig", **LATENT, q_lora_rank=None,
        rms_norm_eps=1e-2, layer_types=["full_attention"] * 4,
    )  # fmt: skip
    ours = ours_like(
        theirs, "multi_head_latent_attention", latent_weights(theirs), norm_eps=1e-2,
        latent_norm_eps=1e-6, rope_parameters=None, **OUR_LATENT,
    )  # fmt: skip
    assert_same(ours, lambda x: theirs(x, mask())[0])


ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "proportional": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
                 "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}  # fmt: skip
LOCAL = {"sliding_window_attention": {"window": TIME}, "chunked_attention": {"chunk_size": TIME}}


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("name", ["softmax_attention", *LOCAL])
def test_every_rope_type_as_llama(rope_type, name):
    """In full attention, and in a window and a chunk as long as the text."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE_TYPES[rope_type]}
    options = {**OURS, "rope_parameters": rope, **LOCAL.get(name, {})}
    length = 12 if rope_type == "dynamic" else 64  # beyond it, dynamic frequencies change
    modeling, config, theirs = published(
        "llama", "LlamaAttention", "LlamaConfig", **HEADS, rope_parameters=rope,
        max_position_embeddings=length,
    )  # fmt: skip
    if name in LOCAL and rope_type in BY_LENGTH:
        with pytest.raises(ValueError, match="which a window does not see"):
            ours_like(theirs, name, **options)
        return
    ours = ours_like(theirs, name, length=length, **options)
    rotary = modeling.LlamaRotaryEmbedding(config)
    assert_same(ours, lambda x: theirs(x, rotary(x, torch.arange(TIME)[None]), mask())[0])


def test_every_rope_type_is_tried():
    assert set(ROPE_TYPES) == set(REQUIRED)
