"""Tensor and expert parallelism: two processes do what one does; what cannot be split is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.distributed import DistributedConfig

from hybrid.config import registry
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.parallel import known_styles
from hybrid.modeling.model import HybridForCausalLM
from hybrid.modeling.parallel_plans import Size, check_sizes, resolve_plans

pytestmark = pytest.mark.compat

S = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": "head", "output_gate": True}
W = {"num_heads": 4, "num_kv_heads": 2, "window": 4}
AUTO = {"tp_plan": "auto"}
NEWER = "ep_dispatch_experts" in known_styles()
"""transformers from 5.19 on: given plans are merged, and experts may be split beside the rest."""

ALONE = {"tp_size": 2, "enable_expert_parallel": True}
EXPERTS = {"tp_size": 2, "ep_size": 2} if NEWER else ALONE

FFN_RULES = {
    "model.layers.*.ffn.gate_proj": "colwise",
    "model.layers.*.ffn.up_proj": "colwise",
    "model.layers.*.ffn.down_proj": "rowwise",
    "model.layers.0.mixer.o_proj": "rowwise_split_input",
}

# name: config, what is asked for, what is split, what is whole
CASES = {
    "mixed": (
        {"layout": "LLLS"},
        {"literally": True, **AUTO},
        ["model.embed_tokens", "lm_head", "model.layers.3.mixer.q_proj", "model.layers.0.ffn"],
        ["model.layers.0.mixer", "model.layers.1.mixer", "model.norm", "model.layers.3.mixer.q_norm"],
    ),
    "biases": (
        {
            "layout": "SS",
            "tie_word_embeddings": False,
            "mixers": {"S": {**S, "bias": True, "output_bias": True, "temperature": 0.3}},
            "feed_forwards": {"-": {"bias": True, "activation": "relu2"}},
        },
        AUTO,
        ["lm_head", "model.layers.0.mixer.q_proj", "model.layers.1.ffn.down_proj"],
        [],
    ),
    "experts": (
        {
            "layout": "LS",
            "ffn": "E",
            "feed_forwards": {
                "E": {"num_shared_experts": 1, "shared_gate": True, "balance_loss": 0.01}
            },
        },
        AUTO,
        ["model.layers.0.ffn.experts", "model.layers.0.ffn.shared_experts"],
        ["model.layers.0.ffn.router", "model.layers.0.ffn.shared_gate"],
    ),
    "experts float32": ({"layout": "LS", "ffn": "E"}, AUTO, ["model.layers.0.ffn.experts"], []),
    "whole experts": (
        {
            "layout": "SL",
            "ffn": "E",
            "feed_forwards": {
                "E": {"num_experts": 4, "num_shared_experts": 1, "bias": True,
                      "bias_update_rate": 0.1, "balance_loss": 0.01}
            },
        },
        ALONE,
        ["model.layers.0.ffn.experts"],
        ["model.layers.0.ffn.shared_experts", "model.layers.0.mixer"],
    ),
    "whole experts float32": (
        {"layout": "SELE", "feed_forwards": {"E": {"activation": "clamped_swiglu"}}},
        EXPERTS,
        ["model.layers.1.ffn.experts"],
        [],
    ),
    "side by side": (
        {
            "layout": "[MS]WB",
            "mixers": {
                "S": S,
                "W": {**W, "soft_cap": 3.0},
                "B": {"num_heads": 4, "num_kv_heads": 2, "chunk_size": 4},
            },
        },
        AUTO,
        ["model.layers.0.mixer.branches.1.q_proj", "model.layers.1.mixer", "model.layers.2.mixer"],
        ["model.layers.0.mixer.branches.0"],
    ),
    "multipliers": (
        {
            "layout": "SW",
            "mixers": {"S": {**S, "sinks": True}, "W": {**W, "sinks": True}},
            "embedding_multiplier": "sqrt_hidden_size",
            "embedding_norm": True,
            "logits_multiplier": 0.5,
            "logit_softcap": 5.0,
            "z_loss": 0.001,
            "canon": "AC",
        },
        AUTO,
        ["model.embed_tokens", "model.layers.0.ffn"],
        [],
    ),
    "whole mixers": (
        {
            "layout": "STU",
            "mixers": {
                "S": S,
                "T": {"type": "softmax_attention", "num_heads": 4, "conv_size": 3},
                "U": {"type": "softmax_attention", "num_heads": 4, "alibi": True,
                      "rope_parameters": None},
            },
        },
        AUTO,
        ["model.layers.0.mixer"],
        ["model.layers.1.mixer", "model.layers.2.mixer"],
    ),
    "tied layers": (
        {"layout": "SSL", "shared": {"S": {"blocks": 1}}, "num_mtp_layers": 1},
        AUTO,
        ["model.layers.1.mixer", "model.layers.1.ffn"],
        ["mtp"],
    ),
    "adapted layers": (
        {"layout": "SSL",
         "shared": {"S": {"blocks": 1, "lora_rank": 2, "lora_targets": ["q_proj"]}}},
        AUTO,
        ["model.layers.2.ffn"],
        ["model.layers.0.mixer", "model.layers.1.ffn"],
    ),
    "given": (
        {"layout": "LS", "tie_word_embeddings": False},
        {"tp_plan": FFN_RULES},
        ["model.layers.0.mixer.o_proj", "model.layers.0.ffn"],
        ["model.layers.0.mixer.q_proj"],
    ),
    "empty": ({"layout": "LS"}, {"tp_plan": {}}, [], ["model"]),
}  # fmt: skip


def config(layout, **more):
    more.setdefault("mixers", {"S": S})
    sizes = {"hidden_size": 32, "vocab_size": 64, "initializer_range": 0.3}
    return HybridConfig(layout=layout, **sizes, **more)


def write(folder, **more):
    """A checkpoint whose vectors, too, are drawn."""
    torch.manual_seed(0)
    model = HybridForCausalLM(config(**more))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """Logits, generated tokens, gradients over two backward passes, and the saved checkpoint."""
    cases = []
    for name, (fields, distributed, split, whole) in CASES.items():
        folder = str(tmp_path / name.replace(" ", "_"))
        write(folder, **fields)
        dtype = "float32" if name.endswith("float32") else "float64"
        case = {"folder": folder, "dtype": dtype, "split": split, "whole": whole}
        cases.append({**case, "distributed": distributed})
    few = str(tmp_path / "few_heads")
    write(few, layout="LS", mixers={"S": {"num_heads": 4, "num_kv_heads": 1}})
    cases.append({"folder": few, "distributed": AUTO, "error": "mixers.S.num_kv_heads"})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    driver = Path(__file__).with_name("parallel_driver.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([p for p in sys.path if p])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(driver), str(tmp_path / "cases.json")],
        capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": path},
    )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stderr[-3000:]
    assert done.stdout.count("passed ") == 2 * len(cases)


def plans(model, **options):
    return resolve_plans(model, DistributedConfig(**options))


def test_plans_are_in_the_config():
    """A rule of all layers has `*`; where layers differ, it names its layer."""
    same = config("SS").base_model_tp_plan
    assert same["layers.*.mixer.q_proj"] == same["layers.*.ffn.up_proj"] == "colwise"
    assert same["layers.*.mixer.o_proj"] == "rowwise"
    mixed = config("LLLS")
    assert mixed.base_model_tp_plan["layers.3.mixer.k_proj"] == "colwise"
    assert not any(name.startswith("layers.0.mixer") for name in mixed.base_model_tp_plan)
    assert mixed.base_model_ep_plan is None
    experts = config("LS", ffn="E")
    assert experts.base_model_ep_plan["layers.*.ffn.experts.down_proj"] == "grouped_gemm"
    style = "ep_dispatch_experts" if NEWER else "moe_tp_experts"
    assert experts.base_model_ep_plan["layers.*.ffn.experts"] == style
    assert ("layers.*.ffn.router" in experts.base_model_ep_plan) is not NEWER


def test_plans_are_of_an_instance_and_in_no_file(tmp_path):
    one = config("SS")
    one.base_model_tp_plan = {"layers.*.ffn.up_proj": "colwise_rep"}
    assert HybridForCausalLM(one)._tp_plan["model.layers.*.ffn.up_proj"] == "colwise_rep"
    one.save_pretrained(tmp_path)
    assert "plan" not in (tmp_path / "config.json").read_text()
    assert (
        AutoConfig.from_pretrained(tmp_path).base_model_tp_plan == config("SS").base_model_tp_plan
    )


@pytest.mark.parametrize("name", sorted(registry.mixers.names()))
def test_rules_name_modules_that_exist(name):
    """For every mixer and each of its samples; and what reads whole channels is whole."""
    cls = registry.mixers.get(name)
    for options in cls.samples():
        mixers = {"X": {"type": name, **options}}
        model = HybridForCausalLM(config("X", mixers=mixers, ffn="-"))
        tp_plan, _ = plans(model, tp_plan="auto")
        split = {n.split(".")[-1] for n in tp_plan if n.startswith("model.layers.0.mixer.")}
        whole = (
            options.get("alibi") or options.get("conv_size") or options.get("qk_norm") == "layer"
        )
        assert split >= {"q_proj", "o_proj"} or not split
        assert not (split and whole), (options, split)


def test_sizes_that_do_not_divide():
    heads = {"S": {"num_heads": 4, "num_kv_heads": 2}}
    model = HybridForCausalLM(
        config("LS", mixers=heads, feed_forwards={"-": {"intermediate_size": 36}})
    )
    message = (
        r"feed_forwards.-.intermediate_size: expected a multiple of the 8 processes, got 36"
        r" \(layer 0, 1\);"
        r" mixers.S.num_kv_heads: expected a multiple of the 8 processes, got 2 \(layer 1\);"
        r" try 2 processes"
    )
    with pytest.raises(ValueError, match=message):
        plans(model, tp_size=8)
    with pytest.raises(ValueError, match="no number above 1 divides all sizes"):
        check_sizes([Size("mixers.S.num_kv_heads", 1, 0, 2)])


def test_experts_that_do_not_divide():
    model = HybridForCausalLM(config("LS", ffn="E", feed_forwards={"E": {"num_experts": 6}}))
    # the key-value heads of the tensor plan stand beside, where transformers applies both
    expected = (
        r"feed_forwards.E.num_experts: expected a multiple of the 4 .* got 6 .*try 2 (or|proc)"
    )
    with pytest.raises(ValueError, match=expected):
        plans(model, **dict.fromkeys(EXPERTS, 4))


def test_nothing_to_split():
    with pytest.raises(ValueError, match="layout 'L' has nothing to split"):
        plans(HybridForCausalLM(config("L", ffn=None)), tp_plan="auto", tp_size=2)
    with pytest.raises(ValueError, match="expected a layout with experts, got 'LS'"):
        plans(HybridForCausalLM(config("LS")), **EXPERTS)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        # the states of a linear layer would be of half the keys, and no shape would say so
        ({"model.layers.0.mixer.q_proj": "colwise"}, "model.layers.0.mixer.q_proj: expected a style"),
        ({"model.layers.*.mixer.q_proj": "colwise", "model.layers.*.mixer.k_proj": "replicate"},
         "model.layers.0.mixer.q_proj|all rules that split mixers.S of layer 1, or none"),
        ({"model.layers.*.mixer.qproj": "colwise"}, "did you mean 'model.layers.*.mixer.q_proj'"),
        ({"model.layers.7.mixer.q_proj": "colwise"}, "model.layers.7.mixer.q_proj: matches no module"),
        ({"lm_head": "colwise_gather_output", "model.embed_tokens": "embedding_colwise"},
         "lm_head.weight and model.embed_tokens.weight are one tensor"),
    ],
)  # fmt: skip
def test_given_rules_that_would_be_wrong(rules, message):
    with pytest.raises(ValueError, match=message):
        plans(HybridForCausalLM(config("LS")), tp_plan=rules, tp_size=2)


@pytest.mark.skipif(NEWER, reason="later transformers take ep_size")
def test_expert_parallelism_wants_a_size(tmp_path):
    write(tmp_path, layout="S", ffn="E")
    wanted = DistributedConfig(enable_expert_parallel=True)
    with pytest.raises(ValueError, match="expected tp_size with enable_expert_parallel"):
        HybridForCausalLM.from_pretrained(tmp_path, distributed_config=wanted)
