"""Mixers against the layers of transformers that are meant to be the same, on equal weights.

Outputs and the gradient of the input, by the root mean square of the difference. In float64 both are
the same to rounding. In float32 ours may be as far from that as twice theirs, and a rounding band.
"""

import importlib
import importlib.util
import inspect
import math
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.bamba import modeling_bamba
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.jamba import modeling_jamba
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax import modeling_minimax
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.recurrent_gemma import modeling_recurrent_gemma
from transformers.models.xlstm import modeling_xlstm

import hybrid
from hybrid.modeling.backends import use_backends_of
from hybrid.modeling.cache import CacheSlot

D, TIME = 32, 21
FLOAT32_EPS = torch.finfo(torch.float32).eps

# Not yet in the oldest transformers that this package works with.
NEWER = ("kimi_linear", "bailing_hybrid")
for name in NEWER:
    if importlib.util.find_spec(f"transformers.models.{name}") is not None:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def module_or_skip(name):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


@pytest.fixture(autouse=True)
def _their_code_in_pytorch(monkeypatch):
    """Optional packages that transformers prefers, where installed, want a GPU."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformers.models.") or ".modeling_" not in name:
            continue
        for key, function in list(vars(module).items()):
            if isinstance(function, types.FunctionType) and function.__module__ == name:
                monkeypatch.setattr(module, key, inspect.unwrap(function))


def layer(cls, config, *args, **kwargs):
    """One of transformers' layers with random values in every parameter."""
    theirs = cls(config, *args, **kwargs).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs


def mixer(name, layers=1, layer_idx=0, norm_eps=1e-6, **options):
    config = hybrid.HybridConfig(
        layout="Q" * layers,
        hidden_size=D,
        norm_eps=norm_eps,
        mixers={"Q": {"type": name, **options}},
    )
    ours = config.stack[layer_idx].mixers[0].build(layer_idx).eval()
    use_backends_of(config, ours)
    ours.init_parameters(0.02)  # buffers
    return ours


def load(ours, weights):
    """Every parameter by name, none missing and none left over."""
    ours.load_state_dict({name: w.detach() for name, w in weights.items()}, strict=True)


def call_module(module, x):
    found = module(x)
    return found[0] if isinstance(found, tuple) else found


