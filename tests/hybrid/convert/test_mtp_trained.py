"""Multi-token prediction modules that were trained here, as those of published checkpoints."""

import json
from typing import Any

import pytest
import torch

import hybrid
from hybrid.convert import export

V = 61


def tokens(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(5))


SOFTMAX = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "qk_norm": "head",
           "qk_norm_type": "zero_centered_rmsnorm", "output_gate": True,
           "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}  # fmt: skip
DELTA = {"num_heads": 2, "num_key_heads": 2, "head_dim": 8, "value_head_dim": 8}


def of_ours(**changes):
    """A model that Qwen3.5 can hold, unless changes stand in the way."""
    values: dict[str, Any] = {
        "layout": "DDDS", "vocab_size": V, "hidden_size": 16, "norm": "zero_centered_rmsnorm",
        "mixers": {"D": DELTA, "S": SOFTMAX}, "feed_forwards": {"-": {"intermediate_size": 20}},
        "num_mtp_layers": 1, "init": "fixed",
    }  # fmt: skip
    config = hybrid.HybridConfig(**(values | changes))
    return hybrid.HybridForCausalLM(config).eval()


def assert_same_tensors(found, expected):
    """Layers may be numbered otherwise: the tensors are compared in order."""
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [None, "S", "S-"])
def test_a_module_that_was_trained_here(tmp_path, layout, assert_close_to_rounding):
    """It comes back as it was, whether its layers are named or are those of the stack."""
    torch.manual_seed(0)
    ours = of_ours(mtp_layout=layout)
    export(ours, tmp_path / "out", "qwen3_5_text")
    values = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert values["mtp_num_hidden_layers"] == 1
    again = hybrid.HybridForCausalLM.from_published(tmp_path / "out")
    ids = tokens(1, 12)
    assert_same_tensors(again, ours)
    losses = [model.train()(ids, labels=ids).mtp_loss for model in (again, ours)]
    assert_close_to_rounding(*losses)


@pytest.mark.parametrize("layout", ["DS", "D"])
def test_a_letter_of_the_module_alone(tmp_path, layout, assert_close_to_rounding):
    """Its options are written as those of the stack are, though the stack has no such layer."""
    torch.manual_seed(0)
    ours = of_ours(layout="D", num_hidden_layers=2, mtp_layout="S") if layout == "D" else of_ours()
    export(ours, tmp_path / "out", "qwen3_5_text")
    again = hybrid.HybridForCausalLM.from_published(tmp_path / "out")
    ids = tokens(1, 12)
    assert_same_tensors(again, ours)
    losses = [model.train()(ids, labels=ids).mtp_loss for model in (again, ours)]
    assert_close_to_rounding(*losses)


@pytest.mark.parametrize(
    ("changes", "family", "message"),
    [
        (
            {"mtp_layout": "D"},
            "qwen3_5_text",
            "of the MTP modules: layer 0: D (gated_delta_net) here, qwen3_5_text can only have"
            " softmax_attention",
        ),
        (
            {"mtp_layout": "L", "mixers": {"D": DELTA, "S": SOFTMAX, "L": {"num_heads": 2}}},
            "qwen3_5_text",
            "of the MTP modules: layer 0 (L): expected the mixers of qwen3_5_text",
        ),
        (
            {"mtp_layout": "SE", "feed_forwards": {"-": {"intermediate_size": 20},
                                                   "E": {"num_experts": 4, "top_k": 2}}},
            "qwen3_5_text",
            "of the MTP modules: layer 1: E (mixture_of_experts) here, qwen3_5_text can only have"
            " dense",
        ),
        (
            {"mtp_layout": "Q", "mixers": {"D": DELTA, "S": SOFTMAX,
                                           "Q": {"type": "softmax_attention", **SOFTMAX,
                                                 "output_gate": False}}},
            "qwen3_5_text",
            "of the MTP modules: mixers.Q.output_gate: False here (layer 0), qwen3_5_text can only"
            " say True",
        ),
        (
            {"mtp_layout": "SS"},
            "qwen3_5_text",
            "the MTP modules: 2 layers here, qwen3_5_text can only have 1",
        ),
        (
            {"num_mtp_layers": 2},
            "qwen3_5_text",
            "num_mtp_layers: 2 here, qwen3_5_text can only say 1, for modules of theirs share their"
            " projection and norms",
        ),
        (
            {"layout": "S", "norm": "rmsnorm", "mixers": {"S": {"num_heads": 2}}},
            "llama",
            "num_mtp_layers: 1 here, llama can only say 0",
        ),
    ],
)  # fmt: skip
def test_what_a_family_has_no_place_for_is_named(tmp_path, changes, family, message):
    with pytest.raises(ValueError, match="cannot be written as") as error:
        export(of_ours(**changes), tmp_path / "out", family)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
