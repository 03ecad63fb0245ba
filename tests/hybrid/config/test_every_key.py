"""Every key of every configuration, at strange values: accepted with meaning, or refused by its name.

The keys are those that the classes declare, so a key is covered as soon as there is one.
"""

import copy
import dataclasses
import math
import re

import pytest
import torch

from hybrid import ConfigError, HybridConfig, HybridForCausalLM
from hybrid.ablate.config import Ablation, Match, parse_ablation
from hybrid.config.registry import feed_forwards, mixers
from hybrid.config.yaml import with_key
from hybrid.data.sources import SourceConfig, plugins
from hybrid.distill.config import DistillFile, LanguageStage, LogitsStage, OutputsStage
from hybrid.distill.config import TeacherConfig as Teacher
from hybrid.distill.config import parse_config as parse_distill
from hybrid.train import parse_config as parse_train
from hybrid.train.build import training_arguments
from hybrid.train.config import MuonConfig, ProbeConfig, TrainConfig
from hybrid.train.limits import training_hints
from hybrid.train.schedule import MultiStepConfig

STRANGE = [
    *(None, "", [], {}, True, -1, 0, 0.5, math.nan, math.inf, 1e30, 10**400, "abc", "1e-3"),
    *([None], [-1], [[]], {"a": {"b": 1}}, {"": 0}),
]

MODEL = {"layout": "LS", "hidden_size": 16, "mixers": {"L": {"num_heads": 2}}}
TRAIN = {"model": MODEL, "data": "stdlib", "sequence_length": 8}
DISTILL = {
    "teacher": {"package": "hybrid"},
    "layout": "LS",
    "data": "stdlib",
    "eval_data": {"source": "stdlib", "split": "heldout"},
    "sequence_length": 8,
    "outputs": {},
    "logits": {},
    "language": {},
}
ABLATE = {
    "name": "x",
    "baseline": TRAIN,
    "changes": {"y": {"model.layout": "SS"}},
    "match": {"cost": "parameters"},
}


# what is merged into another key is named there
KNOWN_AS = {"overrides": ["baseline"]}


def keys(cls, prefix=""):
    """The keys that a class declares, below a path."""
    names = cls.model_fields if hasattr(cls, "model_fields") else [f.name for f in cls]
    return [f"{prefix}{name}" for name in names]


@pytest.fixture(scope="module")
def installed():
    return plugins()


@pytest.fixture(autouse=True)
def _look_for_plug_ins_once(installed, monkeypatch):
    monkeypatch.setattr("hybrid.data.sources.plugins", lambda: installed)


def sweep(parse, base, key, use=lambda config: None):
    """Set a key to each strange value; collect what is neither used nor refused well."""
    problems = []
    for value in STRANGE:
        values = with_key(copy.deepcopy(base), key, value)
        try:
            use(parse(values))
        except ConfigError as error:
            problems += [f"{value!r:.40}: {line}" for line in error.mistakes if not good(line, key)]
        except Exception as error:
            problems.append(f"{value!r:.40}: {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)


def good(line, key):
    """Whether a line begins with a path, names the key or its parents, and is short."""
    parts = [p for p in re.split(r"[.\[\]]", key) if p and not p.isdigit()]
    return (
        re.match(r"[^:\n]{1,150}: \S", line) is not None
        and any(part in line for part in [*parts, *KNOWN_AS.get(key, ())])
        and len(line.splitlines()[0]) < 600
        and "Traceback" not in line
        and "pydantic" not in line
    )


TRAIN_KEYS = [
    *keys(TrainConfig),
    *keys(SourceConfig, "data[0]."),
    *keys(MuonConfig, "muon."),
    *keys(MultiStepConfig, "multi_step."),
    *keys(ProbeConfig, "probes.p."),
]


@pytest.mark.parametrize("key", TRAIN_KEYS)
def test_keys_of_training(key):
    base = TRAIN | {"data": [{"source": "stdlib"}], "probes": {"p": {"source": "mqar"}}}
    sweep(parse_train, base | {"muon": {}, "multi_step": {}}, key, lambda config: config.as_dict())


@pytest.mark.parametrize("key", training_hints())
def test_keys_of_transformers_arguments(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = TRAIN | {"device": "cpu", "training": {"output_dir": str(tmp_path)}}
    sweep(parse_train, base, f"training.{key}", training_arguments)


DISTILL_KEYS = [
    *keys(DistillFile),
    *keys(Teacher, "teacher."),
    *keys(OutputsStage, "outputs."),
    *keys(LogitsStage, "logits."),
    *keys(LanguageStage, "language."),
]


@pytest.mark.parametrize("key", DISTILL_KEYS)
def test_keys_of_distillation(key):
    sweep(parse_distill, DISTILL, key, lambda config: config.as_dict())


@pytest.mark.parametrize("key", [*keys(Ablation), *keys(Match, "match."), "changes.y", "overrides"])
def test_keys_of_an_ablation(key):
    sweep(parse_ablation, ABLATE, key)


def build(values):
    config = HybridConfig(**values)
    config.to_json_string()
    with torch.device("meta"):
        HybridForCausalLM(config)


@pytest.mark.parametrize("key", list(HybridConfig.__annotations__))
def test_keys_of_a_model(key):
    base = MODEL | {"vocab_size": 32}
    sweep(dict, base, key, build)


@pytest.mark.parametrize("name", mixers.names())
def test_options_of_a_mixer(name):
    cls = mixers.get(name)
    sample = {"type": name, **cls.samples()[0]}
    base = {"layout": "QS", "hidden_size": 32, "vocab_size": 32, "mixers": {"Q": sample}}
    for key in keys(dataclasses.fields(cls.Options), "mixers.Q."):
        sweep(dict, base | {"max_position_embeddings": 64}, key, build)


@pytest.mark.parametrize("name", feed_forwards.names())
def test_options_of_a_feed_forward(name):
    cls = feed_forwards.get(name)
    base = {
        "layout": "S",
        "hidden_size": 16,
        "vocab_size": 32,
        "feed_forwards": {"-": {"type": name}},
    }
    for key in keys(dataclasses.fields(cls.Options), "feed_forwards.-."):
        sweep(dict, base, key, build)
