"""Hybrids of one's own as published ones, and what their maps refuse; beside `families`."""

import json
import re

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)

import hybrid
from hybrid.convert import export, get_family
from hybrid.convert.checkpoint import Checkpoint
from hybrid.convert.configs import to_ours

ROPE = {"rope_type": "default", "rope_theta": 500.0}
MAMBA = {"num_heads": 6, "head_dim": 8, "state_size": 5}
LATENT = {"num_heads": 4, "latent_dim": 10, "head_dim": 6, "rope_dim": 4, "value_head_dim": 7,
          "output_gate": True, "latent_norm_eps": 1e-6}  # fmt: skip
GEMMA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 10, "scale": 0.25, "qk_norm": "head",
         "qk_norm_type": "zero_centered_rmsnorm"}  # fmt: skip
EXPERTS = {"num_experts": 6, "top_k": 2, "intermediate_size": 12, "num_shared_experts": 1,
           "score_function": "sigmoid", "score_correction_bias": True}  # fmt: skip
SHARED = {"blocks": 2, "lora_rank": 3, "concat_embeddings": True, "depth_projection": True,
          "output": "next"}  # fmt: skip
RELU2 = {"-": {"activation": "relu2", "intermediate_size": 28}}

OWN = {
    "gemma3_text": ("LLG", {
        "norm": "zero_centered_rmsnorm", "norm_position": "sandwich", "tie_word_embeddings": True,
        "embedding_multiplier": "sqrt_hidden_size",
        "mixers": {"L": {"type": "sliding_window_attention", "window": 5, **GEMMA},
                   "G": {"type": "softmax_attention", **GEMMA, "rope_parameters": ROPE}}}),
    "falcon_h1": ("[MS]2", {
        "parallel_combine": "sum", "mixers": {"M": MAMBA, "S": {"num_heads": 3, "scale": 0.3}},
        "residuals": {"S": {"input_multiplier": 0.7}, "-": {"output_multiplier": 0.6}}}),
    # a feed-forward within each layer becomes one of its own
    "nemotron_h": ("MS", {
        "feed_forwards": RELU2, "norm_eps": 1e-5,
        "mixers": {"M": MAMBA, "S": {"num_heads": 3, "rope_parameters": None}}}),
    "recurrent_gemma": ("UW", {
        "norm": "zero_centered_rmsnorm", "embedding_multiplier": 4.90625, "logit_softcap": 5.0,
        "feed_forwards": {"-": {"activation": "geglu_tanh", "bias": True}},
        "mixers": {"U": {"num_heads": 3}, "W": {"num_heads": 3, "window": 5, "output_bias": True}}}),
    "zamba2": ("QMQMMQM", {
        "ffn": {"Q": "-", "default": ""}, "shared": {"Q": SHARED}, "norm_eps": 1e-5,
        "residuals": {"Q": {"skip_multiplier": 0.0}}, "tie_word_embeddings": True,
        "feed_forwards": {"-": {"activation": "geglu"}},
        "mixers": {"M": {**MAMBA, "num_heads": 6},
                   "Q": {"type": "softmax_attention", "num_heads": 3, "rope_parameters": None,
                         "scale": 8**-0.5}}}),
    "bailing_hybrid": ("KA", {
        "feed_forwards": {"E": EXPERTS}, "ffn": "-E",
        "mixers": {"K": {"num_heads": 4, "head_dim": 5, "value_head_dim": 5, "gate_rank": 0},
                   "A": LATENT}}),
    "xlstm": ("XX", {"logit_softcap": 9.0, "mixers": {"X": {"num_heads": 4, "head_dim": 16,
                                                           "value_head_dim": 32}}}),
}  # fmt: skip


def build(layout, **options):
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 61,
        "hidden_size": 24,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    config = hybrid.HybridConfig(layout=layout, **{**defaults, **options})
    return hybrid.HybridForCausalLM(config).eval()


def skip_if_missing(family):
    """Skip, where the family is newer than the installed transformers."""
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


