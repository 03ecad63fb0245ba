"""Knock-outs: which branches they take, and what is left without them."""

import pytest
import torch

import hybrid
from hybrid_eval import Settings, evaluate, load, write_report
from hybrid_eval.ablate import ablated, branches, select

SMALL = {"hidden_size": 32, "vocab_size": 64, "feed_forwards": {"-": {"intermediate_size": 48}}}


def stack(layout, **config):
    torch.manual_seed(0)
    heads = {symbol: {"num_heads": 2} for symbol in set(layout) & set("LS")}
    mixers = {**heads, **config.pop("mixers", {})}
    return hybrid.HybridForCausalLM(
        hybrid.HybridConfig(layout=layout, mixers=mixers, **SMALL, **config)
    ).eval()


CONV = {"S": {"num_heads": 2, "conv_size": 4}}


@pytest.mark.parametrize(
    ("layout", "config", "attention", "linear"),
    [
        ("LLLS", {}, [3], [0, 1, 2]),
        ("LLLS", {"mixers": CONV}, [3], [0, 1, 2]),
        ("SSSS", {"mixers": CONV}, [0, 1, 2, 3], []),
        ("LS", {"canon": "ABCD"}, [1], [0]),
        ("[LS]L", {}, [0], [0, 1]),
        ("[LS]L", {"mixers": CONV}, [0], [0, 1]),
        ("WL", {"mixers": {"W": {"num_heads": 2, "window": 8}}}, [0], [1]),
        ("ML", {}, [], [0, 1]),
    ],
)
def test_a_branch_is_what_it_does(layout, config, attention, linear):
    model = stack(layout, **config)
    for kind, layers in (("attention", attention), ("linear", linear)):
        if layers:
            assert [branch.layer for branch in select(model, kind)] == layers
        else:
            with pytest.raises(ValueError, match=f"no {kind} branch to knock out in this model"):
                select(model, kind)


def test_every_registered_mixer_says_what_it_does():
    from hybrid.registry import mixers

    for name in mixers.names():
        attends = mixers.get(name).attends
        # each softmax mixer has "softmax" in its formula; one with a state (G_t) has it, too
        assert attends in ("", "local", "full"), name
        assert bool(attends) == (
            "softmax" in mixers.get(name).formula and "G_t" not in mixers.get(name).formula
        ), name


def sees(model, distance):
    """Whether the last logits depend on the token ``distance`` before the end."""
    ids = torch.arange(1, 25)[None] % 60
    other = ids.clone()
    other[0, -1 - distance] = 61
    with torch.no_grad():
        a, b = model(ids).logits[0, -1], model(other).logits[0, -1]
    return not torch.allclose(a, b, atol=1e-6)


def test_only_the_softmax_layer_is_left_when_linear_layers_are_gone():
    model = stack("LLLS", mixers=CONV)
    assert sees(model, 20)
    with ablated(model, "linear"):
        assert sees(model, 20)
        with ablated(model, "attention"):
            assert not sees(model, 20)
            assert not sees(model, 1)


def test_one_depth_of_shared_weights_is_knocked_out_alone():
    model = stack("SLS", shared={"S": {"blocks": 1}})
    assert model.model.layers[0].mixer.q_proj.weight is model.model.layers[2].mixer.q_proj.weight
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(ids).logits
        with ablated(model, "0"):
            first = model(ids).logits
        with ablated(model, "attention"):
            both = model(ids).logits
    assert not torch.allclose(first, both)
    assert not torch.allclose(first, whole)


