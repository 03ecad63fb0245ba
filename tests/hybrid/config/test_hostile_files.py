"""A config.json of strange contents is one clear error that names the key, or is right."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

GOOD = {
    "model_type": "hybrid",
    "layout": "LS",
    "hidden_size": 32,
    "vocab_size": 61,
    "mixers": {"L": {"num_heads": 2}, "S": {"num_heads": 2}},
}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture
def folder(tmp_path):
    def write(text):
        (tmp_path / "config.json").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", ["L", "S"]),
        ("layout", {"L": 3}),
        ("layout", ""),
        ("layout", "L" * 10**6),
        ("layout", "L99999999999999999999"),
        ("hidden_size", -32),
        ("hidden_size", 0),
        ("hidden_size", 10**15),
        ("hidden_size", 32.5),
        ("hidden_size", "32"),
        ("hidden_size", [32]),
        ("hidden_size", True),
        ("vocab_size", -1),
        ("vocab_size", 10**18),
        ("num_hidden_layers", -2),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 3),
        ("norm_eps", float("nan")),
        ("norm_eps", "small"),
        ("embedding_multiplier", float("nan")),
        ("embedding_multiplier", float("inf")),
        ("logits_multiplier", float("nan")),
        ("logit_softcap", float("nan")),
        ("initializer_range", float("nan")),
        ("mixers", [["L", {}]]),
        ("mixers", {"L": 5}),
        ("mixers", {"L": {"num_heads": nested(200)}}),
        ("mixers", {"L": {"num_heads": -2}}),
        ("mixers", {"L": {"num_heads": 10**12}}),
        ("mixers", {"L": {"num_headz": 2}}),
        ("mixers", {"L": {"type": {"a": 1}}}),
        ("mixers", {"L": {"type": "no_such_mixer"}}),
        ("mixers", {"LS": {"num_heads": 2}}),
        ("ffn", {"a": 1}),
        ("feed_forwards", {"-": {"hidden_size": nested(3)}}),
        ("dtype", "int8"),
        ("dtype", "float99"),
        ("hiden_size", 32),
        ("pad_token_id", 10**9),
        ("pad_token_id", -7),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_value_that_nobody_can_mean_is_named(folder, key, value):
    path = folder(json.dumps({**GOOD, key: value}))
    with pytest.raises(ValueError, match=key) as found:
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert len(str(found.value)) < 2000


def test_brackets_of_any_depth_are_read(folder):
    path = folder(json.dumps({**GOOD, "layout": "(" * 2000 + "LS" + ")" * 2000}))
    assert AutoConfig.from_pretrained(path).num_hidden_layers == 2
