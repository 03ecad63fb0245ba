"""The core of each mixer against a record of flash-linear-attention's plain functions (float32).

`fla_naive/record.py` makes the record. Projections, gates and output are replaced by the recorded
inputs, so that what is compared is what a mixer does between them.
"""

import json
from pathlib import Path

import pytest
import torch

import hybrid
from hybrid.modeling.backends import use_backends_of
from hybrid_kernels import linear_attention

RECORD = json.loads((Path(__file__).parent / "fla_naive" / "record.json").read_text())
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def recorded(name):
    """Inputs by name, tensors in float64, and the output."""
    inputs = {
        key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for key, value in RECORD[name]["inputs"].items()
    }
    return inputs, torch.tensor(RECORD[name]["output"], dtype=torch.float64)


def bare(name, monkeypatch, **options):
    """A mixer whose output is that of its recurrence, (B, T, H * V)."""
    config = hybrid.HybridConfig(layout="Q", hidden_size=8, mixers={"Q": {"type": name, **options}})
    mixer = config.stack[0].mixers[0].build(0).double()
    config._attn_implementation = "sdpa"  # eager attention wants a mask
    use_backends_of(config, mixer)
    mixer.o_proj = torch.nn.Identity()
    monkeypatch.setattr(mixer, "read", lambda o, x: o.flatten(-2), raising=False)
    return mixer


@pytest.mark.parametrize("decode", [False, True])
def test_gated_delta_product(monkeypatch, decode):
    given, expected = recorded("gated_delta_product")
    mixer = bare(
        "gated_delta_product", monkeypatch, num_heads=2, head_dim=3, value_head_dim=4, num_householder=2
    )  # fmt: skip
    batch, time = expected.shape[:2]
    k, v = (given[name].reshape(batch, time, 4, -1) for name in ("k", "v"))
    beta = given["beta"].reshape(batch, time, 4)
    assert given["scale"] == pytest.approx(mixer.scale)
    found = run_core(
        mixer, monkeypatch, (given["q"], k, v), {"beta": beta, "log_decay": given["g"]}, decode
    )
    torch.testing.assert_close(found, expected.flatten(-2), **CLOSE)


@pytest.mark.parametrize("decode", [False, True])
def test_gated_slot_attention(monkeypatch, decode):
    given, expected = recorded("gated_slot_attention")
    mixer = bare(
        "gated_slot_attention", monkeypatch, num_heads=2, head_dim=3, value_head_dim=4, num_slots=3
    )
    assert given["scale"] == mixer.scale
    qkv = tuple(given[name] for name in "qkv")
    found = run_core(mixer, monkeypatch, qkv, {"log_decay": given["g"]}, decode)
    torch.testing.assert_close(found, expected.flatten(-2), **CLOSE)


@pytest.mark.parametrize("decode", [False, True])
def test_gated_delta_net2(monkeypatch, decode):
    given, expected = recorded("gated_delta_net2")
    mixer = bare("gated_delta_net2", monkeypatch, num_heads=2, head_dim=3, value_head_dim=4)
    qkv = tuple(given[name] for name in "qkv")
    gates = {"log_decay": given["g"], "erase": given["b"], "write": given["w"]}

    def channel_gates(x):
        now = mixer.gates(x)
        return now["erase"], now["write"]

    monkeypatch.setattr(mixer, "channel_gates", channel_gates)
    recur = mixer.recur

    def recur_without_gates(*args, erase, write, **rest):
        return recur(*args, **rest)

    monkeypatch.setattr(mixer, "recur", recur_without_gates)
    found = run_core(mixer, monkeypatch, qkv, gates, decode)
    torch.testing.assert_close(found, expected.flatten(-2), **CLOSE)


def test_forgetting_attention(monkeypatch):
    given, expected = recorded("forgetting_attention")
    mixer = bare("forgetting_attention", monkeypatch, num_heads=4, num_kv_heads=2, head_dim=3)
    x = torch.zeros(*given["g"].shape[:2], 8, dtype=torch.float64)
    gate = torch.special.logit(given["g"].exp())
    for name, y in (*((f"{n}_proj", given[n].flatten(2)) for n in "qkv"), ("forget_proj", gate)):
        monkeypatch.setattr(getattr(mixer, name), "forward", lambda x, y=y: y)
    found = mixer(x)[0]
    torch.testing.assert_close(found, expected.flatten(-2), **CLOSE)


@pytest.mark.parametrize("steps", [1, 5])
def test_erase_keys(steps):
    """The op alone, as RWKV-7 calls it."""
    given, expected = recorded("erase_keys")
    rows = {name: x.transpose(1, 2) for name, x in given.items()}
    state, found = None, []
    for at in [slice(t, t + steps) for t in range(0, 5, steps)]:
        now = {name: x[:, at] for name, x in rows.items()}
        o, state = linear_attention(
            *(now[name] for name in "qkv"), log_decay=now["gk"], erase_key=now["beta"],
            erase_query=now["alpha"] * (-now["gk"]).exp(), initial_state=state,
            output_final_state=True,
        )  # fmt: skip
        found.append(o)
    torch.testing.assert_close(torch.cat(found, 1), expected.transpose(1, 2), **CLOSE)


class States(dict):
    """A slot that holds states only."""

    def state(self, name):
        return self.get(name)

    set_state = dict.__setitem__


@torch.no_grad()
def run_core(mixer, monkeypatch, qkv, gates, decode):
    """The mixer's output on these q, k, v and gates, in one pass or token by token."""
    time = qkv[0].shape[1]
    slot, found = (States(), []) if decode else (None, [])
    for at in [slice(t, t + 1) for t in range(time)] if decode else [slice(time)]:
        now = {name: gate[:, at] for name, gate in gates.items()}
        monkeypatch.setattr(mixer, "project", lambda *_, at=at: tuple(y[:, at] for y in qkv))
        monkeypatch.setattr(mixer, "gates", lambda x, now=now: dict(now))
        found.append(mixer.mix(torch.zeros(len(qkv[0]), at.stop - (at.start or 0), 8), None, slot))
    return torch.cat(found, dim=1)
