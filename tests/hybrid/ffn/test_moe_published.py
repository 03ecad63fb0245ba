"""`mixture_of_experts` against transformers' own blocks: equal weights, outputs and gradients."""

import importlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

D, WIDTH, E, K = 32, 24, 8, 3
BACKENDS = ("eager", "batched_mm", "grouped_mm")
DEEPSEEK = {"score_function": "sigmoid", "score_correction_bias": True}


def block(family, prefix, name, **config):
    """A block of transformers' by its family; None where this version has no such family."""
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None
    made = getattr(module, f"{prefix}Config")(hidden_size=D, num_experts_per_tok=K, **config)
    made._experts_implementation = "eager"
    return getattr(module, f"{prefix}{name}")(made)


def mixtral():
    made = block(
        *("mixtral", "Mixtral", "SparseMoeBlock"), intermediate_size=WIDTH, num_local_experts=E
    )
    return made, {}


def softmax_block(family, prefix, norm, width="moe_intermediate_size"):
    sizes = {"num_experts": E, width: WIDTH, "norm_topk_prob": norm}
    return block(family, prefix, "SparseMoeBlock", **sizes), {"normalize_weights": norm}


def jamba():
    made = block(
        *("jamba", "Jamba", "SparseMoeBlock"), intermediate_size=WIDTH, num_experts=E, num_layers=1
    )
    return made, {"normalize_weights": False}


class GraniteBlock(nn.Module):
    """The sum that transformers writes out in its decoder layer."""

    def __init__(self, experts, shared):
        super().__init__()
        self.experts = experts
        self.shared = shared

    def forward(self, x):
        return self.experts(x) + self.shared(x)


def granite():
    sizes = {
        "intermediate_size": WIDTH,
        "shared_intermediate_size": 40,
        "num_local_experts": E,
        "layer_types": ["attention"],
        "mamba_n_heads": 2,
        "num_hidden_layers": 1,
    }
    parts = [block("granitemoehybrid", "GraniteMoeHybrid", n, **sizes) for n in ("MoE", "MLP")]
    return GraniteBlock(*parts), {"num_shared_experts": 1, "shared_intermediate_size": 40}


def gated_shared(family, prefix, norm):
    sizes = {
        "num_experts": E,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 40,
    }
    made = block(family, prefix, "SparseMoeBlock", norm_topk_prob=norm, **sizes)
    shared = {"num_shared_experts": 1, "shared_intermediate_size": 40, "shared_gate": True}
    return made, {"normalize_weights": norm, **shared}


def deepseek(family, prefix, groups, kept, norm, experts="n_routed_experts"):
    made = block(
        family,
        prefix,
        "MoE",
        moe_intermediate_size=WIDTH,
        n_shared_experts=2,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
        **{experts: E},
    )
    options = {
        **DEEPSEEK,
        "normalize_weights": norm,
        "scaling_factor": 2.5,
        "num_groups": groups,
        "top_k_groups": kept,
        "num_shared_experts": 2,
    }
    return made, options


def deepseek_v2():
    made = block(
        *("deepseek_v2", "DeepseekV2", "Moe"),
        moe_intermediate_size=WIDTH,
        n_routed_experts=E,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
    )
    options = {
        "normalize_weights": False,
        "scaling_factor": 2.0,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "max",
        "num_shared_experts": 2,
    }
    return made, options


def gpt_oss():
    made = block("gpt_oss", "GptOss", "MLP", intermediate_size=WIDTH, num_local_experts=E)
    return made, {"activation": "clamped_swiglu", "bias": True, "router_bias": True}


def nemotron(latent):
    made = block(
        *("nemotron_h", "NemotronH", "MoE"),
        moe_intermediate_size=WIDTH,
        moe_shared_expert_intermediate_size=40,
        moe_latent_size=latent,
        n_routed_experts=E,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        n_group=1,
        topk_group=1,
        mlp_hidden_act="relu2",
    )
    options = {
        **DEEPSEEK,
        "activation": "relu2",
        "scaling_factor": 2.5,
        "num_shared_experts": 1,
        "shared_intermediate_size": 40,
        "latent_size": latent,
    }
    return made, options


def lfm2():
    made = block(
        *("lfm2_moe", "Lfm2Moe", "SparseMoeBlock"),
        moe_intermediate_size=WIDTH,
        num_experts=E,
        norm_topk_prob=True,
        use_expert_bias=True,
        routed_scaling_factor=1.5,
    )
    return made, {**DEEPSEEK, "scaling_factor": 1.5, "normalize_epsilon": 1e-6}


