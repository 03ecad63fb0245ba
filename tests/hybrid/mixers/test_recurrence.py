"""Each mixer against its published recurrence, written out again here, one token at a time.

float64, random values in every parameter, one row. Nothing below uses the ops or the package's own
pieces: weights are looked up by name, and all arithmetic is spelt out.
"""

import math

import pytest
import torch

import hybrid
from hybrid.config.registry import mixers
from hybrid.modeling.backends import use_backends_of

D, TIME, LAYER, EPS = 24, 9, 1, 1e-6
RECURRENCES = {}


def recurrence(name, **options):
    def add(function):
        RECURRENCES[f"{name}-{len(RECURRENCES)}"] = (name, options, function)
        return function

    return add


class Weights:
    """Parameters and buffers by name, `w["q_proj"]` being the matrix that is multiplied by x."""

    def __init__(self, mixer):
        self.tensors = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}

    def __call__(self, name, x):
        y = self.tensors[f"{name}.weight"].detach() @ x
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias.detach()

    def __getitem__(self, name):
        return self.tensors[name].detach()


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return torch.log(1 + torch.exp(x))


def rms(x, eps=EPS):
    return x / torch.sqrt((x * x).mean() + eps)


def layer_norm(x, eps=EPS):
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + eps)


def unit(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


def convolved(rows, w, activation=silu):
    """A list of vectors through the depthwise convolution called `conv`."""
    taps = w["conv.weight"]
    bias = w.tensors.get("conv.bias")
    width, out = taps.shape[1], []
    for t in range(len(rows)):
        y = torch.zeros_like(rows[t]) if bias is None else bias.detach().clone()
        for back in range(width):
            if t - back >= 0:
                y = y + taps[:, width - 1 - back] * rows[t - back]
        out.append(activation(y))
    return out


def qkv(w, x, sizes, conv=True, activation=silu):
    """q, k, v of every token, convolved together."""
    rows = [torch.cat([w("q_proj", u), w("k_proj", u), w("v_proj", u)]) for u in x]
    if conv:
        rows = convolved(rows, w, activation)
    return [row.split(sizes) for row in rows]


def heads(x, count):
    return x.reshape(count, -1)


@recurrence("mamba2", num_heads=4, num_groups=2, head_dim=3, state_size=5)
def mamba2(w, x):
    H, G, P, N = 4, 2, 3, 5
    S, out = torch.zeros(H, P, N, dtype=x.dtype), []
    for u, (C, B, v) in zip(x, qkv(w, x, [G * N, G * N, H * P]), strict=True):
        C, B, v = heads(C, G), heads(B, G), heads(v, H)
        dt = softplus(w("dt_proj", u) + w["dt_bias"])
        y = torch.zeros(H, P, dtype=x.dtype)
        for h in range(H):
            g = h // (H // G)
            S[h] = math.exp(-dt[h] * math.exp(w["A_log"][h])) * S[h] + dt[h] * torch.outer(
                v[h], B[g]
            )
            y[h] = S[h] @ C[g] + w["D"][h] * v[h]
        z = (y.flatten() * silu(w("gate_proj", u))).reshape(G, -1)
        out.append(w("o_proj", w["norm.weight"] * torch.cat([rms(part) for part in z])))
    return out


@recurrence("mamba", inner_size=10, state_size=3, dt_rank=2)
@recurrence("mamba", inner_size=10, state_size=3, dt_rank=2, inner_norm=True)
def mamba(w, x):
    E, N, R = 10, 3, 2
    pairs = [w("in_proj", u).split(E) for u in x]
    h, out = torch.zeros(E, N, dtype=x.dtype), []
    for u, (_, z) in zip(convolved([p[0] for p in pairs], w), pairs, strict=True):
        dt, B, C = w("x_proj", u).split([R, N, N])
        if "inner_norms.0.weight" in w.tensors:
            dt, B, C = (rms(y) * w[f"inner_norms.{i}.weight"] for i, y in enumerate((dt, B, C)))
        dt = softplus(w("dt_proj", dt))
        A = -torch.exp(w["A_log"])
        h = torch.exp(dt[:, None] * A) * h + dt[:, None] * B[None, :] * u[:, None]
        out.append(w("o_proj", (h @ C + w["D"] * u) * silu(z)))
    return out


def delta_rule(w, x, gamma, read, H, G, K, V, twice):
    S, out = torch.zeros(H, V, K, dtype=x.dtype), []
    for u, (q, k, v) in zip(x, qkv(w, x, [G * K, G * K, H * V]), strict=True):
        q, k, v = heads(q, G), heads(k, G), heads(v, H)
        beta = sigmoid(w("beta_proj", u)) * (2 if twice else 1)
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            key, query = unit(k[h // (H // G)]), unit(q[h // (H // G)])
            old = S[h] * gamma(w, u, h)
            S[h] = old - beta[h] * torch.outer(old @ key, key) + beta[h] * torch.outer(v[h], key)
            o[h] = S[h] @ query / math.sqrt(K)
        normed = torch.stack([rms(o[h]) * w["norm.weight"] for h in range(H)]).flatten()
        out.append(w("o_proj", read(normed, w, u)))
    return out


@recurrence("delta_net", num_heads=2, head_dim=4, value_head_dim=5)
@recurrence("delta_net", num_heads=2, head_dim=4, value_head_dim=5, negative_eigenvalues=True)
def delta_net(w, x, negative_eigenvalues=False):
    return delta_rule(
        w, x, lambda w, u, h: 1.0, lambda o, w, u: o, 2, 2, 4, 5, negative_eigenvalues
    )


@recurrence("gated_delta_net", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5)
def gated_delta_net(w, x):
    def gamma(w, u, h):
        dt = softplus(w("decay_proj", u)[h] + w["dt_bias"][h])
        return torch.exp(-torch.exp(w["A_log"][h]) * dt)

    return delta_rule(w, x, gamma, lambda o, w, u: o * silu(w("gate_proj", u)), 4, 2, 4, 5, False)


@recurrence(
    "gated_delta_product", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5,
    num_householder=3,
)  # fmt: skip
@recurrence(
    "gated_delta_product", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5, decay=False,
    negative_eigenvalues=False, output_gate=False,
)  # fmt: skip
def gated_delta_product(w, x, num_householder=2, decay=True, negative_eigenvalues=True):
    """The state is multiplied by whole K x K transitions, one for each step."""
    H, G, K, V, n = 4, 2, 4, 5, num_householder
    S, out = torch.zeros(H, K, V, dtype=x.dtype), []
    for u, (q, ks, vs) in zip(x, qkv(w, x, [G * K, n * G * K, n * H * V]), strict=True):
        ks, vs = ks.reshape(n, G, K), vs.reshape(n, H, V)
        beta = (sigmoid(w("beta_proj", u)) * (2 if negative_eigenvalues else 1)).reshape(n, H)
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            g = h // (H // G)
            if decay:
                dt = softplus(w("decay_proj", u)[h] + w["dt_bias"][h])
                S[h] = S[h] * torch.exp(-torch.exp(w["A_log"][h]) * dt)
            for j in range(n):
                k, b = unit(ks[j, g]), beta[j, h]
                turn = torch.eye(K, dtype=x.dtype) - b * torch.outer(k, k)
                S[h] = turn @ S[h] + b * torch.outer(k, vs[j, h])
            o[h] = unit(heads(q, G)[g]) @ S[h] / math.sqrt(K)
        y = torch.stack([rms(row) * w["norm.weight"] for row in o]).flatten()
        out.append(w("o_proj", y * silu(w("gate_proj", u)) if decay else y))
    return out


@recurrence("kimi_delta_attention", num_heads=2, head_dim=4, value_head_dim=5, gate_rank=3)
@recurrence(
    "kimi_delta_attention", num_heads=2, head_dim=4, value_head_dim=5, gate_rank=3,
    decay_gate="bounded", lower_bound=-3.0,
)  # fmt: skip
def kimi_delta_attention(w, x, decay_gate="softplus", lower_bound=None):
    def low_rank(name, u):
        return w(f"{name}.1", w(f"{name}.0", u))

    def alpha(w, u, h):
        f = heads(low_rank("decay_proj", u) + w["dt_bias"], 2)[h]
        rate = torch.exp(w["A_log"][h])
        if decay_gate == "bounded":
            return torch.exp(lower_bound * sigmoid(rate * f))
        return torch.exp(-rate * softplus(f))

    def read(o, w, u):
        return o * sigmoid(low_rank("gate_proj", u))

    return delta_rule(w, x, alpha, read, 2, 2, 4, 5, False)


def additive(w, x, decay, read, H, K, V, scale, conv=False, key=None, query=None, value=None):
    """S (V x K) with S_t = decay_t * S_{t-1} + v_t k_t^T; decay is (H,) or broadcasts to (H, V, K)."""
    S, out = torch.zeros(H, V, K, dtype=x.dtype), []
    for u, (q, k, v) in zip(x, qkv(w, x, [H * K, H * K, H * V], conv), strict=True):
        q, k, v = heads(q, H), heads(k, H), heads(v, H)
        k = key(k, u) if key else k
        q = query(q) if query else q
        gate = decay(u)
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            S[h] = gate[h] * S[h] + torch.outer(v[h], k[h])
            o[h] = S[h] @ q[h] * scale
        out.append(w("o_proj", read(o, u)))
    return out


@recurrence("gated_linear_attention", num_heads=2, head_dim=4, value_head_dim=5)
@recurrence(
    "gated_linear_attention", num_heads=2, head_dim=4, value_head_dim=5, conv_size=3, tau=3.0
)
def gated_linear_attention(w, x, conv_size=None, tau=16.0):
    def alpha(u):
        f = heads(w("decay_proj.1", w("decay_proj.0", u)), 2)
        return (sigmoid(f) ** (1 / tau))[:, None, :]

    def read(o, u):
        normed = torch.stack([rms(row) * w["norm.weight"] for row in o]).flatten()
        return normed * silu(w("gate_proj", u))

    return additive(w, x, alpha, read, 2, 4, 5, 0.5, conv=conv_size is not None)


@recurrence("mamba3", num_heads=4, num_groups=2, head_dim=3, state_size=8)
@recurrence("mamba3", num_heads=4, head_dim=3, state_size=5, rotated=1.0, output_norm=True)
def mamba3(w, x, num_groups=1, state_size=8, rotated=0.5, output_norm=False):
    """A state that is turned and decayed step by step; pairs (j, j + J) of its rows."""
    H, G, P, N = 4, num_groups, 3, state_size
    J = int(N * rotated) // 2
    S, written, out = torch.zeros(H, N, P, dtype=x.dtype), torch.zeros(H, N, P).double(), []
    for u in x:
        C, B, v = heads(w("q_proj", u), G), heads(w("k_proj", u), G), heads(w("v_proj", u), H)
        dt = softplus(w("dt_proj", u) + w["dt_bias"])
        alpha = torch.exp(-dt * softplus(w("decay_proj", u)))
        blend, theta = sigmoid(w("blend_proj", u)), w("angle_proj", u)
        y = torch.zeros(H, P, dtype=x.dtype)
        for h in range(H):
            g = h // (H // G)
            c = rms(C[g]) * w["C_norm.weight"] + w["C_bias"][h]
            b = rms(B[g]) * w["B_norm.weight"] + w["B_bias"][h]
            turn = torch.eye(N, dtype=x.dtype)
            for j in range(J):
                cos, sin = torch.cos(dt[h] * theta[j]), torch.sin(dt[h] * theta[j])
                turn[j, j] = turn[j + J, j + J] = cos
                turn[j, j + J], turn[j + J, j] = sin, -sin
            S[h] = alpha[h] * turn @ (S[h] + (1 - blend[h]) * dt[h] * written[h])
            written[h] = torch.outer(b, v[h])
            S[h] = S[h] + blend[h] * dt[h] * written[h]
            y[h] = c @ S[h] + w["D"][h] * v[h]
        if output_norm:
            y = torch.stack([rms(o) for o in y]) * w["norm.weight"].reshape(H, P)
        out.append(w("o_proj", y.flatten() * silu(w("gate_proj", u))))
    return out


@recurrence("comba", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5)
@recurrence(
    "comba", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5, state_feedback=False,
    output_feedback=0.0,
)  # fmt: skip
def comba(w, x, state_feedback=True, output_feedback=1.0):
    H, G, K, V = 4, 2, 4, 5
    S, out = torch.zeros(H, V, K, dtype=x.dtype), []
    for u, (q, k, v) in zip(x, qkv(w, x, [G * K, G * K, H * V]), strict=True):
        q, k, v, o = heads(q, G), heads(k, G), heads(v, H), []
        beta, dt = sigmoid(w("beta_proj", u)), softplus(w("decay_proj", u) + w["dt_bias"])
        for h in range(H):
            g = h // (H // G)
            key, query = unit(k[g]), unit(q[g])
            b = sigmoid(w["feedback"][g]) if state_feedback else 1.0
            alpha = torch.exp(-torch.exp(w["A_log"][h]) * dt[h])
            turn = alpha * torch.eye(K, dtype=x.dtype) - b * beta[h] * torch.outer(key, key)
            S[h] = S[h] @ turn + beta[h] * torch.outer(v[h], key)
            query = query - w["correction"][g] * key if output_feedback else query
            o.append(rms(S[h] @ query / math.sqrt(K)) * w["norm.weight"])
        out.append(w("o_proj", torch.cat(o) * sigmoid(w("gate_proj", u))))
    return out


@recurrence(
    "rwkv7", num_heads=2, head_dim=4, value_head_dim=5, decay_rank=2, rate_rank=3, gate_rank=6
)
def rwkv7(w, x):
    """The state is multiplied by whole K x K transitions, as a row of V x K."""
    H, K, V = 2, 4, 5
    S, before, out = torch.zeros(H, V, K, dtype=x.dtype), torch.zeros(D, dtype=x.dtype), []
    for u in x:
        r, k, v, decay, rate, gate = (u + (before - u) * mu for mu in w["shift"])
        before = u
        decay = w("decay_proj.1", torch.tanh(w("decay_proj.0", decay)))
        decay = torch.exp(-math.exp(-0.5) * sigmoid(decay))
        a = sigmoid(w("rate_proj.1", w("rate_proj.0", rate)))
        g = w("gate_proj.1", sigmoid(w("gate_proj.0", gate)))
        r, k, v = heads(w("q_proj", r), H), w("k_proj", k), heads(w("v_proj", v), H)
        removal = heads(k * w["removal_scale"], H)
        k = heads(k * (1 + (a - 1) * w["rate_mix"]), H)
        decay, a, o, own = heads(decay, H), heads(a, H), [], []
        for h in range(H):
            c = unit(removal[h])
            S[h] = S[h] @ (torch.diag(decay[h]) - torch.outer(c, a[h] * c))
            S[h] = S[h] + torch.outer(v[h], k[h])
            o.append(layer_norm(S[h] @ r[h], 64e-5))
            own.append((r[h] * w["bonus"][h] * k[h]).sum() * v[h])
        o = torch.cat(o) * w["norm.weight"] + w["norm.bias"]
        out.append(w("o_proj", (o + torch.cat(own)) * g))
    return out


@recurrence("gated_delta_net2", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5)
@recurrence(
    "gated_delta_net2", num_heads=4, num_key_heads=2, head_dim=4, value_head_dim=5, gate_rank=0,
    negative_eigenvalues=True, output_gate=False,
)  # fmt: skip
def gated_delta_net2(w, x, negative_eigenvalues=False, gate_rank=5, output_gate=True):
    """The state is multiplied by whole K x K transitions."""
    H, G, K, V = 4, 2, 4, 5
    S, out = torch.zeros(H, K, V, dtype=x.dtype), []

    def mapped(name, u):
        return w(f"{name}.1", w(f"{name}.0", u)) if gate_rank else w(name, u)

    for u, (q, k, v) in zip(x, qkv(w, x, [G * K, G * K, H * V]), strict=True):
        q, k, v = heads(q, G), heads(k, G), heads(v, H)
        b = heads(sigmoid(w("erase_proj", u)), G) * (2 if negative_eigenvalues else 1)
        write = heads(sigmoid(w("write_proj", u)), H)
        decay = heads(softplus(mapped("decay_proj", u) + w["dt_bias"]), H)
        normed = []
        for h in range(H):
            g = h // (H // G)
            key, query = unit(k[g]), unit(q[g])
            turn = torch.eye(K, dtype=x.dtype) - torch.outer(key, b[g] * key)
            S[h] = turn @ torch.diag(torch.exp(-torch.exp(w["A_log"][h]) * decay[h])) @ S[h]
            S[h] = S[h] + torch.outer(key, write[h] * v[h])
            normed.append(rms(query @ S[h] / math.sqrt(K)) * w["norm.weight"])
        gate = sigmoid(mapped("gate_proj", u)) if output_gate else 1.0
        out.append(w("o_proj", torch.cat(normed) * gate))
    return out


@recurrence("gated_slot_attention", num_heads=2, head_dim=4, value_head_dim=5, num_slots=3)
@recurrence(
    "gated_slot_attention", num_heads=2, head_dim=4, value_head_dim=5, num_slots=3, conv_size=3,
    tau=2.0, feature_map="identity",
)  # fmt: skip
def gated_slot_attention(w, x, conv_size=None, tau=8.0, feature_map="silu"):
    H, K, V, M = 2, 4, 5, 3
    keys, values = torch.zeros(H, M, K, dtype=x.dtype), torch.zeros(H, M, V, dtype=x.dtype)
    out = []
    for u, (q, k, v) in zip(x, qkv(w, x, [H * K, H * K, H * V], bool(conv_size)), strict=True):
        q, k = (silu(y) if feature_map == "silu" else y for y in (q, k))
        q, k, v, f = heads(q, H), heads(k, H), heads(silu(v), H), heads(w("decay_proj", u), H)
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            for m in range(M):
                alpha = sigmoid(f[h, m]) ** (1 / tau)
                keys[h, m] = alpha * keys[h, m] + (1 - alpha) * k[h]
                values[h, m] = alpha * values[h, m] + (1 - alpha) * v[h]
            e = torch.exp(keys[h] @ q[h])
            o[h] = e / e.sum() @ values[h]
        out.append(w("o_proj", rms(silu(o.flatten())) * w["norm.norm.weight"]))
    return out


@recurrence("hgrn2", num_heads=2, head_dim=4, value_head_dim=5)
def hgrn2(w, x):
    def forget(f):
        gamma = sigmoid(w["lower_bound_logit"])
        return gamma + (1 - gamma) * sigmoid(f)

    def read(o, u):
        return rms(o.flatten()) * w["norm.norm.weight"]

    return additive(
        w, x, lambda u: forget(heads(w("k_proj", u), 2))[:, None, :], read, 2, 4, 5, 1.0,
        key=lambda k, u: 1 - forget(k), query=silu,
    )  # fmt: skip


@recurrence("dfw", num_heads=2, head_dim=4, value_head_dim=5)
def dfw(w, x):
    def decay(u):
        alpha = heads(sigmoid(w("key_decay_proj", u)), 2)
        beta = heads(sigmoid(w("value_decay_proj", u)), 2)
        return beta[:, :, None] * alpha[:, None, :]

    return additive(w, x, decay, lambda o, u: o.flatten(), 2, 4, 5, 1.0)


def retained(w, x, gamma, H, K, V):
    """o_n = sum_m (prod of gamma from m+1 to n) <q_n e^{i n theta}, k_m e^{i m theta}> v_m."""
    theta = 10000.0 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K)
    rows = qkv(w, x, [H * K, H * K, H * V], conv=False)
    out = []
    for n, u in enumerate(x):
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            reach = 1.0
            for m in range(n, -1, -1):
                q, k = heads(rows[n][0], H)[h], heads(rows[m][1], H)[h]
                q, k = torch.complex(*q.split(K // 2)), torch.complex(*k.split(K // 2))
                turned = (q * torch.exp(1j * n * theta)) * (k * torch.exp(1j * m * theta)).conj()
                o[h] += reach * turned.real.sum() / math.sqrt(K) * heads(rows[m][2], H)[h]
                reach = reach * gamma(x[m], h)
        normed = torch.stack([rms(row) for row in o]).flatten()
        out.append(w("o_proj", normed * silu(w("gate_proj", u))))
    return out


@recurrence("retention", num_heads=2, head_dim=4, value_head_dim=5)
def retention(w, x):
    return retained(w, x, lambda u, h: 1 - 2.0 ** (-5 - h), 2, 4, 5)


@recurrence("gated_retention", num_heads=2, head_dim=4, value_head_dim=5, tau=2.0)
def gated_retention(w, x, tau):
    return retained(w, x, lambda u, h: sigmoid(w("decay_proj", u)[h]) ** (1 / tau), 2, 4, 5)


@recurrence("gateloop", num_heads=2, head_dim=4, value_head_dim=5)
@recurrence("gateloop", num_heads=6, head_dim=1, value_head_dim=1)
def gateloop(w, x, num_heads=2, head_dim=4, value_head_dim=5):
    H, K, V = num_heads, head_dim, value_head_dim
    S, out = torch.zeros(H, V, K, dtype=torch.complex128), []
    for u, (q, k, v) in zip(x, qkv(w, x, [H * K, H * K, H * V], conv=False), strict=True):
        a = heads(sigmoid(w("decay_proj", u)) * torch.exp(1j * w("phase_proj", u)), H)
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            S[h] = a[h] * S[h] + torch.outer(heads(v, H)[h], heads(k, H)[h])
            o[h] = (S[h] @ heads(q, H)[h].to(S.dtype)).real
        out.append(w("o_proj", o.flatten() * silu(w("gate_proj", u))))
    return out


@recurrence("rwkv6", num_heads=2, head_dim=4, value_head_dim=5, shift_rank=3, decay_rank=2)
def rwkv6(w, x):
    H, K, V, rank = 2, 4, 5, 3
    S, out, before = torch.zeros(H, K, V, dtype=x.dtype), [], torch.zeros_like(x[0])
    for u in x:
        step = before - u
        z = torch.tanh(w("shift_down", u + step * w["shift_base"]))
        mixed = []
        for c in range(5):
            lora = z[c * rank : (c + 1) * rank] @ w["shift_up"][c]
            mixed.append(u + step * (w["shift"][c] + lora))
        x_r, x_k, x_v, x_w, x_g = mixed
        r, k, v = (
            heads(w(n, y), H) for n, y in (("q_proj", x_r), ("k_proj", x_k), ("v_proj", x_v))
        )
        d = w["decay_base"] + w("decay_proj.1", torch.tanh(w("decay_proj.0", x_w)))
        alpha = heads(torch.exp(-torch.exp(d)), H)
        o = torch.zeros(H, V, dtype=x.dtype)
        for h in range(H):
            kv = torch.outer(k[h], v[h])
            o[h] = r[h] @ (S[h] + w["bonus"][h][:, None] * kv)
            S[h] = alpha[h][:, None] * S[h] + kv
        normed = torch.cat([layer_norm(row, 64e-5) for row in o])
        normed = normed * w["norm.weight"] + w["norm.bias"]
        out.append(w("o_proj", normed * silu(w("gate_proj", x_g))))
        before = u
    return out


@recurrence("mlstm", num_heads=2, head_dim=4, value_head_dim=5, gate_soft_cap=4.0)
@recurrence("mlstm", num_heads=2, head_dim=4, value_head_dim=5, input_gate="sigmoid")
def mlstm(w, x, input_gate="exp", gate_soft_cap=15.0):
    H, K, V = 2, 4, 5
    C, n, out = torch.zeros(H, V, K, dtype=x.dtype), torch.zeros(H, K, dtype=x.dtype), []
    for u, (q, k, v) in zip(x, qkv(w, x, [H * K, H * K, H * V], conv=False), strict=True):
        i, f = (
            gate_soft_cap * torch.tanh(w(name, u) / gate_soft_cap)
            for name in ("input_gate_proj", "forget_gate_proj")
        )
        f, i = sigmoid(f), torch.exp(i) if input_gate == "exp" else sigmoid(i)
        rows = []
        for h in range(H):
            query, key, value = (heads(y, H)[h] for y in (q / math.sqrt(K), k, v))
            C[h] = f[h] * C[h] + i[h] * torch.outer(value, key)
            n[h] = f[h] * n[h] + i[h] * key
            bound = torch.clamp((n[h] @ query).abs(), min=1.0) if input_gate == "exp" else 1.0
            rows.append(layer_norm(C[h] @ query / bound))
        gate = sigmoid(w("gate_proj", u))
        out.append(w("o_proj", torch.cat(rows) * w["norm.weight"] * gate))
    return out


@recurrence("rwkv_channel_mix", intermediate_size=10)
def rwkv_channel_mix(w, x):
    out, before = [], torch.zeros_like(x[0])
    for u in x:
        key = w("k_proj", u + (before - u) * w["key_shift"])
        gate = w("gate_proj", u + (before - u) * w["gate_shift"])
        out.append(sigmoid(gate) * w("v_proj", key.clamp(min=0) ** 2))
        before = u
    return out


@recurrence("gated_short_convolution")
def gated_short_convolution(w, x):
    parts = [w("in_proj", u).split(D) for u in x]
    y = convolved([B * u for B, _, u in parts], w, activation=lambda y: y)
    return [w("o_proj", C * row) for row, (_, C, _) in zip(y, parts, strict=True)]


@recurrence("rg_lru", width=12, num_heads=3)
def rg_lru(w, x):
    h, out = None, []
    rows = convolved([w("x_proj", u) for u in x], w, activation=lambda y: y)
    for u, row in zip(x, rows, strict=True):

        def gate(name, row=row):
            blocks = torch.stack(
                [row[4 * b : 4 * b + 4] @ w[f"{name}.weight"][b] for b in range(3)]
            )
            return sigmoid(blocks + w[f"{name}.bias"]).flatten()

        a = torch.exp(-8 * gate("recurrence_gate") * softplus(w["decay_rate"]))
        written = gate("input_gate") * row
        h = written if h is None else a * h + torch.sqrt(1 - a * a) * written
        z = w("gate_proj", u)
        gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        out.append(w("o_proj", h * gelu))
    return out


@recurrence("sliding_window_attention", window=4, num_heads=4, num_kv_heads=2, head_dim=6)
@recurrence(
    "sliding_window_attention", window=4, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm="head"
)
def sliding_window_attention(w, x, qk_norm=None):
    """Keys t - 3 to t."""
    return local_attention(w, x, lambda t: max(0, t - 3), qk_norm)


@recurrence("forgetting_attention", num_heads=4, num_kv_heads=2, head_dim=6)
@recurrence("forgetting_attention", num_heads=2, head_dim=6, output_gate=True)
def forgetting_attention(w, x, num_heads=4, num_kv_heads=2, output_gate=False):
    H, G, K = num_heads, num_kv_heads if num_heads == 4 else num_heads, 6
    out = []
    for t, u in enumerate(x):
        o = []
        for h in range(H):
            g = h // (H // G)
            q, e, values = heads(w("q_proj", u), H)[h], [], []
            for s in range(t + 1):
                k = heads(w("k_proj", x[s]), G)[g]
                decay = math.prod(sigmoid(w("forget_proj", x[j])[h]) for j in range(s + 1, t + 1))
                e.append(torch.exp(q @ k / math.sqrt(K)) * decay)
                values.append(heads(w("v_proj", x[s]), G)[g])
            e = torch.stack(e)
            o.append(e / e.sum() @ torch.stack(values))
        gate = sigmoid(w("gate_proj", u)) if output_gate else 1.0
        out.append(w("o_proj", torch.cat(o) * gate))
    return out


@recurrence("chunked_attention", chunk_size=4, num_heads=4, num_kv_heads=2, head_dim=6)
def chunked_attention(w, x):
    """Keys from the last multiple of 4 to t."""
    return local_attention(w, x, lambda t: 4 * (t // 4))


def local_attention(w, x, first, qk_norm=None):
    """Keys first(t) to t, q and k turned by their absolute positions, pairs (j, j + 3)."""
    H, G, K = 4, 2, 6
    theta = 10000.0 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K)

    def turned(y, t, norm):
        y = rms(y) * w[f"{norm}.weight"] if qk_norm else y
        return torch.complex(*y.split(K // 2)) * torch.exp(1j * t * theta)

    out = []
    for t, u in enumerate(x):
        o = []
        for h in range(H):
            g = h // (H // G)
            q = turned(heads(w("q_proj", u), H)[h], t, "q_norm")
            reach = range(first(t), t + 1)
            keys = [turned(heads(w("k_proj", x[s]), G)[g], s, "k_norm") for s in reach]
            e = torch.stack([torch.exp((q * k.conj()).real.sum() / math.sqrt(K)) for k in keys])
            values = torch.stack([heads(w("v_proj", x[s]), G)[g] for s in reach])
            o.append(e / e.sum() @ values)
        out.append(w("o_proj", torch.cat(o)))
    return out


def lightning(w, x, slope, read, phi=silu):
    H, K = 2, 12
    S, out = torch.zeros(H, K, K, dtype=x.dtype), []
    for u in x:
        q, k, v = (heads(w(name, u), H) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = phi(q), phi(k)
        o = torch.zeros(H, K, dtype=x.dtype)
        for h in range(H):
            value = silu(v[h]) if phi is silu else v[h]
            S[h] = math.exp(-slope(h)) * S[h] + torch.outer(value, k[h])
            o[h] = S[h] @ q[h]
        out.append(w("o_proj", read(rms(o.flatten()) * w["norm.norm.weight"], w, u)))
    return out


@recurrence("lightning_attention", num_heads=2)
def lightning_attention(w, x):
    def slope(h):
        return 2.0 ** (-8 * (h + 1) / 2) * (1 - LAYER / (3 - 1 + 1e-5) + 1e-5)

    return lightning(w, x, slope, lambda o, w, u: o * sigmoid(w("gate_proj", u)))


@recurrence("norm_attention", num_heads=2)
def norm_attention(w, x):
    def elu_plus_one(y):
        return torch.where(y > 0, y + 1, torch.exp(y))

    return lightning(w, x, lambda h: 0.0, lambda o, w, u: o, elu_plus_one)


def build(name, options):
    config = hybrid.HybridConfig(
        layout="QQQ", hidden_size=D, norm_eps=EPS, mixers={"Q": {"type": name, **options}}
    )
    rotary = hybrid.HybridModel(config).rotary
    mixer = config.stack[LAYER].mixers[0].build(LAYER)
    use_backends_of(config, mixer)
    mixer = mixer.double()
    mixer.init_parameters(0.02)  # buffers
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator).double())
    return mixer, rotary


@pytest.mark.parametrize("case", RECURRENCES)
def test_equals_its_published_recurrence(case):
    name, options, function = RECURRENCES[case]
    mixer, rotary = build(name, options)
    x = torch.randn(2, TIME, D, dtype=torch.float64)
    names = function.__code__.co_varnames[2 : function.__code__.co_argcount]
    taken = {key: value for key, value in options.items() if key in names}
    with torch.no_grad():
        positions = torch.arange(TIME)[None]
        angles = rotary["Q"](x, positions) if "Q" in rotary else None
        found, _ = mixer(x, position_embeddings=angles)
    for row, y in zip(x, found, strict=True):
        expected = torch.stack(function(Weights(mixer), row, **taken))
        # fixed decays and rotary angles are float32 buffers, whatever the model's dtype
        fixed = name in (
            "lightning_attention", "retention", "gated_retention", "sliding_window_attention",
            "chunked_attention",
        )  # fmt: skip
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if fixed else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(y, expected, **tolerance)


def test_every_mixer_but_full_softmax_has_a_recurrence_here():
    covered = {name for name, _, _ in RECURRENCES.values()}
    ours = {
        name
        for name in mixers.names()
        if mixers.get(name).__module__.startswith("hybrid.")
        and mixers.get(name).layer_type != "full_attention"
    }
    assert ours <= covered


def test_comba_with_shut_gates():
    """log alpha of -2e7, whose inverse would overflow: each token forgets all but its own write."""
    mixer, _ = build("comba", {"num_heads": 2, "head_dim": 4, "value_head_dim": 5})
    with torch.no_grad():
        mixer.A_log.fill_(8.0)
        mixer.dt_bias.fill_(8.0)
    x = torch.randn(1, TIME, D, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        y = mixer.to(dtype)(given)[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