@torch.no_grad()
@pytest.mark.parametrize("family", list(OWN))
def test_a_hybrid_of_ours_becomes_a_published_one(family, tmp_path):
    skip_if_missing(family)
    layout, options = OWN[family]
    ours = build(layout, **options)
    assert export(ours, tmp_path / "out", family) == family
    kind = getattr(transformers, get_family(family).architecture)
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs.eval()(ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3_text",
         {"mixers": {letter: {"type": kind, **GEMMA, "rope_parameters": None} for letter, kind in
                     (("L", "sliding_window_attention"), ("G", "softmax_attention"))}},
         r"mixers.S.rope_parameters: expected rotary parameters in every layer, got None"),
        ("falcon_h1", {"parallel_combine": "mean"},
         r"parallel_combine: 'mean' here, falcon_h1 can only say 'sum'"),
        ("nemotron_h", {"mixers": {"M": MAMBA, "S": {"num_heads": 3}}},
         r"mixers.S.rope_parameters: .* here \(layer 1\), nemotron_h can only say None"),
        ("nemotron_h", {"mixers": {"M": {**MAMBA, "dt_limit": [0.1, 0.5]}, "S": {"num_heads": 3,
                                   "rope_parameters": None}}},
         r"mixers.M.dt_limit: \[0.1, 0.5\] here \(layer 0\), nemotron_h can only say \[0.1, inf\]"),
        ("recurrent_gemma", {"embedding_multiplier": "sqrt_hidden_size"},
         r"embedding_multiplier: 'sqrt_hidden_size' here, recurrent_gemma can only say 4.90625"),
        ("zamba2", {"layout": "MQL", "shared": {"Q": {**SHARED, "blocks": 1}}},
         r"layer 2 \(L\): expected the mixers of zamba2"),
        ("zamba2", {"shared": {"Q": {**SHARED, "lora_targets": ["down_proj"]}}},
         r"shared.Q.lora_targets: \['down_proj'\] here .* can only say \['gate_proj', 'up_proj'\]"),
        ("bailing_hybrid", {"mixers": {"K": {"num_heads": 4, "head_dim": 5, "value_head_dim": 5},
                                       "A": LATENT}},
         r"mixers.K.gate_rank: 5 here \(layer 0\), bailing_hybrid can only say 0"),
        ("xlstm", {"mixers": {"X": {"num_heads": 4, "head_dim": 16, "value_head_dim": 32,
                                    "input_gate": "sigmoid"}}},
         r"mixers.X.input_gate: 'sigmoid' here \(layers 0-1\), xlstm can only say 'exp'"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named(family, change, message, tmp_path):
    skip_if_missing(family)
    layout, options = OWN[family]
    changed = {**options, **change}
    model = build(changed.pop("layout", layout), **changed)
    with pytest.raises(ValueError, match=f"this model cannot be written as {family}") as caught:
        export(model, tmp_path / "out", family)
    assert any(re.search(message, line) for line in caught.value.obstacles)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping: expected None, got 50.0",
        ),
        (
            "falcon_h1",
            {"mamba_proj_bias": True},
            "mamba_proj_bias: expected the value of projectors_bias, False, got True",
        ),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias: expected False with experts, got True"),
        ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings: expected True, got False"),
        ("xlstm", {"weight_mode": "fused"}, "weight_mode: expected 'single', got 'fused'"),
    ],
)
def test_what_cannot_be_read_is_named(family, values, message):
    found = get_family(family)
    with pytest.raises(ValueError, match=message):
        to_ours(found, found.their_config(values))


def test_a_family_that_this_transformers_does_not_have(monkeypatch):
    monkeypatch.delitem(CONFIG_MAPPING_NAMES, "bailing_hybrid", raising=False)
    with pytest.raises(ValueError, match="does not have bailing_hybrid yet; install a later one"):
        get_family("bailing_hybrid").their_config({})


def test_a_shared_block_feeds_a_mamba_layer(tmp_path):
    """Which all of Zamba2's do."""
    _, options = OWN["zamba2"]
    with pytest.raises(ValueError, match="expected M after each Z, as in zamba2"):
        export(build("MQQM", **options), tmp_path / "out", "zamba2")