class Float64(TorchDispatchMode):
    """Compute in float64 what a layer in float64 would cast to float32, or make in it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def assert_same(ours, theirs, our_call=call_module, their_call=call_module, exact_to=1e-12):
    """Compare two modules in both precisions and leave them in float64.

    Each call takes the module and its input.
    ``exact_to``: the largest relative error in float64.
    """
    x = torch.randn(2, TIME, D)
    direction = torch.randn(2, TIME, D)

    def both(dtype):
        given = x.to(dtype).requires_grad_()
        found = []
        for module, call in ((ours, our_call), (theirs, their_call)):
            y = call(module.to(dtype), given)
            assert y.dtype == dtype
            found.append((y, torch.autograd.grad((y * direction.to(dtype)).sum(), given)[0]))
        return zip(*found, strict=True)

    low = list(both(torch.float32))
    with Float64():
        exact = list(both(torch.float64))
    for (our_low, their_low), (our_exact, expected) in zip(low, exact, strict=True):
        assert expected.dtype == torch.float64
        assert expected.std() > 0
        assert distance(our_exact, expected) <= exact_to * expected.std()
        # a sum over the tokens rounds once a term
        band = TIME * FLOAT32_EPS * expected.std()
        assert distance(our_low, expected) <= 2 * distance(their_low, expected) + band


def distance(a, b):
    return (a.double() - b.double()).square().mean().sqrt()


def rename(theirs, names):
    """Their parameters under our names; convolution weights (D, 1, W) become (D, W)."""
    weights = {}
    for name, parameter in theirs.named_parameters():
        for old, new in names.items():
            if name == old or name.startswith(old + "."):
                name = new + name[len(old) :]
        weights[name] = parameter.squeeze(1) if name.endswith("conv.weight") else parameter
    return weights


def test_mamba2():
    config = modeling_mamba2.Mamba2Config(
        hidden_size=D, num_heads=8, head_dim=8, state_size=6, n_groups=2, conv_kernel=4,
        expand=2, layer_norm_epsilon=1e-5, chunk_size=8, num_hidden_layers=1,
    )  # fmt: skip
    theirs = layer(modeling_mamba2.Mamba2Mixer, config, layer_idx=0)
    ours = mixer(
        "mamba2", num_heads=8, head_dim=8, state_size=6, num_groups=2, norm_eps=1e-5,
        norm_groups=norm_groups(theirs),
    )  # fmt: skip
    load(ours, mamba2_weights(theirs, inner=64, states=12))
    assert_same(ours, theirs)


def norm_groups(theirs):
    """Older versions of transformers normalise all channels together."""
    return 64 // getattr(theirs.norm, "group_size", 64)


def mamba2_weights(theirs, inner, states):
    """The fused projection [z, x, B, C, dt] and the convolution over [x, B, C], taken apart."""
    weights = rename(theirs, {"out_proj": "o_proj", "conv1d": "conv"})
    z, x, B, C, dt = weights.pop("in_proj.weight").split([inner, inner, states, states, 8])
    weights |= {"gate_proj.weight": z, "v_proj.weight": x, "k_proj.weight": B}
    weights |= {"q_proj.weight": C, "dt_proj.weight": dt}
    for name in ("conv.weight", "conv.bias"):
        x, B, C = weights[name].split([inner, states, states])
        weights[name] = torch.cat([C, B, x])
    return weights


def test_mamba2_of_bamba():
    config = modeling_bamba.BambaConfig(
        hidden_size=D, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=2,
        mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=8, rms_norm_eps=1e-5,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    theirs = layer(modeling_bamba.BambaMixer, config, layer_idx=0)
    ours = mixer(
        "mamba2", num_heads=8, head_dim=8, state_size=6, num_groups=2, norm_eps=1e-5,
        norm_groups=norm_groups(theirs),
    )  # fmt: skip
    load(ours, mamba2_weights(theirs, inner=64, states=12))
    assert_same(ours, theirs)


def test_mamba():
    config = modeling_mamba.MambaConfig(hidden_size=D, state_size=5, num_hidden_layers=1)
    theirs = layer(modeling_mamba.MambaMixer, config, layer_idx=0)
    ours = mixer("mamba", state_size=5)
    load(ours, rename(theirs, {"out_proj": "o_proj", "conv1d": "conv"}))
    assert_same(ours, theirs)


def test_mamba_of_falcon():
    config = modeling_falcon_mamba.FalconMambaConfig(
        hidden_size=D, state_size=5, num_hidden_layers=1, mixer_rms_eps=1e-6
    )
    theirs = layer(modeling_falcon_mamba.FalconMambaMixer, config, 0, False)
    ours = mixer("mamba", state_size=5, inner_norm=True)
    weights = rename(theirs, {"out_proj": "o_proj", "conv1d": "conv"})
    # their norms have no weights
    load(
        ours, weights | {f"inner_norms.{i}.weight": torch.ones(n) for i, n in enumerate((2, 5, 5))}
    )
    assert_same(ours, theirs)


def test_mamba_of_jamba():
    config = modeling_jamba.JambaConfig(
        hidden_size=D, mamba_d_state=5, mamba_dt_rank=3, rms_norm_eps=1e-6, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, use_mamba_kernels=False,
    )  # fmt: skip
    theirs = layer(modeling_jamba.JambaMambaMixer, config, layer_idx=0)
    ours = mixer("mamba", state_size=5, dt_rank=3, inner_norm=True)
    norms = {f"{n}_layernorm": f"inner_norms.{i}" for i, n in enumerate(("dt", "b", "c"))}
    load(ours, rename(theirs, {"out_proj": "o_proj", "conv1d": "conv", **norms}))
    assert_same(ours, theirs)


def test_gated_delta_net_of_qwen3_next():
    config = modeling_qwen3_next.Qwen3NextConfig(
        hidden_size=D, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=1,
    )  # fmt: skip
    theirs = layer(modeling_qwen3_next.Qwen3NextGatedDeltaNet, config, layer_idx=0)
    ours = mixer("gated_delta_net", num_heads=4, num_key_heads=2, head_dim=6, value_head_dim=8)
    weights = rename(theirs, {"out_proj": "o_proj", "conv1d": "conv"})
    # rows come key head by key head: [q, k, v, z] and [beta, a]
    fused = weights.pop("in_proj_qkvz.weight").view(2, -1, D).split([6, 6, 16, 16], dim=1)
    for name, w in zip(("q_proj", "k_proj", "v_proj", "gate_proj"), fused, strict=True):
        weights[f"{name}.weight"] = w.reshape(-1, D)
    fused = weights.pop("in_proj_ba.weight").view(2, -1, D).split([2, 2], dim=1)
    for name, w in zip(("beta_proj", "decay_proj"), fused, strict=True):
        weights[f"{name}.weight"] = w.reshape(-1, D)
    load(ours, weights)
    assert_same(ours, theirs)


def test_gated_delta_net_of_olmo_hybrid():
    config = modeling_olmo_hybrid.OlmoHybridConfig(
        hidden_size=D, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=6,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], linear_allow_neg_eigval=True,
        rms_norm_eps=1e-6, num_attention_heads=4,
    )  # fmt: skip
    theirs = layer(modeling_olmo_hybrid.OlmoHybridGatedDeltaNet, config, layer_idx=0)
    ours = mixer(
        "gated_delta_net", num_heads=2, head_dim=6, value_head_dim=8, negative_eigenvalues=True,
        norm_eps=theirs.o_norm.variance_epsilon,
    )  # fmt: skip
    weights = rename(
        theirs,
        {
            "b_proj": "beta_proj",
            "a_proj": "decay_proj",
            "g_proj": "gate_proj",
            "o_norm": "norm",
            "conv1d": "conv",
        },
    )
    load(ours, weights)
    assert_same(ours, theirs)


KDA = {
    "conv1d": "conv", "b_proj": "beta_proj", "o_norm": "norm", "forget_gate.A_log": "A_log",
    "forget_gate.dt_bias": "dt_bias",
}  # fmt: skip


def test_kimi_delta_attention_of_kimi_linear():
    modeling = module_or_skip("kimi_linear")
    config = modeling.KimiLinearConfig(
        hidden_size=D, linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=4,
        num_hidden_layers=1, rms_norm_eps=1e-6, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = layer(modeling.KimiLinearDeltaAttention, config, layer_idx=0)
    ours = mixer("kimi_delta_attention", num_heads=2, head_dim=8)
    low_rank = {
        "forget_gate.f_a_proj": "decay_proj.0", "forget_gate.f_b_proj": "decay_proj.1",
        "g_a_proj": "gate_proj.0", "g_b_proj": "gate_proj.1",
    }  # fmt: skip
    weights = rename(theirs, {**KDA, **low_rank})
    load(ours, weights | {"A_log": weights["A_log"].flatten()})
    assert_same(ours, theirs)


@pytest.mark.parametrize("bounded", [True, False])
def test_kimi_delta_attention_of_bailing_hybrid(bounded):
    modeling = module_or_skip("bailing_hybrid")
    config = modeling.BailingHybridConfig(
        hidden_size=D, linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=4,
        num_hidden_layers=1, rms_norm_eps=1e-6, layer_types=["linear_attention"],
        kda_safe_gate=bounded, kda_lower_bound=-5.0,
    )  # fmt: skip
    theirs = layer(modeling.BailingHybridDeltaAttention, config, layer_idx=0)
    ours = mixer(
        "kimi_delta_attention", num_heads=2, head_dim=8, gate_rank=0,
        decay_gate="bounded" if bounded else "softplus",
    )  # fmt: skip
    full = {"forget_gate.f_proj": "decay_proj", "g_proj": "gate_proj"}
    load(ours, rename(theirs, {**KDA, **full}))
    assert_same(ours, theirs)


def test_gated_short_convolution_of_lfm2():
    config = modeling_lfm2.Lfm2Config(
        hidden_size=D, conv_L_cache=3, conv_bias=True, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, layer_types=["conv"],
    )  # fmt: skip
    theirs = layer(modeling_lfm2.Lfm2ShortConv, config, layer_idx=0)
    ours = mixer("gated_short_convolution", conv_size=3, bias=True)
    load(ours, rename(theirs, {"out_proj": "o_proj"}))
    assert_same(ours, theirs)


def test_rg_lru_of_recurrent_gemma():
    config = modeling_recurrent_gemma.RecurrentGemmaConfig(
        hidden_size=D, lru_width=D, num_attention_heads=4, conv1d_width=4, num_hidden_layers=1,
    )  # fmt: skip
    theirs = layer(modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock, config, layer_idx=0)
    ours = mixer("rg_lru", num_heads=4)
    names = {
        "linear_x": "x_proj", "linear_y": "gate_proj", "linear_out": "o_proj", "conv_1d": "conv",
        "rg_lru.recurrent_param": "decay_rate", "rg_lru.input_gate_weight": "input_gate.weight",
        "rg_lru.input_gate_bias": "input_gate.bias",
        "rg_lru.recurrent_gate_weight": "recurrence_gate.weight",
        "rg_lru.recurrent_gate_bias": "recurrence_gate.bias",
    }  # fmt: skip
    load(ours, rename(theirs, names))
    positions = torch.arange(TIME)[None].expand(2, -1)
    assert_same(
        ours, theirs, their_call=lambda module, x: module(x, positions, None, use_cache=False)[0]
    )


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_lightning_attention_of_minimax(layer_idx):
    config = modeling_minimax.MiniMaxConfig(
        hidden_size=D, num_attention_heads=4, head_dim=8, num_hidden_layers=4, block_size=8,
        hidden_act="silu",
    )  # fmt: skip
    theirs = layer(modeling_minimax.MiniMaxLightningAttention, config, layer_idx=layer_idx)
    ours = mixer("lightning_attention", layers=4, layer_idx=layer_idx, num_heads=4)
    weights = rename(
        theirs, {"out_proj": "o_proj", "output_gate": "gate_proj", "norm": "norm.norm"}
    )
    # rows come head by head: [q, k, v]
    fused = weights.pop("qkv_proj.weight").view(4, 3, 8, D).unbind(1)
    for name, w in zip("qkv", fused, strict=True):
        weights[f"{name}_proj.weight"] = w.reshape(-1, D)
    load(ours, weights)
    # either keeps its decays in float32, also in a model in float64
    assert_same(
        ours,
        theirs,
        their_call=lambda module, x: module(x, None, None)[0],
        exact_to=FLOAT32_EPS,
    )


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_mlstm_of_xlstm(eps):
    """Their eps is added after a division by exp(m), so it shows which m either has; 0 hides it.

    The norm takes out how large a head is, and with it the normaliser, but for its own large eps.
    """
    config = modeling_xlstm.xLSTMConfig(
        hidden_size=D, num_heads=2, qk_dim_factor=0.5, v_dim_factor=1.0, num_hidden_layers=1,
        chunk_size=8, gate_soft_cap=15.0, norm_eps=1.0, weight_mode="single", eps=eps,
    )  # fmt: skip
    theirs = layer(modeling_xlstm.xLSTMLayer, config)
    ours = mixer("mlstm", num_heads=2, normalizer_eps=eps, norm_eps=1.0)
    names = {
        "igate_preact": "input_gate_proj", "fgate_preact": "forget_gate_proj",
        "ogate_preact": "gate_proj", "out_proj": "o_proj", "multihead_norm": "norm",
    }  # fmt: skip
    weights = rename(theirs, names)
    for name in "qkv":
        weights[f"{name}_proj.weight"] = weights.pop(f"{name}.weight")
    load(ours, weights)
    padded = -TIME % 8  # their chunked form wants whole chunks

    def run(module, x):
        return module(torch.nn.functional.pad(x, (0, 0, 0, padded)))[0][:, :TIME]

    assert_same(ours, theirs, their_call=run)


def test_time_steps_start_where_mamba_has_them():
    """softplus(dt_bias) log-uniform in [1e-3, 0.1]: the mean of its log is that of the bounds."""
    ours = mixer("mamba", inner_size=4096, state_size=2)
    dt = torch.nn.functional.softplus(ours.dt_proj.bias)
    assert dt.min() >= 1e-3
    assert dt.max() <= 0.1 * (1 + 1e-5)
    middle = (math.log(1e-3) + math.log(0.1)) / 2
    spread = (math.log(0.1) - math.log(1e-3)) / math.sqrt(12)
    assert abs(dt.log().mean() - middle) < 5 * spread / math.sqrt(4096)


@pytest.mark.parametrize("query_latent", [12, None])
def test_multi_head_latent_attention_of_deepseek_v3(query_latent):
    config = modeling_deepseek_v3.DeepseekV3Config(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=query_latent,
        kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10,
        num_hidden_layers=1, attention_bias=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = layer(modeling_deepseek_v3.DeepseekV3Attention, config, layer_idx=0)
    ours = mixer(
        "multi_head_latent_attention", num_heads=4, latent_dim=16, query_latent_dim=query_latent,
        head_dim=6, rope_dim=8, value_head_dim=10,
    )  # fmt: skip
    names = {
        "q_a_proj": "q_down_proj", "q_a_layernorm": "q_norm", "q_b_proj": "q_proj",
        "kv_a_proj_with_mqa": "kv_down_proj", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_proj",
    }  # fmt: skip
    weights = rename(theirs, names)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # their pairs are neighbours
    q = weights["q_proj.weight"].view(4, 14, -1)
    weights["q_proj.weight"] = torch.cat([q[:, :6], q[:, 6:][:, order]], dim=1).flatten(0, 1)
    down = weights["kv_down_proj.weight"]
    weights["kv_down_proj.weight"] = torch.cat([down[:16], down[16:][order]])
    load(ours, weights)

    ours.config._attn_implementation = "sdpa"
    rotary = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
    x = torch.randn(1, TIME, D)
    cos, sin = rotary(x, torch.arange(TIME)[None])
    assert_same(
        ours,
        theirs,
        lambda module, x: module(x, position_embeddings=(cos.to(x), sin.to(x)))[0],
        lambda module, x: module(x, (cos.to(x), sin.to(x)), None)[0],
    )

    # and token by token, where ours attends to the latents themselves; both are in float64 now
    x, cos, sin = x.double(), cos.double(), sin.double()
    with torch.no_grad(), Float64():
        expected = theirs(x, (cos, sin), None)[0]
        cache = CacheSlot(DynamicCache(config=ours.config), 0)
        steps = [
            ours(x[:, t : t + 1], position_embeddings=(cos[:, t : t + 1], sin[:, t : t + 1]),
                 cache=cache)[0]
            for t in range(TIME)
        ]  # fmt: skip
    assert distance(torch.cat(steps, dim=1), expected) <= 1e-12 * expected.std()
