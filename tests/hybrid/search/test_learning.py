"""Methods that train: supernets and gates, their checkpoints, and optuna's search."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hybrid
from hybrid.config.options import ConfigError
from hybrid.convert.replace_mixers import replace_mixers
from hybrid.search import parse_config, search
from hybrid.search.gates import probability, sample
from hybrid.search.learning import LearnChoices
from hybrid.search.models import Models
from hybrid.search.supernet import explore
from search_cases import BEST, LAYERS, MATTERS, proposed, space_of


@pytest.fixture
def learnt(values):
    """What training takes to tell layers apart, in seconds."""
    values["distill"]["training"] |= {"max_steps": 20, "save_steps": 5}
    values["supernet"] = {"trials": 12, "startup": 6, "training": {"learning_rate": 1e-3}}
    values["gates"] = {"learning_rate": 0.3}
    return values


@pytest.mark.parametrize("method", ["supernet", "gates"])
def test_methods_that_train_keep_the_layer_that_matters(learnt, method, searched_model):
    report = search(parse_config({**learnt, "methods": [method]}))
    assert proposed(report, method) == [BEST]
    assert all(p["fits"] for p in report["points"] if p["methods"] != ["teacher"])
    assert report["weights"] == ("supernet" if method == "supernet" else "mixers")


def test_training_changes_the_linear_mixers_alone(learnt, assert_same_weights, searched_model):
    search(parse_config({**learnt, "methods": ["supernet", "gates"]}))
    out = Path(learnt["out"])
    for method in ("supernet", "gates"):
        stored = load_file(out / method / "logits" / "mixers.safetensors")
        names = {name.split(".")[0] for name in stored} - {"gates"}
        assert names == {str(i) for i in range(LAYERS)}
        assert ("gates" in stored) == (method == "gates")
    student = replace_mixers(hybrid.HybridForCausalLM.from_pretrained(searched_model), "D5")
    stored = load_file(out / "supernet" / "logits" / "mixers.safetensors")
    before = student.model.layers[MATTERS].mixer.state_dict()
    assert any(not torch.equal(before[name], stored[f"{MATTERS}.{name}"]) for name in before)


@pytest.mark.parametrize("method", ["supernet", "gates"])
def test_training_resumes_to_the_same_weights(learnt, method, tmp_path, monkeypatch):
    whole = parse_config({**learnt, "methods": [method]})
    search(whole)
    parts = parse_config({**learnt, "methods": [method], "out": str(tmp_path / "parts")})
    step = LearnChoices.compute_loss

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 12:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LearnChoices, "compute_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(parts)
    monkeypatch.setattr(LearnChoices, "compute_loss", step)
    search(parts)
    files = [Path(c.out) / method / "logits" / "mixers.safetensors" for c in (whole, parts)]
    found, resumed = map(load_file, files)
    assert found.keys() == resumed.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)


def test_another_training_of_a_supernet_is_refused(learnt):
    search(parse_config({**learnt, "methods": ["gates"]}))
    learnt["gates"] |= {"penalty": 2.0}
    with pytest.raises(ConfigError, match=r"gates.penalty: was 1.0, is 2.0"):
        search(parse_config({**learnt, "methods": ["gates"]}))


def test_gates_are_a_hard_concrete_distribution():
    """Mean and mass of samples against the closed form of the paper (arXiv 1712.01312, eq. 12)."""
    logits = torch.tensor([-2.0, 0.0, 1.5]).repeat(200_000, 1)
    g = sample(logits, 2 / 3, torch.Generator().manual_seed(0))
    assert 0 <= g.min() <= g.max() <= 1
    torch.testing.assert_close(
        (g > 0).float().mean(0), probability(logits[0], 2 / 3), rtol=0, atol=5e-3
    )
    assert (g == 1).any()


def test_a_choice_is_one_mixer_or_a_mixture(pair):
    teacher, student = pair
    models = Models(teacher, student, space_of(pair, most_layers=2))
    supernet = models.supernet().eval()
    choices = models.choices(supernet)
    ids = torch.randint(0, 259, (1, 9))
    kept = frozenset({1, 3})
    with torch.no_grad():
        for i, choice in choices.items():
            choice.keep = i in kept
        expected = models.build(kept)(ids).logits
        torch.testing.assert_close(supernet(ids, use_cache=False).logits, expected)
        for i, choice in choices.items():
            choice.gate = torch.tensor(float(i in kept))
        torch.testing.assert_close(supernet(ids, use_cache=False).logits, expected)


def test_the_sampler_measures_every_placement_within_the_budget(pair, tmp_path):
    space, seen = space_of(pair, most_layers=2), []

    def measure(kept):
        seen.append(kept)
        return [float(len(kept ^ {1, 4}))]

    arguments = {"directions": ["minimize"], "startup": 8, "seed": 0, "known": [frozenset({0, 1})]}
    assert explore(space, tmp_path / "s", measure, trials=30, **arguments) == [{1, 4}]
    assert all(len(kept) == 2 for kept in seen)
    assert seen[0] == {0, 1}
    # a second call with more trials goes on
    explore(space, tmp_path / "s", measure, trials=31, **arguments)
    assert len(seen) == 31


def test_a_trial_that_was_cut_off_is_measured_again(pair, tmp_path):
    space, seen = space_of(pair, most_layers=1), []

    def measure(kept):
        seen.append(kept)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [float(min(kept))]

    arguments = {"directions": ["minimize"], "trials": 5, "startup": 5, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        explore(space, tmp_path / "s", measure, **arguments)
    explore(space, tmp_path / "s", measure, **arguments)
    assert seen[3] == seen[2]
    assert len(seen) == 6