@torch.no_grad()
@pytest.mark.parametrize("given", ["folder", "model"])
def test_gemma_3_inside_a_model_for_images(tmp_path, given):
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "head_dim": 10,
            "num_key_value_heads": 2, "sliding_window": 5, "num_hidden_layers": 2, "vocab_size": 61,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60,
        boi_token_index=58, eoi_token_index=59,
    )  # fmt: skip
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"
    ours = hybrid.HybridForCausalLM.from_published(tmp_path if given == "folder" else theirs)
    ids = torch.randint(3, 50, (2, 9))
    expected = theirs(input_ids=ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


# Ring-linear: no class of transformers, so the published formulas, one token after another


def rms(x, weight):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def rotated_half(x, theta):
    """Positions on the first half of the channels of x (T, H, K), pairs (j, j + K / 4)."""
    size = x.shape[-1] // 2
    angle = torch.arange(x.shape[0]).double()[:, None] * theta ** -(
        torch.arange(0, size, 2).double() / size
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x.split([size // 2, size // 2, size], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def latent_attention(config, w, at, h):
    """Ling 2.5's, (T, D) to (T, D): keys and values from a latent, neighbours rotated together."""
    heads, theta = config["num_attention_heads"], config["rope_theta"]
    nope, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    time = len(h)
    angle = torch.arange(time).double()[:, None] * theta ** -(
        torch.arange(0, turned, 2).double() / turned
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    q = rms(h @ w[f"{at}q_a_proj.weight"].T, w[f"{at}q_a_layernorm.weight"])
    q = (q @ w[f"{at}q_b_proj.weight"].T).unflatten(-1, (heads, -1))
    latent, shared = (h @ w[f"{at}kv_a_proj_with_mqa.weight"].T).split(
        [config["kv_lora_rank"], turned], dim=-1
    )
    latent = rms(latent, w[f"{at}kv_a_layernorm.weight"])
    keys, v = (
        (latent @ w[f"{at}kv_b_proj.weight"].T)
        .unflatten(-1, (heads, -1))
        .split([nope, config["v_head_dim"]], dim=-1)
    )
    q = torch.cat([q[..., :nope], rotate(q[..., nope:])], dim=-1)
    k = torch.cat([keys, rotate(shared[:, None]).expand(-1, heads, -1)], dim=-1)
    logits = torch.einsum("thk,shk->hts", q, k) * (nope + turned) ** -0.5
    logits = logits.masked_fill(~torch.ones(time, time).tril().bool(), float("-inf"))
    o = torch.einsum("hts,shv->thv", logits.softmax(-1), v).flatten(1)
    return o @ w[f"{at}dense.weight"].T


def ring_linear(config, weights, ids, first=-1):
    """Logits (T, V) of ids (T,) in float64; `first`: number of the first layer in its decays."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, dim, layers = (
        config["num_attention_heads"],
        config["head_dim"],
        config["num_hidden_layers"],
    )
    kv_heads, theta = config["num_key_value_heads"], config["rope_theta"]
    x = w["model.word_embeddings.weight"][ids]
    time = len(ids)
    for i in range(layers):
        at = f"model.layers.{i}."
        h = rms(x, w[f"{at}input_layernorm.weight"])
        softmax = (i + 1) % config["layer_group_size"] == 0
        if softmax and "kv_lora_rank" in config:
            x = x + latent_attention(config, w, f"{at}attention.", h)
            h = rms(x, w[f"{at}post_attention_layernorm.weight"])
            x = x + ring_feed_forward(config, w, f"{at}mlp.", h)
            continue
        shared = kv_heads if softmax else heads
        qkv = h @ w[f"{at}attention.query_key_value.weight"].T
        q, k, v = qkv.unflatten(-1, (-1, dim)).split([heads, shared, shared], dim=1)
        q = rotated_half(rms(q, w[f"{at}attention.query_layernorm.weight"]), theta) * dim**-0.5
        k = rotated_half(rms(k, w[f"{at}attention.key_layernorm.weight"]), theta)
        k, v = (y.repeat_interleave(heads // shared, dim=1) for y in (k, v))
        if softmax:
            seen = torch.ones(time, time).tril().bool()
            logits = torch.einsum("thk,shk->hts", q, k).masked_fill(~seen, float("-inf"))
            o = torch.einsum("hts,shv->thv", logits.softmax(-1), v).flatten(1)
        else:
            slope = 2.0 ** (-8 * (torch.arange(heads).double() + 1) / heads)
            decay = torch.exp(-slope * (1 - (i + first) / (layers - 1) + 1e-5))[:, None, None]
            state, outputs = 0, []
            for t in range(time):
                state = decay * state + k[t][:, :, None] * v[t][:, None, :]
                outputs.append(torch.einsum("hk,hkv->hv", q[t], state).flatten())
            o = torch.stack(outputs).unflatten(-1, (config["group_norm_size"], -1))
            o = torch.nn.functional.rms_norm(o, o.shape[-1:], eps=1e-6).flatten(1)
            gate = torch.sigmoid(h @ w[f"{at}attention.g_proj.weight"].T)
            o = o * w[f"{at}attention.g_norm.weight"] * gate
        x = x + o @ w[f"{at}attention.dense.weight"].T
        h = rms(x, w[f"{at}post_attention_layernorm.weight"])
        x = x + ring_feed_forward(config, w, f"{at}mlp.", h)
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def ring_feed_forward(config, w, at, h):
    def swiglu(prefix, x):
        gate = torch.nn.functional.silu(x @ w[f"{prefix}gate_proj.weight"].T)
        return (gate * (x @ w[f"{prefix}up_proj.weight"].T)) @ w[f"{prefix}down_proj.weight"].T

    if f"{at}gate.weight" not in w:
        return swiglu(at, h)
    outputs = []
    for x in h:
        scores = torch.sigmoid(w[f"{at}gate.weight"] @ x)
        choice = (scores + w[f"{at}gate.expert_bias"]).unflatten(0, (config["n_group"], -1))
        best = choice.topk(2).values.sum(-1).topk(config["topk_group"]).indices
        kept = torch.full_like(choice, float("-inf"))
        kept[best] = choice[best]
        chosen = kept.flatten().topk(config["num_experts_per_tok"]).indices
        share = scores[chosen] / scores[chosen].sum() * config["routed_scaling_factor"]
        routed = [
            s * swiglu(f"{at}experts.{e}.", x) for s, e in zip(share, chosen.tolist(), strict=True)
        ]
        outputs.append(sum(routed) + swiglu(f"{at}shared_experts.", x))
    return torch.stack(outputs)


@torch.no_grad()
def test_ring_linear_by_the_published_formulas(tmp_path):
    config = {
        "model_type": "bailing_moe_linear", "hidden_size": 24, "intermediate_size": 28,
        "num_hidden_layers": 6, "layer_group_size": 3, "vocab_size": 61, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "group_norm_size": 2, "n_group": 3,
        "topk_group": 2, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rope_theta": 100.0,
        "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    family = get_family("bailing_moe_linear")
    torch.manual_seed(0)
    theirs = family.their_config({**config, "rope_scaling": None})
    ours = hybrid.HybridForCausalLM(to_ours(family, theirs)).eval()
    for tensor in ours.state_dict().values():
        tensor.copy_(tensor + 0.3 * torch.randn_like(tensor))
    assert export(ours, tmp_path / "out", "bailing_moe_linear") == "bailing_moe_linear"
    with Checkpoint(tmp_path / "out") as published:
        weights = {name: published.read(name) for name in published.specs}
    ids = torch.randint(3, 61, (11,))
    expected = ring_linear(config, weights, ids)
    found = hybrid.HybridForCausalLM.from_published(tmp_path / "out", dtype=torch.float64)
    assert ((found(ids[None]).logits[0] - expected).abs().max() / expected.std()) < 1e-6
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert found.config.layout == "LLSLLS"
    for name, tensor in ours.state_dict().items():
        assert torch.equal(found.state_dict()[name].to(tensor.dtype), tensor), name


@torch.no_grad()
def test_ling_2_5_by_the_published_formulas(tmp_path):
    """Its model type is Ling 3's; the class in its config says which of the two it is."""
    config = {
        "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 6, "layer_group_size": 3,
        "vocab_size": 61, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
        "group_norm_size": 2, "n_group": 3, "topk_group": 2, "num_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "rope_theta": 100.0, "q_lora_rank": 10, "kv_lora_rank": 6,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "pad_token_id": 0,
        "eos_token_id": 2,
    }  # fmt: skip
    family = get_family("bailing_hybrid", ["BailingMoeV2_5ForCausalLM"])
    assert family.name == "bailing_moe_v2_5"
    assert get_family("bailing_hybrid", ["BailingMoeV3ForCausalLM"]).name == "bailing_hybrid"
    assert get_family("bailing_hybrid").name == "bailing_hybrid"
    torch.manual_seed(0)
    ours = hybrid.HybridForCausalLM(to_ours(family, family.their_config(config))).eval()
    for tensor in ours.state_dict().values():
        tensor.copy_(tensor + 0.3 * torch.randn_like(tensor))
    assert export(ours, tmp_path / "out") == "bailing_moe_v2_5"
    with Checkpoint(tmp_path / "out") as published:
        weights = {name: published.read(name) for name in published.specs}
    ids = torch.randint(3, 61, (11,))
    expected = ring_linear(config, weights, ids, first=0)
    found = hybrid.HybridForCausalLM.from_published(tmp_path / "out", dtype=torch.float64)
    # the decays here end at 1e-5 of the depth from theirs
    assert ((found(ids[None]).logits[0] - expected).abs().max() / expected.std()) < 2e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert written["model_type"] == "bailing_hybrid"
    assert written["architectures"] == ["BailingMoeV2_5ForCausalLM"]
    assert found.config.layout == "LLALLA"
    for name, tensor in ours.state_dict().items():
        assert torch.equal(found.state_dict()[name].to(tensor.dtype), tensor), name
