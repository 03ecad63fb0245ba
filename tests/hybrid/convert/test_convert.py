"""Models of ours as published ones: which family fits, and what stands in the way."""

import json
import logging
import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import hybrid
from hybrid.convert import FAMILIES, export, fitting, get_family, import_published


def test_unknown_family():
    with pytest.raises(ValueError, match="no map for the family 'quen3', did you mean 'qwen3'"):
        get_family("quen3")
    with pytest.raises(ValueError, match="for the family 'BambaForCausalLM', did you mean 'bamba'"):
        get_family("BambaForCausalLM")
    with pytest.raises(ValueError, match="'minimax_text_1', did you mean 'minimax_text_01'"):
        get_family("minimax_text_1")


def test_other_names_of_a_family_are_no_family_of_their_own():
    names = [name for f in FAMILIES.values() for name in (*f.aliases, *f.wrapped_in)]
    others = set(names) - set(FAMILIES)
    assert {"kimi_k2", "minimax_text_01", "minimax_m1", "qwen3_5", "gemma3"} <= others
    assert len(names) == len(set(names))
    for family in FAMILIES.values():
        for name in (family.name, *family.aliases, *family.wrapped_in):
            assert get_family(name) is family


def test_an_export_by_another_name_is_written_as_their_class_has_it(tmp_path):
    latent = {"num_heads": 4, "latent_dim": 10, "head_dim": 6, "rope_dim": 4, "value_head_dim": 5}
    ours = build("AA", ffn="-", mixers={"A": {**latent, "latent_norm_eps": 1e-6}})
    assert export(ours, tmp_path / "out", "kimi_k2") == "deepseek_v3"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"


def build(layout, **options):
    """A small model, its softmax and its dense feed-forward as Llama has them unless told."""
    mixers = {"S": {"num_heads": 4, "num_kv_heads": 2}, **options.pop("mixers", {})}
    config = hybrid.HybridConfig(
        **{"layout": layout, "hidden_size": 24, "vocab_size": 61, "mixers": mixers, **options}
    )
    torch.manual_seed(0)
    return hybrid.HybridForCausalLM(config).eval()


