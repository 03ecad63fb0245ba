"""flash-linear-attention's own checkpoints: names, shapes, logits, and back.

Its classes are built on a CPU but compute on a GPU alone, so what they are is recorded in
`fla_formats/` (see `record.py` there), and what they compute is written out here from their formulas:
one row, a loop over time, in float64.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import hybrid
from hybrid.convert import FAMILIES
from hybrid.convert.configs import BOOKKEEPING, to_ours
from hybrid.convert.family import NotExpressible
from hybrid.convert.stack import on_meta
from hybrid.convert.tensor_plan import steps
from hybrid.convert.tensor_sources import Held
from hybrid.convert.tensor_streams import read_steps

HERE = Path(__file__).parent / "fla_formats"
RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}
ALL = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name, found in RECORDED.items()
    for case in found["cases"]
]
each_family = pytest.mark.parametrize("name", RECORDED)
each_case = pytest.mark.parametrize(("name", "case"), ALL)
TIME = 13


class Stack:
    """One of their models, as its forward passes are written: ids (T,) -> logits (T, vocabulary)."""

    def __init__(self, name, config, weights):
        self.name, self.c, self.w = name, SimpleNamespace(**config), weights

    def __call__(self, ids):
        x = self.w["model.embeddings.weight"][ids]
        for i in range(self.c.num_hidden_layers):
            self.i, self.at = i, f"model.layers.{i}.attn."
            layer = f"model.layers.{i}."
            if f"{layer}pre_norm.weight" in self.w:
                x = self.norm(f"{layer}pre_norm", x)
            x = x + self.mixer()(self.norm(f"{layer}attn_norm", x))
            if self.name == "rwkv6":
                x = x + self.channel_mix(f"{layer}ffn.", self.norm(f"{layer}ffn_norm", x))
            else:
                x = x + self.mlp(f"{layer}mlp.", self.norm(f"{layer}mlp_norm", x))
        head = self.w.get("lm_head.weight", self.w["model.embeddings.weight"])
        return self.norm("model.norm", x) @ head.T

    def mixer(self):
        if self.name == "transformer":
            return lambda x: self.softmax(x, vars(self.c))
        attn = self.c.attn or []
        for spec in [attn] if isinstance(attn, dict) else attn:
            if self.i in spec["layers"]:
                return lambda x: self.softmax(x, spec)
        return getattr(self, self.name)

    # Pieces.

    def norm(self, name, x, eps=None):
        eps = self.c.norm_eps if eps is None else eps
        weight, bias = self.w.get(f"{name}.weight"), self.w.get(f"{name}.bias")
        if bias is not None:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return y if weight is None else y * weight

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def mlp(self, at, x):
        gate = F.silu(self.linear(f"{at}gate_proj", x))
        return self.linear(f"{at}down_proj", gate * self.linear(f"{at}up_proj", x))

    def conv(self, name, x, activation):
        weight = self.w[f"{name}.weight"]
        width = weight.shape[-1]
        padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
        y = sum(weight[:, 0, j] * padded[j : j + len(x)] for j in range(width))
        return activation(y)

    def inputs(self, x, names="qkv", conv=F.silu, bare=lambda y: y):
        """The three projections: convolved and activated, or only what they are without."""
        found = []
        for name in names:
            y = self.linear(f"{self.at}{name}_proj", x)
            y = self.conv(f"{self.at}{name}_conv1d", y, conv) if self.c.use_short_conv else bare(y)
            found.append(y)
        return found

    def low_rank(self, name, x):
        return self.linear(f"{self.at}{name}.1", self.linear(f"{self.at}{name}.0", x))

    def output(self, o, name, gate=None, act=F.silu, eps=None):
        """o (T, H, V): normalised by head, gated, projected."""
        y = self.norm(f"{self.at}{name}", o, eps).flatten(1)
        y = y if gate is None else y * act(self.linear(f"{self.at}{gate}", x=self.x))
        return self.linear(f"{self.at}o_proj", y)

    # Mixers; x (T, D).

    def softmax(self, x, spec):
        H = spec["num_heads"]
        H_kv = spec["num_kv_heads"] or H
        q, k, v = (self.linear(f"{self.at}{n}_proj", x) for n in "qkv")
        q, k, v = heads(q, H), heads(k, H_kv), heads(v, H_kv)
        if spec.get("qk_norm"):
            q, k = self.norm(f"{self.at}q_norm", q, 1e-5), self.norm(f"{self.at}k_norm", k, 1e-5)
        q, k = (rotary(y, spec["rope_theta"]) for y in (q, k))
        k, v = (y.repeat_interleave(H // H_kv, dim=1) for y in (k, v))
        logits = torch.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
        t, s = torch.arange(len(x))[:, None], torch.arange(len(x))
        seen = (s <= t) & (s > t - (spec["window_size"] or len(x)))
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        return self.linear(f"{self.at}o_proj", torch.einsum("hts,shv->thv", weights, v).flatten(1))

    def gla(self, x):
        c, self.x = self.c, x
        q, k, v = (heads(y, c.num_heads) for y in self.inputs(x))
        decay = F.logsigmoid(heads(self.low_rank("gk_proj", x), c.num_heads)) / 16
        if c.clamp_min is not None:
            decay = decay.clamp(min=c.clamp_min)
        if c.feature_map == "relu":
            q, k = q.relu(), k.relu()
        o = recurrence(q, k, v, decay)
        if not c.use_output_gate:
            return self.output(o, "g_norm")
        return self.output(o, "g_norm_swish_gate", "g_proj")

    def retnet(self, x):
        H, self.x = self.c.num_heads, x
        q, k, v = (heads(y, H) for y in self.inputs(x))
        q, k = rotary(q, 10000.0), rotary(k, 10000.0)
        decay = torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype)))
        o = recurrence(q, k, v, decay[:, None].expand(len(x), H, q.shape[-1]))
        return self.output(o, "g_norm_swish_gate", "g_proj")

    def delta(self, x, H, H_v, decay):
        """q, k at length 1; the delta rule."""
        q, k, v = self.inputs(x, bare=F.silu)
        q, k = (heads(y, H) for y in (q, k))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        q, k = (y.repeat_interleave(H_v // H, dim=1) for y in (q, k))
        beta = torch.sigmoid(self.linear(f"{self.at}b_proj", x))
        beta = 2 * beta if self.c.allow_neg_eigval else beta
        return recurrence(q, k, heads(v, H_v), decay.expand(len(x), H_v, q.shape[-1]), beta)

    def delta_net(self, x):
        self.x, H = x, self.c.num_heads
        o = self.delta(x, H, H, x.new_zeros(1))
        return self.output(o, "o_norm", "g_proj" if self.c.use_gate else None)

    def gated_deltanet(self, x):
        self.x, H_v = x, self.c.num_v_heads or self.c.num_heads
        step = F.softplus(self.linear(f"{self.at}a_proj", x) + self.w[f"{self.at}dt_bias"])
        decay = -self.w[f"{self.at}A_log"].exp() * step
        o = self.delta(x, self.c.num_heads, H_v, decay[:, :, None])
        return self.output(o, "o_norm", "g_proj" if self.c.use_gate else None)

    def kda(self, x):
        self.x, H_v = x, self.c.num_v_heads or self.c.num_heads
        f = heads(self.low_rank("f_proj", x) + self.w[f"{self.at}dt_bias"], H_v)
        rate = self.w[f"{self.at}A_log"].exp()[:, None]
        decay = -rate * F.softplus(f)
        if self.c.lower_bound is not None:
            decay = self.c.lower_bound * torch.sigmoid(rate * f)
        o = self.delta(x, self.c.num_heads, H_v, decay)
        gate = self.low_rank("g_proj", x)
        y = self.norm(f"{self.at}o_norm", o).flatten(1) * torch.sigmoid(gate)
        return self.linear(f"{self.at}o_proj", y)

    def hgrn2(self, x):
        H = self.c.num_heads
        q, f, v = self.inputs(x, "qfi", conv=lambda y: y)
        forget = torch.sigmoid(f)
        if self.c.use_lower_bound:
            bounds = self.w["model.lower_bounds"].softmax(0)
            gamma = (bounds.cumsum(0) - bounds[0])[self.i]
            forget = gamma + (1 - gamma) * forget
        o = recurrence(
            heads(F.silu(q), H), heads(1 - forget, H), heads(v, H), heads(forget.log(), H)
        )
        y = self.norm(f"{self.at}g_norm", o.flatten(1), 1e-5)
        return self.linear(f"{self.at}o_proj", y)

    def rwkv6(self, x):
        c, at, H = self.c, self.at, self.c.num_heads
        step = shifted(x) - x
        z = self.linear(f"{at}x_proj.0.linear", x + step * self.w[f"{at}x_proj.0.mu"])
        z = torch.tanh(z).unflatten(-1, (5, c.proj_low_rank_dim))
        up = self.w[f"{at}x_proj.2.weight"].unflatten(-1, (5, -1))
        mu = torch.einsum("tnr,dnr->tnd", z, up) + self.w[f"{at}x_bias"]
        r, w, k, v, g = (x + step * mu[:, n] for n in range(5))
        r, k, v, g = (
            self.linear(f"{at}{n}_proj.linear", y)
            for n, y in (("r", r), ("k", k), ("v", v), ("g", g))
        )
        lora = torch.tanh(self.linear(f"{at}w_proj.linear.lora.0", w))
        decay = -self.linear(f"{at}w_proj.linear.lora.2", lora).exp()
        o = recurrence(
            heads(r, H), heads(k, H), heads(v, H), heads(decay, H),
            bonus=self.w[f"{at}bonus"], scale=1.0,
        )  # fmt: skip
        y = F.group_norm(
            o.flatten(1), H, self.w[f"{at}g_norm.weight"], self.w[f"{at}g_norm.bias"], c.norm_eps
        )
        return self.linear(f"{at}o_proj", y * F.silu(g))

    def channel_mix(self, at, x):
        step = shifted(x) - x
        key = self.linear(f"{at}key.linear", x + step * self.w[f"{at}key.mu"])
        gate = self.linear(f"{at}receptance.linear", x + step * self.w[f"{at}receptance.mu"])
        return torch.sigmoid(gate) * self.linear(f"{at}value", key.relu().square())


def heads(x, count):
    return x.unflatten(-1, (count, -1))


def shifted(x):
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def rotary(x, theta):
    """x (T, H, K): pairs (j, j + K / 2) turned by t theta^(-2 j / K)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.double().cos()[:, None], angle.double().sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def recurrence(q, k, v, log_decay, beta=None, bonus=None, scale=None):
    """o (T, H, V) of q, k, log_decay (T, H, K), v (T, H, V), beta (T, H) and bonus (H, K)."""
    S, out = q.new_zeros(*q.shape[1:], v.shape[-1]), []
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for t in range(len(q)):
        kept = log_decay[t].exp()[..., None] * S
        new = v[t]
        if beta is not None:
            new = beta[t][:, None] * (new - torch.einsum("hk,hkv->hv", k[t], kept))
        write = k[t][..., None] * new[:, None]
        read = kept + write if bonus is None else S + bonus[..., None] * write
        out.append(scale * torch.einsum("hk,hkv->hv", q[t], read))
        S = kept + write
    return torch.stack(out)


