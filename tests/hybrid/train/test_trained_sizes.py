"""Evaluation at the sizes that a checkpoint was trained on."""

import json

import pytest
import torch
import yaml

import hybrid
from hybrid.cli import main
from hybrid.train import parse_config
from hybrid.train.trained_sizes import trained_sizes
from hybrid.train.trainer import CONFIG_NAME


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as a run on associative recall leaves it."""

    def make(name, *mqar):
        values = {
            "model": {"layout": "S", "hidden_size": 16},
            "sequence_length": 24,
            "data": [{"source": "stdlib"}, *({"source": "mqar", **options} for options in mqar)],
        }
        torch.manual_seed(0)
        config = hybrid.HybridConfig(**values["model"], vocab_size=259)
        hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / name)
        (tmp_path / name / CONFIG_NAME).write_text(yaml.safe_dump(parse_config(values).as_dict()))
        return str(tmp_path / name)

    return make


def test_sizes_are_those_of_the_run(checkpoint, tmp_path):
    four, plain = checkpoint("a", {"pairs": 4, "min_pairs": 2}), checkpoint("b", {})
    assert trained_sizes([four]) == {"mqar": {"sequence_length": 24, "pairs": 4}}
    assert trained_sizes([plain]) == {"mqar": {"sequence_length": 24}}
    assert trained_sizes([four, str(tmp_path / "gone")]) == trained_sizes([four])
    assert trained_sizes([four, plain]) == {}
    (tmp_path / "a" / CONFIG_NAME).write_text("[1")
    assert trained_sizes([four]) == {}


def test_an_evaluation_takes_them_unless_told_otherwise(checkpoint, tmp_path):
    folder = checkpoint("a", {"pairs": 4})
    for words, pairs in (([], 4), (["--set", "mqar.pairs=2"], 2)):
        out = tmp_path / f"out{pairs}"
        command = ["eval", folder, "--tasks", "mqar", "--limit", "2", "--out", str(out), *words]
        assert main(command) == 0
        (record,) = json.loads((out / "results.json").read_text())["models"]
        assert record["results"]["mqar"]["pairs"] == pairs
        assert record["results"]["mqar"]["tokens"] == {"min": 24, "max": 24}