BLOCKS = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: softmax_block("qwen3_moe", "Qwen3Moe", True),
    "qwen3_moe_as_is": lambda: softmax_block("qwen3_moe", "Qwen3Moe", False),
    "olmoe": lambda: softmax_block("olmoe", "Olmoe", False, "intermediate_size"),
    "jamba": jamba,
    "granitemoehybrid": granite,
    "qwen2_moe": lambda: gated_shared("qwen2_moe", "Qwen2Moe", False),
    "qwen3_next": lambda: gated_shared("qwen3_next", "Qwen3Next", True),
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": lambda: deepseek("deepseek_v3", "DeepseekV3", 4, 2, True),
    "deepseek_v3_without_groups": lambda: deepseek("deepseek_v3", "DeepseekV3", 1, 1, False),
    "kimi_linear": lambda: deepseek("kimi_linear", "KimiLinear", 1, 1, True, "num_local_experts"),
    "bailing_hybrid": lambda: deepseek(
        "bailing_hybrid", "BailingHybrid", 4, 2, True, "num_local_experts"
    ),
    "gpt_oss": gpt_oss,
    "nemotron_h": lambda: nemotron(None),
    "nemotron_h_latent": lambda: nemotron(16),
    "lfm2_moe": lfm2,
}


def ours(name, tensor):
    """A tensor of theirs under our name, or several."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    if name == "shared_experts.input_linear.weight":
        gate, up = tensor.chunk(2)
        return {"shared_experts.gate_proj.weight": gate, "shared_experts.up_proj.weight": up}
    return {name: tensor}


RENAMED = (
    ("experts.router.", "router."),
    ("experts.experts.", "experts."),
    ("shared.", "shared_experts."),
    ("output_linear", "down_proj"),
    ("gate.weight", "router.weight"),
    ("gate.e_score_correction_bias", "router.score_correction_bias"),
    ("shared_expert_router.weight", "shared_gate.weight"),
    ("shared_expert.", "shared_experts."),
    ("fc1_latent_proj", "latent_in"),
    ("fc2_latent_proj", "latent_out"),
)


def converted(block, tensors):
    """State or gradients of a block of theirs -> ours."""
    found = {}
    for name, tensor in tensors.items():
        if type(block).__name__ == "GptOssMLP" and name.startswith("experts."):
            tensor = gpt_oss_layout(name, tensor)
        name = name.replace("expert_bias", "router.score_correction_bias")
        found |= ours(name, tensor)
    return found


def gpt_oss_layout(name, tensor):
    """(E, in, out) with gate and up by turns -> (E, out, in), the gate first."""
    if "gate_up" in name:
        tensor = torch.cat([tensor[..., ::2], tensor[..., 1::2]], dim=-1)
    return tensor if name.endswith("_bias") else tensor.transpose(1, 2).contiguous()


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("family", BLOCKS)
def test_outputs_and_gradients_of_transformers_blocks(layer, family, implementation):
    torch.manual_seed(0)
    block, options = BLOCKS[family]()
    if block is None:
        pytest.skip("this transformers has no such family")
    for tensor in (*block.parameters(), *block.buffers()):
        nn.init.normal_(tensor, std=0.2)
    base = {"num_experts": E, "top_k": K, "intermediate_size": WIDTH}
    moe = layer({**base, **options}, implementation)
    moe.load_state_dict(converted(block, block.state_dict()), strict=True)

    # far enough out for the clamps of gpt-oss to take part
    x = 5 * torch.randn(2, 13, D)
    theirs_x, ours_x = (x.clone().requires_grad_() for _ in range(2))
    direction = torch.randn(2, 13, D)
    expected, found = block(theirs_x), moe(ours_x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    close = {"rtol": 1e-5, "atol": 2e-5 * expected.abs().max().item()}
    assert_close(found, expected, **close)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    assert_close(ours_x.grad, theirs_x.grad, **close)
    gradients = {n: p.grad for n, p in moe.named_parameters()}
    theirs = converted(block, {n: p.grad for n, p in block.named_parameters()})
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().item()
        assert_close(gradients[name], gradient, rtol=1e-5, atol=2e-5 * scale, msg=name)
