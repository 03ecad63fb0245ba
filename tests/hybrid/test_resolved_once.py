"""How often a config is built and its layout parsed, on the paths that need one."""

import inspect
import json

import pytest

from hybrid import HybridConfig
from hybrid.config.fields import StackFields
from hybrid.config.spec import resolve_stack
from hybrid.convert import configs, engine, family_choice
from hybrid.convert.family import FAMILIES
from hybrid.layout import parser
from hybrid.train.__main__ import main


@pytest.fixture
def counted(monkeypatch):
    """Layouts of the configs that are built, and layout strings that are parsed, in order."""
    built, parsed = [], []
    post_init, parse = HybridConfig.__post_init__, parser._Parser.parse

    def counted_post_init(self, **kwargs):
        built.append(self.layout)
        post_init(self, **kwargs)

    def counted_parse(self):
        if self.name == "layout":
            parsed.append(self.text)
        return parse(self)

    monkeypatch.setattr(HybridConfig, "__post_init__", counted_post_init)
    monkeypatch.setattr(parser._Parser, "parse", counted_parse)
    return built, parsed


def train(tmp_path, model, name):
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} " * 9}) for i in range(99))
    )
    config = {
        "model": model,
        "data": {"source": str(tmp_path / "data.jsonl")},
        "sequence_length": 16,
        "device": "cpu",
        "training": {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no"},
    }
    config["training"]["output_dir"] = str(tmp_path / name)
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main([str(tmp_path / "run.yaml")]) == 0


def test_a_training_run_builds_one_config(tmp_path, counted):
    built, parsed = counted
    model = {"layout": "LS", "hidden_size": 16, "mixers": {s: {"num_heads": 2} for s in "LS"}}
    train(tmp_path, model, "new")
    assert built == parsed == ["LS"]
    built.clear(), parsed.clear()
    train(tmp_path, {"path": str(tmp_path / "new"), "z_loss": 1e-4}, "on")
    assert built == parsed == ["LS"]
    assert json.loads((tmp_path / "on" / "config.json").read_text())["z_loss"] == 1e-4


@pytest.mark.parametrize("origin", [None, "qwen3"])
def test_an_export_builds_each_candidate_once(tmp_path, build, counted, monkeypatch, origin):
    built, parsed = counted
    model = build(
        layout="SS",
        mixers={"S": {"num_heads": 2, "qk_norm": "head"}},
        feed_forwards={"-": {"intermediate_size": 24}},
        tie_word_embeddings=False,
        imported_from=origin,
    )
    model.save_pretrained(tmp_path / "ours")
    tried, read = [], []
    to_theirs, to_ours = family_choice.to_theirs, configs.to_ours

    def counted_to_theirs(family, *args):
        tried.append(family.name)
        return to_theirs(family, *args)

    def counted_to_ours(family, *args, **kwargs):
        read.append(family.name)
        return to_ours(family, *args, **kwargs)

    monkeypatch.setattr(family_choice, "to_theirs", counted_to_theirs)
    monkeypatch.setattr(configs, "to_ours", counted_to_ours)
    built.clear(), parsed.clear()
    assert engine.export(tmp_path / "ours", tmp_path / "out") == "qwen3"
    assert sorted(tried) == ([origin] if origin else sorted(FAMILIES))
    assert len(set(read)) == len(read)
    # the folder's own, and one for each family whose keys could be written
    assert len(built) == 1 + len(read)
    assert len(parsed) == len(built)


def test_the_stack_follows_from_no_field_but_those_declared():
    read = set()

    class Recorded:
        def __init__(self, config):
            self._config = config

        def __getattr__(self, name):
            read.add(name)
            return getattr(self._config, name)

    shared = {"Z": {"blocks": 1, "concat_embeddings": True}}
    resolve_stack(
        Recorded(
            HybridConfig(
                layout="L[LS]LZ",
                hidden_size=64,
                canon="ABCD",
                mixers={"Z": {"type": "softmax_attention", "num_heads": 2}},
                shared=shared,
                mup_base_width=32,
                norm_position="post",
            )
        )
    )
    assert read == set(inspect.get_annotations(StackFields))