class OneModule(torch.nn.Module):
    """A model whose two layers are the same object."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Identity()
        self.layers = torch.nn.ModuleList([layer, layer])
        self.config = type("Config", (), {"num_hidden_layers": 2})()


def test_one_of_two_uses_of_a_module_is_refused():
    with pytest.raises(ValueError, match="layer 0 and layer 1 are one and the same Identity"):
        select(OneModule(), "0")
    assert len(select(OneModule(), "0,1")) == 2


def foreign(config_class, **options):
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(config_class(**sizes, **options))


def test_mixers_of_published_hybrids_are_told_apart():
    from transformers import Lfm2Config, MiniMaxConfig, NemotronHConfig

    lfm = foreign(
        Lfm2Config,
        num_hidden_layers=2,
        num_key_value_heads=1,
        intermediate_size=32,
        layer_types=["conv", "full_attention"],
    )
    assert [(b.layer, b.kind) for b in branches(lfm)] == [(0, "linear"), (1, "attention")]
    # both are called self_attn
    minimax = foreign(
        MiniMaxConfig,
        num_hidden_layers=2,
        num_key_value_heads=1,
        intermediate_size=32,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
    )
    assert [(b.layer, b.kind) for b in branches(minimax)] == [(0, "linear"), (1, "attention")]
    # all three are called mixer, and a feed-forward mixes no tokens
    nemotron = foreign(
        NemotronHConfig,
        num_key_value_heads=1,
        intermediate_size=32,
        head_dim=16,
        hybrid_override_pattern="M-*",
        num_hidden_layers=3,
        mamba_num_heads=2,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
    )
    assert [(b.layer, b.kind) for b in branches(nemotron)] == [(0, "linear"), (2, "attention")]


def test_the_report_names_the_layers_that_are_gone(tmp_path):
    subject = load(stack("LS", mixers=CONV), name="mine", tokenizer="bytes")
    results = evaluate(
        subject,
        ["mqar"],
        settings=Settings(limit=2),
        options={
            "mqar": {"pairs": 4, "key_ids": [20, 30], "value_ids": [30, 40], "filler_ids": [0, 20]}
        },
        ablate=["linear"],
    )
    whole, without = results["models"]
    assert whole["without"] == []
    assert [(b["layer"], b["kind"]) for b in without["without"]] == [(0, "linear")]
    html = write_report(results, tmp_path).read_text()
    assert "mine without linear: the output of these layers&#39; mixers is zero: 0 (" in html


def test_knocking_out_every_mixer_leaves_a_model_without_context(tiny_llama):
    ids = torch.randint(0, 256, (1, 12))
    other = torch.cat([torch.randint(0, 256, (1, 11)), ids[:, -1:]], dim=1)
    with torch.no_grad():
        before = tiny_llama(ids).logits
        with ablated(tiny_llama, "attention") as gone:
            assert [branch.layer for branch in gone] == [0, 1]
            a, b = tiny_llama(ids).logits[:, -1], tiny_llama(other).logits[:, -1]
        with ablated(tiny_llama, "1"):
            assert not torch.equal(tiny_llama(ids).logits, before)
        after = tiny_llama(ids).logits
    torch.testing.assert_close(a, b)
    assert torch.equal(before, after)


def test_a_hybrid_has_branches_of_both_kinds():
    from transformers import AutoModelForCausalLM, FalconH1Config

    config = FalconH1Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    kinds = [(branch.layer, branch.kind) for branch in branches(model)]
    assert sorted(kinds) == [(i, kind) for i in (0, 1) for kind in ("attention", "linear")]
    assert len(select(model, "0")) == 2


def test_a_knock_out_that_names_nothing_is_refused(tiny_llama):
    for what, words in (
        ("linear", "no linear branch"),
        ("7", "no token mixer in layer 7; layers are 0 to 1"),
        ("softmax", "attention, linear or layers"),
    ):
        with pytest.raises(ValueError, match=words):
            select(tiny_llama, what)


def test_knock_outs_are_measured_beside_the_model(tiny_llama, tmp_path):
    results = evaluate(
        load(tiny_llama, name="tiny", tokenizer="bytes"),
        ("mqar", "heldout"),
        settings=Settings(limit=2),
        ablate=("attention", "0"),
        out=tmp_path,
    )
    names = [model["name"] for model in results["models"]]
    assert names == ["tiny", "tiny without attention", "tiny without 0"]
    losses = {model["results"]["heldout"]["loss"] for model in results["models"]}
    assert len(losses) == 3
