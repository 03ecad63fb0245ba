"""muP: what it scales, exactly; and that it keeps activations where they are as the width grows."""

import pytest
import torch
from torch.testing import assert_close

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.modeling.initialization import growths
from hybrid.train.optim import groups

BASE = 64


def make(width, base, layout="LS", **config):
    torch.manual_seed(0)
    config = {
        "mixers": {"S": {"head_dim": 16}},
        "vocab_size": 64,
        "initializer_range": 0.125,
        **config,
    }
    return HybridForCausalLM(
        HybridConfig(layout=layout, hidden_size=width, mup_base_width=base, **config)
    )


def optimizer(model, rate=0.02, weight_decay=0.0):
    names = [name for name, _ in model.named_parameters()]
    made = groups(model, names, weight_decay, learning_rate=rate)
    return torch.optim.AdamW([dict(g) for g in made], lr=rate)


def coordinates(width, base):
    """Mean absolute activation of the embedding, of each layer and of the logits, after some steps."""
    model = make(width, base, init="fixed")
    steps = optimizer(model)
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    return torch.stack([x.abs().mean() for x in (*out.hidden_states, out.logits)])


def test_coordinate_check():
    """From width 64 to 256 no activation grows by half with it; without it one grows tenfold."""
    with_mup = [coordinates(width, BASE) for width in (64, 128, 256)]
    assert (torch.stack(with_mup[1:]) < 1.5 * with_mup[0]).all()
    without = [coordinates(width, None) for width in (64, 256)]
    assert_close(without[0], with_mup[0])  # at the base width nothing changes
    assert (without[1] / without[0]).max() > 10


def test_initial_stds():
    grown, plain = make(256, BASE, ffn="E-"), make(256, None, ffn="E-")
    by_name = dict(plain.named_parameters())
    found = growths(grown)
    for name, parameter in grown.named_parameters():
        if parameter.ndim < 2:
            continue
        factor = 1.0
        if name.endswith("router.weight"):  # 8 experts at every width
            factor = 1 / 4
        elif "embed" not in name:
            small = 64 if "down" not in name else found_width(parameter.shape[-1])
            factor = (parameter.shape[-1] / small) ** -0.5
        ratio = (parameter.std() / by_name[name].std()).item()
        assert ratio == pytest.approx(factor, rel=0.06), name
        assert (name in found) is (factor != 1), name


def found_width(inner):
    """Inner widths of feed-forwards at 256 -> at 64."""
    return {704: 192, 352: 96}[inner]


def test_parameter_groups():
    model = make(256, BASE)
    made = groups(model, dict(model.named_parameters()), 0.1, learning_rate=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: (g.get("lr", 0.01), g["weight_decay"]) for g in made for p in g["params"]
    }
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, (rate, decay) in rates.items():
        growth = growths(model).get(name)
        factor = 1.0 if growth is None else growth.fan_in
        assert rate == pytest.approx(0.01 / factor)
        assert decay in (0.0, pytest.approx(0.1 * factor))
    assert rates["model.layers.1.mixer.q_proj.weight"] == pytest.approx((0.0025, 0.4))
    assert rates["model.layers.1.ffn.down_proj.weight"][0] == pytest.approx(0.01 * 192 / 704)
    assert rates["model.embed_tokens.weight"] == (0.01, 0.0)
    assert len(groups(model, names.values(), 0.1)) == 2  # without a rate: as ever


def test_output_multiplier():
    model, plain = make(256, BASE, logits_multiplier=3.0), make(256, None, logits_multiplier=3.0)
    plain.load_state_dict(model.state_dict())
    hidden = torch.randn(1, 2, 256)
    assert_close(model.compute_logits(hidden), plain.compute_logits(hidden) / 4)


def test_attention_scale_is_one_over_the_head_dim():
    def scaling(width, base, **options):
        mixers = {"S": options}
        config = HybridConfig(layout="S", hidden_size=width, mup_base_width=base, mixers=mixers)
        return config.stack.mixers["S"].options.scaling

    assert scaling(256, 64, num_heads=4) == pytest.approx(16**-0.5 * 16 / 64)
    assert scaling(256, 64, num_heads=4, scale=0.5) == pytest.approx(0.5 * 16 / 64)
    assert scaling(256, 64, head_dim=16) == pytest.approx(16**-0.5)  # heads grow, dims do not
    assert scaling(64, 64, num_heads=4) == scaling(64, None, num_heads=4)


def test_it_is_kept_in_a_checkpoint(tmp_path, assert_same_weights):
    model = make(128, BASE)
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert again.config.mup_base_width == BASE
    assert growths(again) == growths(model)
    assert_same_weights(again, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mup_base_width": 0}, "mup_base_width: expected at least 1, got 0"),
        ({"mup_base_width": 64, "init": "xavier"}, "expected init 'fixed' or 'depth_"),
        (
            {"mup_base_width": 40, "hidden_size": 60, "mixers": {"L": {"num_heads": 3}}},
            "at hidden_size 40, mixers.L.num_heads: expected a divisor of hidden_size 40, got 3",
        ),
    ],
)
def test_bad_configs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(layout="L", **options)