def random_tensors(shapes):
    torch.manual_seed(3)
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, dtype=torch.float64)
        if len(shape) == 1:
            found[name] = 1 + 0.2 * noise if "norm" in name and "weight" in name else 0.3 * noise
        elif "embeddings" in name or "lower_bounds" in name:
            found[name] = noise
        else:
            found[name] = 0.5 * noise * shape[-1] ** -0.5
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(family, case) -> a checkpoint of theirs in a folder, its config and its tensors."""

    def make(name, case):
        found = RECORDED[name]["cases"][case]
        folder = tmp_path_factory.mktemp(f"{name}-{case}")
        config = {
            **found["config"],
            "model_type": name,
            "architectures": [RECORDED[name]["architecture"]],
            "torch_dtype": "float64",
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = random_tensors(found["tensors"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return SimpleNamespace(folder=folder, config=found["config"], tensors=tensors)

    return make


@each_case
def test_logits_and_gradients_are_those_of_their_formulas(name, case, published):
    found = published(name, case)
    ours = hybrid.HybridForCausalLM.from_published(found.folder)
    ids = torch.randint(3, 61, (2, TIME), generator=torch.Generator().manual_seed(0))
    weights = {key: tensor.clone().requires_grad_() for key, tensor in found.tensors.items()}
    theirs = Stack(name, found.config, weights)
    expected = torch.stack([theirs(row) for row in ids])
    logits = ours(ids).logits
    assert logits.dtype == torch.float64
    # positions and the decays of RetNet are float32 on both sides, and rounded each in its own way
    exact = name not in ("retnet", "transformer") and not found.config.get("attn")
    tolerance = 1e-9 if exact else 1e-5
    error = (logits - expected).abs().max() / expected.std()
    assert error < tolerance, f"{error:.1e}"

    direction = torch.randn(logits.shape, dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    wanted = Held({key: tensor.grad for key, tensor in weights.items()})
    parameters = dict(ours.named_parameters())
    pairs = list(read_steps(steps(FAMILIES[name], ours), wanted))
    # what is exactly 0 in one order of operations may be the rounding of the others in another
    rounding = torch.finfo(torch.float64).eps * max(gradient.norm() for _, gradient in pairs)
    for key, gradient in pairs:
        got = parameters[key].grad
        assert (got - gradient).norm() <= tolerance * gradient.norm() + rounding, key


@each_case
@torch.no_grad()
def test_prefill_and_decode_are_one_pass(name, case, published):
    ours = hybrid.HybridForCausalLM.from_published(published(name, case).folder)
    ids = torch.randint(3, 61, (2, TIME), generator=torch.Generator().manual_seed(0))
    whole = ours(ids).logits
    first = ours(ids[:, :9], use_cache=True)
    second = ours(ids[:, 9:12], past_key_values=first.past_key_values)
    third = ours(ids[:, 12:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@each_case
def test_every_tensor_goes_in_and_comes_back(name, case, published, tmp_path):
    found = published(name, case)
    hybrid.convert.import_published(found.folder, tmp_path / "ours")
    hybrid.convert.export(tmp_path / "ours", tmp_path / "theirs", name)
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    assert tensors.keys() == found.tensors.keys()
    for key, tensor in tensors.items():
        assert tensor.equal(found.tensors[key]), key
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["architectures"] == [RECORDED[name]["architecture"]]
    assert config["model_type"] == name
    differ = {key for key, value in found.config.items() if config.get(key) != value}
    differ -= {"use_cache"}  # transformers takes it for a key of generation
    # a width that was computed is written out, and so is a number of heads
    filled = {key for key in differ if found.config[key] is None}
    assert differ - filled <= {"hidden_ratio"}
    assert filled <= {"intermediate_size", "hidden_ratio", "num_v_heads", "num_kv_heads",
                      "num_heads", "expand_ratio"}  # fmt: skip


@each_family
def test_defaults_and_keys_are_theirs(name):
    family, recorded = FAMILIES[name], RECORDED[name]
    assert family.architecture == recorded["architecture"]
    assert dict(family.defaults) == recorded["defaults"]
    assert recorded["defaults"].keys() - family.read_keys - BOOKKEEPING == set()


@each_family
def test_their_default_size(name):
    family = FAMILIES[name]
    ours = on_meta(to_ours(family, family.their_config({})))
    assert sum(p.numel() for p in ours.parameters()) == RECORDED[name]["parameters"]


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("gla", {"num_kv_heads": 2}, "num_kv_heads: expected num_heads, 4, got 2"),
        ("gla", {"fuse_norm": False}, "renamed to attn.g_norm_swish_gate"),
        ("delta_net", {"qk_norm": "sum"}, "qk_norm: expected 'l2', got 'sum'"),
        ("gated_deltanet", {"attnres_block_size": 4}, "attnres_block_size: expected None, got 4"),
        ("hgrn2", {"a_switch": 3}, "a_switch: 3 is unknown to the map of 'hgrn2'"),
        ("kda", {"safe_gate": True}, "lower_bound: expected a number with safe_gate: True"),
        ("retnet", {"attn": [{"layers": [0], "num_heads": 8}, {"layers": [1], "num_heads": 4}]},
         "attn: expected entries that differ only in their window"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_named(name, given, line):
    family = FAMILIES[name]
    with pytest.raises(NotExpressible, match=line):
        to_ours(family, family.their_config(given))


def own(layout="XXQ", X=None, Q=None, **config):
    """A stack of ours under letters of its own."""
    mixers = {
        "X": {"type": "gated_linear_attention", "num_heads": 2, "gate_bias": False, **(X or {})},
        "Q": {"type": "softmax_attention", "num_heads": 4, "num_kv_heads": 2, **(Q or {})},
    }
    torch.manual_seed(0)
    return hybrid.HybridForCausalLM(
        hybrid.HybridConfig(
            vocab_size=61, hidden_size=24, layout=layout, mixers=mixers,
            feed_forwards={"-": {"intermediate_size": 20}}, **config,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def test_a_stack_of_our_own_goes_out(tmp_path, assert_same_weights, assert_close_to_rounding):
    model = own()
    hybrid.convert.export(model, tmp_path / "out", "gla")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attn"]["layers"] == [2]
    assert (config["attn"]["num_heads"], config["attn"]["num_kv_heads"]) == (4, 2)
    ids = torch.randint(3, 61, (2, TIME))
    again = hybrid.HybridForCausalLM.from_published(tmp_path / "out")
    assert_same_weights(again, model)
    assert_close_to_rounding(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"X": {"gate_bias": True}}, r"mixers.X.gate_bias: True here \(layers 0-1\)"),
        ({"X": {"gate_rank": 4}}, "mixers.X.gate_rank: 4 here .*, gla can only say 16"),
        (
            {"Q": {"rope_parameters": None}},
            "rope_parameters: expected default rotary parameters, got None",
        ),
        ({"Q": {"qk_norm": "head"}}, r"mixers.Q.qk_norm: 'head' here \(layer 2\)"),
        ({"embedding_norm": True}, "embedding_norm: True here, gla can only say False"),
        ({"layout": "QQ"}, "attn: expected layers without softmax attention"),
        (
            {"layout": "LX"},
            r"layer 0 \(L\): expected the mixers of gla, .*, got lightning_attention",
        ),
    ],
)
def test_what_cannot_go_out_is_named(given, line, tmp_path):
    with pytest.raises(NotExpressible, match=line):
        hybrid.convert.export(own(**given), tmp_path / "out", "gla")


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
def test_the_record_is_that_of_their_classes(tmp_path):
    # in a process of its own, for the package registers classes under names of transformers'
    script = str(HERE / "record.py")
    subprocess.run([sys.executable, script, str(tmp_path)], check=True, capture_output=True)
    for name, recorded in RECORDED.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        if found["fla"] != recorded["fla"]:
            pytest.skip(f"fla {found['fla']} is installed, {recorded['fla']} was recorded")
        assert found == recorded, name
