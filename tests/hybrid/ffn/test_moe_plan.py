"""`hybrid.plan` of mixtures of experts, against published figures and built models."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybrid import HybridConfig
from hybrid.plan import expert_plans, plan, print_plan

# From the models' published configs: routed, shared, top k, d_model, d_expert; then sparsity and
# granularity as published tables round them.
TABLE = {
    "Mixtral-8x7B": (8, 0, 2, 4096, 14336, "4.0", "0.571"),
    "OLMoE-1B-7B": (64, 0, 8, 2048, 1024, "8.0", "4.0"),
    "gpt-oss-20b": (32, 0, 4, 2880, 2880, "8", "2.0"),
    "gpt-oss-120b": (128, 0, 4, 2880, 2880, "32", "2.0"),
    "Step-3": (48, 1, 3, 7168, 5120, "12.25", "2.8"),
    "GLM-4.5-Air": (128, 1, 8, 4096, 1408, "14.3", "5.8"),
    "Qwen3-30B-A3B": (128, 0, 8, 2048, 768, "16.0", "5.3"),
    "Qwen3-235B-A22B": (128, 0, 8, 4096, 1536, "16.0", "5.3"),
    "GLM-4.5": (160, 1, 8, 5120, 1536, "17.8", "6.6"),
    "DeepSeek-V2": (160, 2, 6, 5120, 1536, "20.25", "6.6"),
    "DeepSeek-V3": (256, 1, 8, 7168, 2048, "28.6", "7.0"),
    "Kimi-K2": (384, 1, 8, 7168, 2048, "42.8", "7.0"),
    "Qwen3-Next-80B-A3B": (512, 1, 10, 2048, 512, "46.6", "8.0"),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_sparsity_and_granularity(name):
    routed, shared, top_k, d_model, d_expert, sparsity, granularity = TABLE[name]
    options = {
        "num_experts": routed,
        "num_shared_experts": shared,
        "top_k": top_k,
        "intermediate_size": d_expert,
    }
    config = HybridConfig(layout="S", ffn="E", hidden_size=d_model, feed_forwards={"E": options})
    found = expert_plans(config)["E"]
    for value, printed in ((found.sparsity, sparsity), (found.granularity, granularity)):
        # Some tables cut digits off, others round.
        digits = len(printed.partition(".")[2])
        cut = math.floor(value * 10**digits) / 10**digits
        assert printed in (f"{value:.{digits}f}", f"{cut:.{digits}f}")
    assert found.activation_ratio == pytest.approx(1 / found.sparsity)


def test_parameters_of_mixtral_8x7b_are_the_published_46_7_and_12_9_billion():
    config = HybridConfig(
        layout="S",
        num_hidden_layers=32,
        ffn="E",
        hidden_size=4096,
        vocab_size=32000,
        tie_word_embeddings=False,
        mixers={"S": {"num_heads": 32, "num_kv_heads": 8}},
        feed_forwards={"E": {"num_experts": 8, "top_k": 2, "intermediate_size": 14336}},
    )
    cost = plan(config)
    assert cost.parameters == 46_702_792_704
    assert cost.active_parameters == pytest.approx(12.9e9, rel=0.005)
    assert cost.active_parameters == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336


def test_matmul_flops_against_torchs_counter(build, ids):
    options = {"num_experts": 6, "top_k": 2, "num_shared_experts": 1, "shared_gate": True}
    model = build(layout="S2", dtype=torch.float32, ffn="-E", feed_forwards={"E": options})
    model.set_experts_implementation("eager")
    time = 12
    with FlopCounterMode(display=False) as counter:
        model(ids(1, time))
    counts = counter.get_flop_counts()["Global"]
    projections = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    cost = plan(model.config, time)
    mixing = sum(layer.mixer.mixing_flops(time) for layer in model.model.layers)
    assert (cost.flops_per_token - mixing) * time == pytest.approx(projections, rel=1e-9)


def test_printed(capsys):
    options = {"num_experts": 16, "top_k": 3, "num_shared_experts": 1, "intermediate_size": 128}
    config = HybridConfig(layout="LS", ffn="-E", feed_forwards={"E": options})
    print_plan(plan(config), config)
    printed = capsys.readouterr().out
    for text in ("3+1 of 16+1, in 1 layers", "23.529%", "4.25", "granularity"):
        assert text in printed


def test_without_experts_there_is_nothing_to_tell():
    assert plan(HybridConfig(layout="S")).experts == {}
