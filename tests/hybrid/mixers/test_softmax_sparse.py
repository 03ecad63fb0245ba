"""Native sparse attention: written out again token by token, its memory, its cost."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import hybrid
from hybrid.mixers import sparse_blocks
from hybrid.modeling.cache import CacheSlot
from hybrid.nn.packing import Segments

D, H, KV, K = 24, 4, 2, 6
THETA = 50.0
FREQUENCIES = THETA ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
SMALL = {"block_size": 4, "block_stride": 2, "select_size": 4, "num_selected": 3, "num_local": 1,
         "window": 3}  # fmt: skip


def sparse_config(**options):
    return hybrid.HybridConfig(
        layout="Q",
        hidden_size=D,
        mixers={
            "Q": {
                "type": "native_sparse_attention", "num_heads": H, "num_kv_heads": KV,
                "head_dim": K, "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
                **SMALL, **options,
            }
        },
    )  # fmt: skip


def build(dtype=torch.float64, **options):
    mixer = sparse_config(**options).stack[0].mixers[0].build(0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator).double())

    def run(x):
        angles = None
        if mixer.options.rope_parameters is not None:
            positions = torch.arange(x.shape[1], dtype=torch.float64)
            angle = torch.outer(positions, FREQUENCIES).repeat(1, 2)[None]
            angles = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        return mixer(x, position_embeddings=angles)[0]

    return mixer, run


def text(time, dtype=torch.float64):
    return torch.randn(1, time, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def turned(y, t, positions):
    """y (K,) as complex pairs (j, j + K / 2), rotated to position t."""
    return torch.complex(*y.split(K // 2)) * torch.exp(1j * t * FREQUENCIES * positions)


def weigh(q, keys):
    """Softmax of the logits of rotated q and keys."""
    logits = [float((q * k.conj()).real.sum()) / math.sqrt(K) for k in keys]
    exps = [math.exp(z - max(logits)) for z in logits]
    return [e / sum(exps) for e in exps]


def mean_of(weights, values):
    zero = torch.zeros(K, dtype=torch.float64)
    return sum((p * v for p, v in zip(weights, values, strict=True)), start=zero)


def by_definition(mixer, x, options):
    """Section 3 of the paper for one row (T, D): loops over tokens, blocks and heads."""
    o = {**SMALL, "num_initial": 1, "compress": "mlp", **options}
    size, stride, select = o["block_size"], o["block_stride"], o["select_size"]
    turn = 0 if "rope_parameters" in options else 1
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    time = len(x)

    def branches(name):
        """[branch][token][key head] -> (K,)"""
        y = (x @ w[f"{name}.weight"].T).view(time, 3, KV, K)
        return [[list(y[t, branch]) for t in range(time)] for branch in range(3)]

    keys, values = branches("k_proj"), branches("v_proj")

    def compressed(which, tokens, g, first):
        block = torch.stack([tokens[t][g] for t in range(first, first + size)])
        if o["compress"] == "mean":
            return block.mean(0)
        hidden = (block + w["places"][which]).flatten() @ w["up"][which]
        return (hidden / (1 + torch.exp(-hidden))) @ w["down"][which]

    rows = []
    for t in range(time):
        heads = [None] * H
        gates = 1 / (1 + torch.exp(-(w["gate_proj.weight"] @ x[t]))).view(3, H)
        queries = [turned(y, t, turn) for y in (w["q_proj.weight"] @ x[t]).view(H, K)]
        for g in range(KV):
            group = range(g * H // KV, (g + 1) * H // KV)
            starts = [c for c in range(0, time, stride) if c + size <= t + 1]
            k_blocks = [turned(compressed(0, keys[0], g, c), c + size - 1, turn) for c in starts]
            v_blocks = [compressed(1, values[0], g, c) for c in starts]
            weights = {h: weigh(queries[h], k_blocks) if starts else [] for h in group}
            # how much weight lies in each selection block: overlapping strides, all heads of the group
            score = {}
            for j in range(t // select + 1):
                score[j] = 0.0
                for h, (c, p) in itertools.product(group, enumerate(starts)):
                    shared = min(p + size, (j + 1) * select) - max(p, j * select)
                    score[j] += weights[h][c] * max(0, shared) / stride
            always = [j for j in score if j < o["num_initial"] or j > t // select - o["num_local"]]
            rest = sorted((j for j in score if j not in always), key=lambda j: -score[j])
            chosen = (always + rest)[: o["num_selected"]]
            seen = [s for s in range(t + 1) if s // select in chosen]
            near = range(max(0, t - o["window"] + 1), t + 1)
            for h in group:
                fine = weigh(queries[h], [turned(keys[1][s][g], s, turn) for s in seen])
                last = weigh(queries[h], [turned(keys[2][s][g], s, turn) for s in near])
                heads[h] = (
                    gates[0, h] * mean_of(weights[h], v_blocks)
                    + gates[1, h] * mean_of(fine, [values[1][s][g] for s in seen])
                    + gates[2, h] * mean_of(last, [values[2][s][g] for s in near])
                )
        rows.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


CASES = [
    {},
    {"compress": "mean"},
    {"rope_parameters": None, "window": 7},
    {"block_size": 6, "block_stride": 2, "select_size": 8, "num_initial": 0, "num_local": 2},
    {"block_size": 3, "block_stride": 3, "select_size": 3, "num_selected": 5, "num_local": 2},
    {"block_size": 4, "block_stride": 1, "select_size": 6, "num_initial": 0, "num_selected": 2},
]


@pytest.mark.parametrize("options", CASES)
def test_equals_its_definition(options):
    mixer, run = build(**options)
    x = text(29)
    with torch.no_grad():
        found = run(x)[0]
    assert_close(found, by_definition(mixer, x[0], options), rtol=1e-9, atol=1e-10)


def test_selecting_every_block_is_full_attention():
    """The selected branch alone, against scaled dot-product attention."""
    mixer, run = build(num_selected=20, rope_parameters=None)
    x = text(30)
    with torch.no_grad():
        mixer.o_proj.weight.copy_(torch.eye(D))
        mixer.gate_proj.weight.zero_()
        before = run(x)
        mixer.v_proj.weight[KV * K : 2 * KV * K] = 0  # take the selected branch away
        found = 2 * (before - run(x))
    mixer, _ = build(num_selected=20, rope_parameters=None)
    q = (x @ mixer.q_proj.weight.T).view(30, H, K).transpose(0, 1)
    k, v = (
        (x @ p.weight[KV * K : 2 * KV * K].T).view(30, KV, K).transpose(0, 1)
        for p in (mixer.k_proj, mixer.v_proj)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
    )
    assert_close(found[0], expected.transpose(0, 1).flatten(1), rtol=1e-9, atol=1e-10)


def test_few_queries_at_a_time_change_neither_output_nor_gradients(monkeypatch):
    mixer, run = build()
    x = text(40).requires_grad_()

    def grads():
        y = run(x)
        return y, torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])

    y, expected = grads()
    monkeypatch.setattr(sparse_blocks, "_BUDGET", 1)
    again, found = grads()
    assert_close(again, y, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_packed_documents_cannot_be_continued():
    mixer, _ = build()
    documents = Segments(torch.tensor([0, 4, 9], dtype=torch.int32))
    slot = CacheSlot(DynamicCache(config=sparse_config()), 0)
    with pytest.raises(ValueError, match="cannot continue packed documents"):
        mixer(text(9), segments=documents, cache=slot)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_grows_linearly_with_the_text(monkeypatch):
    monkeypatch.setattr(sparse_blocks, "_BUDGET", 2**14)
    _, run = build(dtype=torch.float32)
    largest, saved = [], []
    for time in (256, 512, 1024):
        with Largest() as mode, torch.no_grad():
            run(text(time, torch.float32))
        largest.append(mode.elements)
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = run(text(time, torch.float32))
        saved.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        del y
    assert largest[-1] < H * 1024 * 1024 / 8
    for sizes in (largest, saved):
        assert sizes[2] / sizes[1] < 2.2


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("context", [1, 5, 12, 50])
def test_flops_are_those_of_the_tokens_attended_to(options, context):
    o = {**SMALL, "num_initial": 1, "compress": "mlp", **options}
    mixer, _ = build(**options)
    size, stride, select = o["block_size"], o["block_stride"], o["select_size"]
    pairs = 0
    for t in range(context):
        pairs += sum(c + size <= t + 1 for c in range(0, context, stride))
        own = t // select
        full = min(own, o["num_selected"] - 1)  # whole blocks, besides its own
        pairs += full * select + t % select + 1
        pairs += min(t + 1, o["window"])
    made = 0.0
    if o["compress"] == "mlp":
        made = 2 * 2 * (size * K * K + K * K) * KV / stride
    expected = 4 * H * K * pairs / context + made
    assert mixer.mixing_flops(context) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 5}, "block_size: expected a multiple of block_stride 2, got 5"),
        ({"select_size": 3}, "select_size: expected a multiple of block_stride 2, got 3"),
        ({"block_size": 6}, "block_size: expected at most select_size 4, got 6"),
        ({"block_stride": 0}, "block_stride: expected at least 1, got 0"),
        ({"num_initial": -1}, "num_initial: expected at least 0, got -1"),
        ({"num_local": 0}, "num_local: expected at least 1, got 0"),
        ({"num_local": 3}, r"num_selected: .* num_initial \+ num_local = 4, got 3"),
        ({"window": 1}, "window: expected at least 2, got 1"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads 4, got 3"),
        ({"compress": "max"}, "compress: expected one of 'mlp' or 'mean', got 'max'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=rf"mixers\.Q\.{message}"):
        build(**options)
