import copy

import pytest
import torch
from torch import nn

from hybrid.config.options import ConfigError
from hybrid.train import parse_config
from hybrid.train.optim import Decay, Several, decaying, groups, matrices
from hybrid.train.runner import prepare_run


class Gated(nn.Module):
    """A module that names what must not decay."""

    def __init__(self, as_method=False):
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.decay = nn.Parameter(torch.zeros(2, 2))
        self.gate = nn.Parameter(torch.zeros(2, 2))
        self.no_weight_decay = (lambda: ["decay"]) if as_method else ("decay",)


class Small(nn.Module):
    def __init__(self, as_method=False):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.mixer = Gated(as_method)
        self.conv = nn.Conv1d(4, 4, 3, groups=4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("as_method", [False, True])
def test_what_decays_and_what_muon_takes(as_method):
    model = Small(as_method)
    assert decaying(model) == ["mixer.gate", "mixer.project.weight", "conv.weight"]
    assert matrices(model) == ["mixer.gate", "mixer.project.weight"]
    model.head.weight = nn.Parameter(torch.zeros(8, 4))
    assert "head.weight" in decaying(model)
    assert "head.weight" not in matrices(model)


@pytest.mark.parametrize(
    ("decay", "more"),
    [
        (Decay(embeddings=True), {"embed.weight"}),
        (Decay(norms=True), {"norm.weight", "norm.bias"}),
        (Decay(gates=True), {"mixer.decay"}),
        (Decay(True, True, True), {"embed.weight", "norm.weight", "norm.bias", "mixer.decay"}),
    ],
)
def test_decay_is_turned_on_for_each_kind_alone(decay, more):
    model = Small()
    assert set(decaying(model, decay)) - set(decaying(model)) == more


def test_decay_by_the_keys_of_a_run(tmp_path):
    """Biases, of which a softmax mixer with `bias` has some, never decay."""

    def decays(**keys):
        model = {"layout": "GS", "hidden_size": 32, "mixers": {"S": {"bias": True}}}
        values = {"model": model, "training": {"weight_decay": 0.1}, **keys}
        trainer = prepare_run(config(tmp_path, **values))
        names = {id(p): n for n, p in trainer.model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        assert {g["weight_decay"] for g in groups} == {0.0, 0.1}
        return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    base = decays()
    assert not any("embed" in n or "norm" in n or "bias" in n for n in base)
    assert decays(decay_embeddings=True) - base == {"model.embed_tokens.weight"}
    norms = decays(decay_norms=True) - base
    assert norms
    assert all("norm" in n for n in norms)
    everything = decays(decay_embeddings=True, decay_norms=True, decay_gates=True)
    assert not any(n.endswith("bias") for n in everything)
    assert norms < everything


@pytest.mark.parametrize("muon", [None, True])
def test_a_run_under_mup_has_its_rates(tmp_path, muon):
    model = {"layout": "S", "ffn": "E", "hidden_size": 64, "mup_base_width": 32}
    training = {"learning_rate": 1e-3, "weight_decay": 0.1}
    values = {} if muon is None else {"muon": muon}
    trainer = prepare_run(config(tmp_path, model=model, training=training, **values))
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == dict(trainer.model.named_parameters()).keys()
    assert rates["model.embed_tokens.weight"] == 1e-3
    assert rates["model.layers.0.ffn.experts.gate_up_proj"] == 5e-4
    # an orthogonal step has the same size at every width
    assert rates["model.layers.0.mixer.q_proj.weight"] == (5e-4 if muon is None else 1e-3)


def test_groups_hold_every_trainable_parameter_once():
    model = Small()
    model.mixer.gate.requires_grad = False
    made = groups(model, [n for n, _ in model.named_parameters()], 0.1)
    held = [id(p) for g in made for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [g["weight_decay"] for g in made] == [0.1, 0.0]


def pair(model):
    first, second = [model[0].weight], [model[0].bias, *model[1].parameters()]
    return [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, lr=0.01)]


def train(model, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def test_several_optimizers_are_one_in_steps_schedules_and_states():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    joint, resumed = copy.deepcopy(plain), copy.deepcopy(plain)
    apart = pair(plain)
    together = Several(pair(joint))
    for group in [g for o in apart for g in o.param_groups]:
        group["lr"] *= 0.5
    torch.optim.lr_scheduler.LambdaLR(together, lambda step: 0.5)
    for _ in range(2):
        for model, optimizers in ((plain, apart), (joint, [together])):
            generator = torch.Generator().manual_seed(1)
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.randn(5, 3, generator=generator)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    for mine, theirs in zip(joint.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    resumed.load_state_dict(joint.state_dict())
    after = Several(pair(resumed))
    after.load_state_dict(copy.deepcopy(together.state_dict()))
    train(joint, together, 3)
    train(resumed, after, 3)
    for mine, theirs in zip(resumed.parameters(), joint.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def config(tmp_path, **values):
    training = {"output_dir": str(tmp_path), "max_steps": 20, "disable_tqdm": True}
    return parse_config(
        {
            "model": {"layout": "LS", "hidden_size": 32},
            "data": "stdlib",
            "sequence_length": 32,
            **values,
            "training": {**training, **values.get("training", {})},
        }
    )


def test_muon_takes_the_matrices_inside_the_layers(tmp_path):
    training = {"weight_decay": 0.1, "learning_rate": 1e-3}
    muon = {"learning_rate": 2e-2, "momentum": 0.9}
    trainer = prepare_run(config(tmp_path, muon=muon, training=training))
    optimizer = trainer.create_optimizer()
    orthogonal, rest = optimizer.optimizers
    assert isinstance(orthogonal, torch.optim.Muon)
    assert isinstance(rest, torch.optim.AdamW)
    assert {g["lr"] for g in orthogonal.param_groups} == {2e-2}
    assert {g["lr"] for g in rest.param_groups} == {1e-3}
    embedding = trainer.model.get_input_embeddings().weight
    held = [p for g in orthogonal.param_groups for p in g["params"]]
    assert all(p.ndim == 2 and p is not embedding for p in held)
    everything = held + [p for g in rest.param_groups for p in g["params"]]
    assert sorted(map(id, everything)) == sorted(map(id, trainer.model.parameters()))


def test_muon_leaves_convolutions_to_adamw(build):
    """Their weights (C, W) have two dimensions and are a filter for each channel."""
    model = build(layout="MS", mixers={"S": {"conv_size": 3}}, canon="ACD")
    parts = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    kinds = {type(parts[id(model.get_parameter(name))]) for name in matrices(model)}
    assert kinds == {nn.Linear}
    assert any("conv" in name for name in decaying(model))


@pytest.mark.parametrize("name", ["S", "L", "N"])
def test_no_vector_of_a_mixer_decays(build, name):
    model = build(layout=name)
    by_name = dict(model.named_parameters())
    assert all(by_name[n].ndim > 1 for n in decaying(model))
    assert "model.embed_tokens.weight" not in decaying(model)


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("linear", {}, [0.5, 1.0, 0.5, 0.0]),
        ("cosine", {}, [0.5, 1.0, 0.5, 0.0]),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 4, "decay_type": "linear"},
            [0.5, 1.0, 1.0, 0.0],
        ),
    ],
)
def test_schedules_of_transformers_by_name(tmp_path, schedule, options, expected):
    """Rates after 2, 4, 12 and 20 of 20 steps with 4 of warm-up."""
    training = {
        "learning_rate": 1.0,
        "warmup_steps": 4,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": options,
    }
    trainer = prepare_run(config(tmp_path, training=training, muon=True))
    found = rates(trainer)
    assert [found[i - 1] for i in (2, 4, 12, 20)] == [{e} for e in expected]


def rates(trainer, steps=20):
    """The rates of all groups after each of `steps` steps."""
    trainer.create_optimizer_and_scheduler(steps)
    found = []
    for _ in range(steps):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        found.append({round(g["lr"], 9) for g in trainer.optimizer.param_groups})
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (True, [0.5, 1.0, 1.0, 0.316, 0.316, 0.1, 0.1]),
        ({"at": [0.5], "factors": [0.25]}, [0.5, 1.0, 0.25, 0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_the_multi_step_schedule(tmp_path, options, expected):
    """Rates after 2, 4, 15, 16, 17, 18 and 20 of 20 steps with 4 of warm-up."""
    training = {"learning_rate": 1.0, "warmup_steps": 4}
    trainer = prepare_run(config(tmp_path, training=training, multi_step=options))
    found = rates(trainer)
    assert [found[i - 1] for i in (2, 4, 15, 16, 17, 18, 20)] == [{e} for e in expected]


MULTI_STEP = {
    "lengths": ({"at": [0.5]}, "multi_step.factors: expected 1, one for each entry of at"),
    "order": ({"at": [0.9, 0.8]}, r"multi_step.at: expected ascending fractions between 0 and 1"),
    "sign": ({"factors": [0.5, -0.1]}, "multi_step.factors.1.: expected at least 0"),
    "key": ({"factor": [0.5, 0.1]}, "multi_step.factor: unknown key, did you mean 'factors'"),
}


@pytest.mark.parametrize("case", MULTI_STEP)
def test_mistakes_in_the_multi_step_schedule(tmp_path, case):
    options, message = MULTI_STEP[case]
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, multi_step=options)


def test_two_schedules_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"multi_step: expected no training\.lr_scheduler_type"):
        config(tmp_path, training={"lr_scheduler_type": "cosine"}, multi_step=True)


def test_what_a_schedule_lacks_is_said_before_the_run(tmp_path):
    training = {"lr_scheduler_type": "warmup_stable_decay"}
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: .*num_decay_steps"):
        prepare_run(config(tmp_path, training=training))