def logits_of(folder, architecture, ids):
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()(ids).logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        # letters of one's own, bound to the family's mixers
        ("smollm3", "QQX", {"mixers": {
            "Q": {"type": "softmax_attention", "num_heads": 2},
            "X": {"type": "softmax_attention", "num_heads": 2, "rope_parameters": None}}}),
        # no positions in every so many, by an option or by a letter: both are SmolLM3
        ("smollm3", "S6", {"mixers": {"S": {"num_heads": 4, "nope_every": 3}}}),
        # feed-forwards as layers of their own
        ("bamba", "M-S-M-", {"mixers": {
            "M": {"head_dim": 8, "num_heads": 6, "state_size": 5},
            "S": {"num_heads": 2, "rope_parameters": {
                "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}}}),
        ("llama", "SS", {"tie_word_embeddings": False}),
        ("granitemoehybrid", "MS", {
            "mixers": {"M": {"head_dim": 8, "num_heads": 6, "state_size": 5}},
            "residuals": {"default": {"output_multiplier": 0.5}}, "logits_multiplier": 0.25}),
    ],
)  # fmt: skip
def test_a_model_of_ours_becomes_a_published_one(family, layout, options, tmp_path):
    ours = build(layout, **options)
    assert export(ours, tmp_path / "out", family) == family
    ids = torch.randint(3, 61, (2, 9))
    expected = logits_of(tmp_path / "out", get_family(family).architecture, ids)
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("SL", {}, r"layer 1 \(L\): expected the mixers of llama, softmax_attention, got light"),
        ("SLLSL", {}, r"^layers 1-2, 4 \(L\): expected the mixers of llama"),
        ("SS", {"mixers": {"S": {"num_heads": 4, "qk_norm": "head"}}},
         r"mixers.S.qk_norm: 'head' here \(layers 0-1\), llama can only say None"),
        ("S-SE", {}, r"layer 3: E \(mixture_of_experts\) here, llama can only have dense"),
        ("SQS", {"mixers": {"Q": {"type": "softmax_attention", "num_heads": 4, "num_kv_heads": 1}}},
         r"mixers.Q.num_kv_heads: 1 here \(layer 1\), llama can only say 2"),
        ("SS", {"norm": "layernorm"}, r"norm: 'layernorm' here, llama can only say 'rmsnorm'"),
        ("SS", {"norm_position": {"S": "sandwich", "-": "pre"}},
         r"norm_position.S: 'sandwich' here \(layers 0-1\), llama can only say 'pre'"),
        ("SS", {"feed_forwards": {"-": {"activation": "relu2"}}},
         r"feed_forwards.-.activation: expected one of 'swiglu'"),
        ("SS", {"mixers": {"S": {"rope_parameters": {
            "rope_type": "default", "partial_rotary_factor": 0.5}}}},
         r"mixers.S.rope_parameters: .*0.5.* llama can only say"),
        ("SS", {"ffn": ""}, r"layers 0-1: no feed-forward here, llama can only have dense"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named(layout, options, message, tmp_path):
    with pytest.raises(ValueError, match="this model cannot be written as llama") as caught:
        export(build(layout, **options), tmp_path / "out", "llama")
    (obstacle,) = caught.value.obstacles
    assert re.search(message, obstacle)
    assert not (tmp_path / "out").exists()


def test_without_a_name_the_one_family_that_fits_is_taken(tmp_path):
    mamba2 = {"head_dim": 8, "num_heads": 6, "state_size": 5}
    ours = build("MMS", mixers={"M": mamba2}, logits_multiplier=0.5)
    fit, refused = fitting(ours)
    assert fit == ["granitemoehybrid"]
    assert set(fit) | set(refused) == set(FAMILIES)
    assert ours.export_published(tmp_path / "out") == "granitemoehybrid"


@pytest.mark.parametrize(
    ("layout", "options", "family"),
    [
        ("S3", {}, "llama"),
        ("S3", {"mixers": {"S": {"num_heads": 4, "qk_norm": "head"}}}, "qwen3"),
        ("M3", {"ffn": "", "mixers": {"M": {"head_dim": 8, "num_heads": 6, "state_size": 5}}}, "mamba2"),
    ],
)  # fmt: skip
def test_without_a_name_the_family_with_nothing_else_is_taken(layout, options, family, tmp_path):
    ours = build(layout, **options)
    assert len(fitting(ours)[0]) > 1
    assert export(ours, tmp_path / "out") == family


@pytest.mark.parametrize("layout", ["[MS]2", "[WM]S", "[LS]", "-S-", "M-[MS]E", "S--S", "SW-E"])
def test_families_refuse_what_they_have_no_words_for(layout):
    """None of them stumbles over a stack that is like none of its own."""
    options = {"M": {"head_dim": 8, "num_heads": 6, "state_size": 5},
               "W": {"num_heads": 4, "window": 5}, "L": {"num_heads": 4}}  # fmt: skip
    used = {letter: values for letter, values in options.items() if letter in layout}
    fit, refused = fitting(build(layout, mixers=used))
    assert set(fit) | set(refused) == set(FAMILIES)
    assert all(error.obstacles for error in refused.values())


def test_without_a_name_families_that_fit_are_named(tmp_path):
    ours = build("WW", mixers={"W": {"num_heads": 4, "window": 5}})
    fit, _ = fitting(ours)
    assert len(fit) > 1
    with pytest.raises(ValueError, match=f"fits the published architectures {', '.join(fit)}; cho"):
        export(ours, tmp_path / "out")


QWEN3_NEXT = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 5, "linear_value_head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "config", "values"),
    [
        ("qwen3_next", "Qwen3NextConfig", QWEN3_NEXT),  # all experts, as those of Qwen3.5
        # without its window as Llama's
        ("mistral", "MistralConfig", {"num_hidden_layers": 2, "sliding_window": None}),
        ("qwen2", "Qwen2Config", {"num_hidden_layers": 2}),
    ],
)
def test_without_a_name_an_imported_model_goes_back_to_its_family(family, config, values, tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 28,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **values))
    theirs.save_pretrained(tmp_path / "theirs")
    import_published(tmp_path / "theirs", tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "back") == family
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["model_type"], back["architectures"]) == (family, [type(theirs).__name__])
    assert "imported_from" not in back
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert len(fitting(ours)[0]) > 1
    assert export(ours, tmp_path / "again") == family  # also what was saved and loaded in between


def test_an_imported_model_that_its_family_no_longer_fits_goes_to_the_one_that_does(
    tmp_path, caplog
):
    ours = build("S3", imported_from="olmo2")
    with caplog.at_level(logging.WARNING):
        assert export(ours, tmp_path / "out") == "llama"
    (said,) = (r.getMessage() for r in caplog.records if r.name.startswith("hybrid.convert"))
    assert re.match("written as llama, no longer as olmo2: .* here .*, olmo2 can only say ", said)
    assert export(build("S3", imported_from="of_the_future"), tmp_path / "new") == "llama"


def test_without_a_name_and_a_family(tmp_path):
    with pytest.raises(ValueError, match="this model fits no published architecture") as caught:
        export(build("SFS"), tmp_path / "out")
    assert len(caught.value.obstacles) == 3


def test_the_nearest_families_have_the_mixers(tmp_path):
    options = {"S": {"num_heads": 2, "head_dim": 16}}
    with pytest.raises(ValueError, match="this model fits no published architecture") as caught:
        export(build("DDS", norm="layernorm", mixers=options), tmp_path / "out")
    nearest = [line.split(":")[0] for line in caught.value.obstacles]
    assert all("gated_delta_net" in get_family(name).letters.values() for name in nearest)
    shown = "\n".join(caught.value.obstacles)
    assert re.search(r"norm: 'layernorm' here, .* \(and \d+ more\)$", shown, re.MULTILINE)
