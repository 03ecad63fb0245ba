"""Configs: every mistake is named, and a right one survives whatever transformers does with configs."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, DynamicCache, GenerationConfig, StaticCache

import hybrid
from hybrid import ConfigError, HybridConfig
from hybrid.layout import LayoutError

RICH = {
    "layout": "LLQ[LS]",
    "vocab_size": 1000,
    "hidden_size": 64,
    "ffn": "-",
    "mixers": {
        "L": {"num_heads": 2, "conv_size": 4},
        "S": {"num_heads": 4, "num_kv_heads": 2},
        "Q": {"type": "softmax_attention", "num_heads": 2, "rope_parameters": None},
    },
    "feed_forwards": {"-": {"activation": "geglu", "intermediate_size": 96}},
    "norm_position": "sandwich",
    "tie_word_embeddings": False,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}


def mistakes(**config):
    with pytest.raises(ConfigError) as caught:
        HybridConfig(**config)
    assert isinstance(caught.value, ValueError)
    for line in caught.value.mistakes:
        assert line.splitlines()[0] in str(caught.value)
    return caught.value.mistakes


# One mistake at a time: the arguments, and what the line must say.
ONE = {
    "unknown key": ({"hiden_size": 3}, "hiden_size: unknown key, did you mean 'hidden_size'?"),
    "a mixer's key": ({"head_dims": 3}, "did you mean mixers: {S: {head_dim: ...}}?"),
    "a key of llama's": ({"num_attention_heads": 3}, "mean mixers: {S: {num_heads: ...}}?"),
    "llama's theta": ({"rope_theta": 3}, "did you mean mixers: {S: {rope_parameters: ...}}?"),
    "a feed-forward's key": (
        {"intermediate_size": 3},
        "did you mean feed_forwards: {-: {intermediate_size: ...}}?",
    ),
    "nothing near": ({"xyzzy": 3}, "xyzzy: unknown key, known: bos_token_id, "),
    "str for int": ({"hidden_size": "256"}, "hidden_size: expected int, got str '256'"),
    "float for int": ({"vocab_size": 3.5}, "vocab_size: expected int, got float 3.5"),
    "bool for int": ({"vocab_size": True}, "vocab_size: expected int, got bool True"),
    "null layout": ({"layout": None}, "layout: expected str, got null"),
    "str for bool": ({"use_cache": "yes"}, "use_cache: expected bool, got str 'yes'"),
    "choice": ({"norm": "rms"}, "got 'rms'; try 'rmsnorm'"),
    "choice of init": ({"init": "xaver"}, "got 'xaver'; try 'xavier'"),
    "dtype": (
        {"dtype": "float33"},
        "dtype: expected a floating-point dtype, got 'float33', did you mean 'float32'?",
    ),
    "model type": ({"model_type": "llama"}, "model_type: expected 'hybrid', got 'llama'"),
    "size 0": ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
    "negative size": ({"hidden_size": -4}, "hidden_size: expected at least 1, got -4"),
    "depth 0": ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
    "eps": ({"norm_eps": 0.0}, "norm_eps: expected above 0, got 0.0"),
    "nan": ({"norm_eps": float("nan")}, "norm_eps: expected finite number, got nan"),
    "std": ({"initializer_range": -1}, "initializer_range: expected above 0, got -1"),
    "pad id": ({"pad_token_id": 100}, "pad_token_id: expected an id below vocab_size 100, got 100"),
    "negative id": ({"bos_token_id": -1}, "bos_token_id: expected at least 0, got -1"),
    "one id of many": ({"eos_token_id": [1, 200]}, "id: expected an id below vocab_size 100, got 200"),
    "id of the wrong type": ({"eos_token_id": ["a"]}, "eos_token_id[0]: expected int, got str 'a'"),
    "empty layout": ({"layout": ""}, "an empty layout"),
    "unbound symbol": ({"layout": "LQS"}, "unknown symbol 'Q'"),
    "depth that does not fit": ({"num_hidden_layers": 3}, "2 layers do not fill"),
    "two answers for ffn": ({"layout": "L-S", "ffn": "--"}, "names its own feed-forwards"),
    "no feed-forward": ({"ffn": "x"}, "'x' is no feed-forward"),
    "no mixer": ({"layout": "--"}, "layout: expected at least one mixer, got '--'"),
    "two caches in one layer": ({"layout": "[SS]"}, "layout: expected at most one softmax mixer in a"),
    "mixers no mapping": ({"mixers": [1]}, "mixers: expected mapping, got list [1]"),
    "a mixer no mapping": ({"mixers": {"S": 3}}, "mixers.S: expected mapping, got int 3"),
    "a mixer null": ({"mixers": {"S": None}}, "mixers.S: expected mapping, got null"),
    "symbol no letter": ({"mixers": {3: {}}}, "mixers.3: "),
    "symbol too long": ({"mixers": {"SS": {}}}, "mixers.SS: symbol: a symbol is one character"),
    "symbol taken": ({"mixers": {"-": {}}}, "'-' is the dense feed-forward"),
    "no type": (
        {"mixers": {"Q": {}}},
        "mixers.Q.type: expected the name of a mixer or feed-forward, since 'Q' has no default, got",
    ),
    "wrong type": ({"mixers": {"S": {"type": 3}}}, "mixers.S.type: expected str, got int 3"),
    "unknown type": (
        {"mixers": {"Q": {"type": "softmax_atention"}}},
        "mixers.Q: unknown mixer 'softmax_atention', did you mean 'softmax_attention'?",
    ),
    "unknown option": (
        {"mixers": {"S": {"num_hads": 4}}},
        "mixers.S.num_hads: unknown key, did you mean 'num_heads'?",
    ),
    "option's type": (
        {"mixers": {"S": {"num_heads": "4"}}},
        "mixers.S.num_heads: expected int, got str '4'",
    ),
    "option's choice": (
        {"mixers": {"L": {"feature_map": "silly"}}},
        "got 'silly'; try 'silu'",
    ),
    "heads and width": (
        {"mixers": {"S": {"num_heads": 7}}},
        "mixers.S.num_heads: expected a divisor of hidden_size 32, got 7; try 4 or 8",
    ),
    "key-value heads": (
        {"mixers": {"S": {"num_heads": 4, "num_kv_heads": 3}}},
        "mixers.S.num_kv_heads: expected a divisor of num_heads 4, got 3; try 2 or 4",
    ),
    "dropout": ({"mixers": {"S": {"dropout": 1.5}}}, "mixers.S.dropout: expected below 1, got 1.5"),
    "convolution": ({"mixers": {"L": {"conv_size": 1}}}, "L.conv_size: expected at least 2, got 1"),
    "feed-forward symbol": (
        {"feed_forwards": {"Z": {}}},
        "feed_forwards.Z: expected a feed-forward symbol (-, E), got 'Z'",
    ),
    "feed-forward width": (
        {"feed_forwards": {"-": {"intermediate_size": -3}}},
        "feed_forwards.-.intermediate_size: expected at least 1, got -3",
    ),
    "feed-forward option": (
        {"feed_forwards": {"-": {"activation": "swigul"}}},
        "got 'swigul'; try 'swiglu'",
    ),
}  # fmt: skip

ROPE = {
    "type": ({"rope_type": "yarm"}, "rope_type: unknown 'yarm', did you mean 'yarn'?"),
    "key": ({"rope_teta": 1e4}, "rope_teta: unknown key for rope_type 'default'"),
    "missing": (
        {"rope_type": "linear"},
        "factor: expected a value, as rope_type 'linear' requires it",
    ),
    "not a number": ({"rope_type": "linear", "factor": "2"}, "factor: expected a positive number"),
    "theta": ({"rope_theta": -1}, "rope_theta: expected a positive number, got -1"),
    "share": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected a number in (0, 1]"),
    "odd": ({"partial_rotary_factor": 0.1}, "rotated dims, at least 2, got 3 of head_dim 32"),
    "length": (
        {"rope_type": "yarn", "factor": 2.0},
        "expected max_position_embeddings to be set for 'yarn'",
    ),
    "list": (
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 16},
        "short_factor: expected a list of 16 numbers, got [1.0]",
    ),
}


@pytest.mark.parametrize("case", ONE)
def test_one_mistake_is_one_line(case):
    arguments, expected = ONE[case]
    base = {"layout": "LS", "hidden_size": 32, "vocab_size": 100}
    (line,) = mistakes(**{**base, **arguments})
    assert expected in line


@pytest.mark.parametrize("case", ROPE)
def test_mistakes_in_rope(case):
    rope, expected = ROPE[case]
    arguments = {} if case == "length" else {"max_position_embeddings": 64}
    mixers = {"S": {"num_heads": 1, "rope_parameters": rope}}
    (line,) = mistakes(layout="LS", hidden_size=32, mixers=mixers, **arguments)
    assert line.startswith("mixers.S.rope_parameters")
    assert expected in line


def test_many_kinds_of_mistakes_at_once_are_all_named():
    """None hides another, not even where one makes a value unusable that others depend on."""
    lines = mistakes(
        layout="LL(S",
        hidden_size="256",
        vocab_sise=3,
        norm="rms",
        init="xaver",
        norm_eps=-1,
        pad_token_id=99999,
        num_heads=4,
        dtype="float33",
        mixers={
            "S": {"num_kv_heads": 0, "rope_parameters": {"rope_type": "yarm"}},
            "L": {"conv_size": 1, "feature_map": "silly"},
            "W": {"type": "softmax_atention"},
            "SS": {},
        },
        feed_forwards={"-": {"intermediate_size": -3, "activation": "swigul"}, "Z": {}},
    )
    named = [
        "layout", "hidden_size", "vocab_sise", "norm", "init", "norm_eps", "pad_token_id",
        "num_heads", "dtype", "mixers.S.num_kv_heads", "mixers.L.conv_size",
        "mixers.L.feature_map", "mixers.W", "mixers.SS", "feed_forwards.-.intermediate_size",
        "feed_forwards.-.activation", "feed_forwards.Z", "mixers.S.rope_parameters.rope_type",
    ]  # fmt: skip
    for name in named:
        assert any(line.startswith((f"{name}:", f"{name},")) for line in lines), name
    assert len(lines) == len(named)


def test_a_caret_stands_under_the_mistake():
    (line,) = mistakes(layout="LL(S")
    head, text, caret, expected = line.splitlines()
    assert "column 5" in head
    assert text.index("LL(S") + 4 == caret.index("^")
    assert "')'" in expected
    assert issubclass(LayoutError, ValueError)


def test_mistakes_in_config_json_are_named_too(tmp_path):
    HybridConfig(**RICH).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm": "rms", "nrom": 1}))
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert len(caught.value.mistakes) == 2


# What a right config survives.


@pytest.mark.parametrize("arguments", [{}, RICH, {"layout": "L-S-", "hidden_size": 64}])
def test_round_trips(arguments, tmp_path):
    config = HybridConfig(**arguments)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layout"] == config.layout
    twins = {
        "from_pretrained": HybridConfig.from_pretrained(tmp_path),
        "auto": AutoConfig.from_pretrained(tmp_path),
        "from_dict": HybridConfig.from_dict(config.to_dict()),
        "arguments": HybridConfig(**config.to_dict()),
        "json": HybridConfig(**json.loads(config.to_json_string(use_diff=False))),
        "diff": HybridConfig(**config.to_diff_dict()),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
        "for_model": AutoConfig.for_model("hybrid", **arguments),
    }
    for name, twin in twins.items():
        assert type(twin) is HybridConfig, name
        assert twin.layers == config.layers, name
        assert twin.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_a_deep_copy_is_a_copy():
    config = HybridConfig(**RICH)
    twin = copy.deepcopy(config)
    twin.mixers["S"]["num_heads"] = 8
    assert config.mixers["S"]["num_heads"] == 4


def test_diff_holds_what_differs():
    diff = HybridConfig(hidden_size=64, layout="LS").to_diff_dict()
    assert diff["hidden_size"] == 64
    assert diff["layout"] == "LS"
    assert diff["norm"] == "rmsnorm"  # our own are written out, defaults or not
    assert not {"chunk_size_feed_forward", "id2label", "return_dict"} & set(diff)


def test_copying_with_overrides(tmp_path):
    config = HybridConfig(**RICH)
    wider = HybridConfig(**{**config.to_dict(), "hidden_size": 128, "num_hidden_layers": 8})
    assert (wider.hidden_size, len(wider.layers)) == (128, 8)
    assert wider.mixers == config.mixers
    config.save_pretrained(tmp_path)
    loaded, rest = AutoConfig.from_pretrained(
        tmp_path, hidden_size=128, no_such_key=1, return_unused_kwargs=True
    )
    assert loaded.hidden_size == 128
    assert rest == {"no_such_key": 1}


def test_attributes_that_tools_attach_do_not_make_a_checkpoint_unloadable(tmp_path):
    config = HybridConfig(**RICH)
    config.some_tools_flag = True
    config.save_pretrained(tmp_path)
    assert "some_tools_flag" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).layout == config.layout


def test_keys_of_every_transformers_config_are_taken():
    config = HybridConfig(
        num_labels=3, problem_type="regression", architectures=["X"], output_hidden_states=True,
        return_dict=False, dtype="float16", torch_dtype="float16", chunk_size_feed_forward=5,
        attn_implementation="eager", name_or_path="somewhere", max_length=3,
    )  # fmt: skip
    assert config.num_labels == len(config.id2label) == 3
    assert config.dtype == torch.float16
    assert config._attn_implementation == "eager"
    assert config.output_hidden_states


def test_generation_config_takes_the_ids_and_no_sizes():
    config = HybridConfig(**RICH)
    generation = GenerationConfig.from_model_config(config)
    assert (generation.eos_token_id, generation.pad_token_id) == ([2, 3], 0)
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config


def test_names_that_tools_look_for():
    config = HybridConfig(**RICH)
    assert config.num_hidden_layers == 4
    # of the first softmax mixer, Q, and not of the first mixer, L
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 32)
    linear = HybridConfig(layout="LL", hidden_size=64, mixers={"L": {"num_heads": 4}})
    assert (linear.num_attention_heads, linear.num_key_value_heads, linear.head_dim) == (4, 4, 16)


def test_depth_follows_the_layout():
    config = HybridConfig(layout="LLLS", num_hidden_layers=8)
    assert len(config.layers) == config.num_hidden_layers == len(config.layer_types) == 8
    assert HybridConfig(layout="(LS)3").num_hidden_layers == 6
    literal = HybridConfig(layout="L-S-").layer_types
    assert literal == ["hybrid_states", "hybrid_none", "full_attention", "hybrid_none"]


@pytest.mark.parametrize(
    ("layout", "types"),
    [
        ("LLS", ["hybrid_states", "hybrid_states", "full_attention"]),
        ("[LS]", ["hybrid_keys"]),
        ("SD", ["full_attention", "hybrid_keys"]),
        ("LL", ["hybrid_states", "hybrid_states"]),
    ],
)
def test_layer_types_make_caches_that_count(layout, types):
    """Both stock caches are built from them, and say that they hold no token yet."""
    mixers = {"D": {"type": "softmax_attention", "conv_size": 4}}
    config = HybridConfig(layout=layout, hidden_size=64, mixers=mixers)
    assert config.layer_types == types
    assert config.sliding_window is None
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        assert len(cache.layers) == len(types)
        assert cache.get_seq_length() == 0


def test_mixers_side_by_side_are_one_branch():
    config = HybridConfig(layout="L[LLN]S", hidden_size=64)
    assert config.stack.sizes.num_residual_branches == 6


def test_a_users_mixer_is_found_by_name_in_a_config():
    from hybrid.config.registry import mixers
    from hybrid.mixers import LinearMixer, MixerOptions

    @hybrid.register_mixer("test_config_mixer")
    class Mine(LinearMixer):
        Options = MixerOptions

    try:
        config = HybridConfig(layout="Q", mixers={"Q": {"type": "test_config_mixer"}})
        assert config.stack.mixers["Q"].cls is Mine
        assert config.layer_types == ["hybrid_states"]
    finally:
        del mixers._by_name["test_config_mixer"]


def test_examples_of_the_page_on_stacks_are_configs():
    page = (Path(__file__).parents[3] / "docs" / "stack.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert len(blocks) == 3
    for block in blocks:
        values = {"layout": "LS", "hidden_size": 2560, **block}
        values["layout"] += " M"  # the page stops short of the layer that Z feeds
        HybridConfig(**values)


@pytest.mark.parametrize(
    "given", [{}, {"num_hidden_layers": 8}, {"ffn": {"S": "-", "default": ""}}]
)
def test_a_config_is_parsed_laid_out_and_resolved_once(given, monkeypatch):
    from hybrid.config import hybrid_config, validation
    from hybrid.layout import stack

    calls = []

    def counted(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(validation, "parse")
    counted(stack, "parse")
    counted(stack, "_fill")
    counted(hybrid_config, "resolve_stack")
    config = HybridConfig(layout="LLLS", hidden_size=64, **given)
    assert len(config.stack) == config.num_hidden_layers
    assert config.layer_types
    assert sorted(calls) == ["_fill", "parse", "resolve_stack"]
    config.hidden_size = 128
    assert config.stack.sizes.hidden_size == 128
