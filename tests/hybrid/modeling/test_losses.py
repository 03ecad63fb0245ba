"""The chunked cross entropy against transformers' loss on full logits, and what it must not allocate."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from hybrid.modeling.losses import (
    cross_entropy,
    in_chunks,
    is_plain,
    next_tokens,
    of_logits,
    transform_logits,
)

B, T, D, V = 3, 40, 16, 101
SMALL = 7 * V  # chunks of 7 tokens, which do not divide B * T


class Wrapped(nn.Module):
    """A head that is no plain linear map, as those of adapters are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :11] = -100
    labels[1, -5:] = -100
    torch.manual_seed(1)
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    return hidden, labels, head


def loss_and_gradients(hidden, head, loss):
    hidden, head = hidden.clone().requires_grad_(), copy.deepcopy(head)
    value = loss(hidden, head)
    value.backward()
    return value.detach(), hidden.grad, *(p.grad for p in head.parameters())


def reference(labels, cap=None, z_loss=0.0, items=None):
    """transformers' loss of the full logits; the z-term by its definition."""

    def loss(hidden, head):
        logits = transform_logits(head(hidden), cap=cap)
        value = ForCausalLMLoss(logits, labels, V, num_items_in_batch=items)
        real = labels[:, 1:] != -100
        squares = logits[:, :-1].float().exp().sum(-1).log().square()[real]
        return value + z_loss * squares.sum() / (real.sum() if items is None else items)

    return loss


def ours(labels, items=None, **options):
    def loss(hidden, head):
        targets = next_tokens(labels)
        count = (targets != -100).sum() if items is None else items
        return cross_entropy(hidden, head, targets, **options) / count

    return loss


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("items", [None, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.3}, {"cap": 0.7}, {"z_loss": 0.3, "cap": 0.7}]
)
@pytest.mark.parametrize("backend", ["chunked", "full"])
def test_equal_to_transformers_in_float32(options, items, wrapped, backend):
    hidden, labels, head = batch()
    expected = loss_and_gradients(hidden, head, reference(labels, items=items, **options))
    head = Wrapped(head) if wrapped else head
    assert is_plain(head) is not wrapped
    chunks = {"backend": backend, "chunk_elements": SMALL}
    found = loss_and_gradients(hidden, head, ours(labels, items=items, **options, **chunks))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_equal_to_transformers_in_bfloat16(wrapped, parameters):
    """Under autocast, and with bfloat16 weights: no further from float64 than transformers is.

    A module's weight gradient is added up from chunks by autograd, in bfloat16: one rounding each.
    """
    hidden, labels, head = batch(parameters)
    exact = loss_and_gradients(hidden.double(), head.double(), reference64(labels))
    head = head.to(parameters)

    def error(loss, head):
        def under(hidden, head):
            with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
                return loss(hidden, head)

        found = loss_and_gradients(hidden, head, under)
        pairs = zip(found, exact, strict=True)
        return [(one.double() - other).norm() / other.norm() for one, other in pairs]

    theirs = error(reference(labels), head)
    chunks = -(-B * T // 7)
    roundings = chunks**0.5 * 2**-9 if wrapped else 0
    head = Wrapped(head) if wrapped else head
    loss, of_hidden, of_head = error(ours(labels, chunk_elements=SMALL), head)
    assert loss <= 1.5 * theirs[0] + 1e-4
    assert of_hidden <= 1.5 * theirs[1] + 1e-4
    assert of_head <= 1.5 * theirs[2] + roundings + 1e-4


def reference64(labels):
    def loss(hidden, head):
        logits = head(hidden)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    return loss


class Loss(nn.Module):
    def __init__(self, head, **options):
        super().__init__()
        self.head = head
        self.options = {"chunk_elements": SMALL, **options}

    def forward(self, hidden, targets):
        return cross_entropy(hidden, self.head, targets, **self.options)


OPTIONS = {"z_loss": 0.3, "cap": 0.7, "label_smoothing": 0.2}


@pytest.mark.parametrize("wrapped", [False, True])
def test_gradcheck(wrapped):
    hidden, labels, head = batch(torch.float64)
    module = Loss(Wrapped(head) if wrapped else head, **OPTIONS)
    name = "head.inner.weight" if wrapped else "head.weight"
    targets = next_tokens(labels)[:2, :10]

    def loss(hidden, weight):
        return torch.func.functional_call(module, {name: weight}, (hidden, targets))

    args = (hidden[:2, :10].clone().requires_grad_(), head.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(loss, args, fast_mode=True)


def test_a_second_derivative_is_refused():
    hidden, labels, head = batch()
    hidden.requires_grad_()
    loss = cross_entropy(hidden, head, next_tokens(labels))
    (gradient,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected 'full' for second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_without_graph_breaks(wrapped):
    torch.compiler.reset()
    hidden, labels, head = batch()
    module = Loss(Wrapped(head) if wrapped else head, **OPTIONS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = loss_and_gradients(hidden, head, lambda h, _: compiled(h, next_tokens(labels)))
    in_place = module.head.inner if wrapped else module.head
    of_head, in_place.weight.grad = in_place.weight.grad, None
    expected = loss_and_gradients(hidden, head, lambda h, _: module(h, next_tokens(labels)))
    assert_close(found[:2], expected[:2], rtol=1e-6, atol=1e-6)
    assert_close(of_head, in_place.weight.grad, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns, views of parameters aside."""

    def __init__(self):
        super().__init__()
        self.wide = self.any = 0
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.any = max(self.any, x.numel())
                self.shapes.add(tuple(x.shape))
                if x.dtype in (torch.float32, torch.float64):
                    self.wide = max(self.wide, x.numel())
        return out


@pytest.fixture
def open_operator(monkeypatch):
    """The operator as the function it is, so that what it allocates can be seen."""

    class Open(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, *options):
            total, *ctx.slopes = in_chunks(hidden, weight, *options)
            return total

        @staticmethod
        def backward(ctx, grad):
            return *(x * grad for x in ctx.slopes), *[None] * 8

    monkeypatch.setattr("hybrid.modeling.losses._chunked", lambda *args: [Open.apply(*args)])


@pytest.mark.usefixtures("open_operator")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_logits(dtype, wrapped):
    hidden, labels, head = batch(dtype)
    head = Wrapped(head) if wrapped else head
    assert max(B * T * D, V * D, SMALL) < B * T * V // 5

    def largest(**options):
        with Largest() as seen:
            loss_and_gradients(hidden, head, ours(labels, **options))
        return seen

    found = largest(z_loss=0.1, cap=3.0, chunk_elements=SMALL)
    assert (7, V) in found.shapes
    assert found.any <= max(B * T * D, V * D, SMALL)
    # and the measure does see logits where there are any
    assert largest(backend="full").wide >= B * T * V


@pytest.mark.usefixtures("open_operator")
def test_no_gradient_is_computed_that_nobody_wants():
    hidden, labels, head = batch()
    targets = next_tokens(labels).flatten()
    flat, weight = hidden.reshape(-1, D), head.weight.detach()
    for wanted in ((True, False), (False, True), (False, False)):
        with Largest() as seen:
            _, *slopes = in_chunks(flat, weight, targets, 0.0, 0.1, 1.0, None, 7, *wanted)
        assert [x.numel() > 0 for x in slopes] == list(wanted)
        assert (tuple(flat.shape) in seen.shapes) is wanted[0]
        assert (V in [x[0] for x in seen.shapes if x]) is wanted[1]
    head.requires_grad_(False)
    hidden.requires_grad_()
    cross_entropy(hidden, head, targets, chunk_elements=SMALL).backward()
    found, hidden.grad = hidden.grad, None
    cross_entropy(hidden, head, targets, backend="full").backward()
    assert_close(found, hidden.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["chunked", "full"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_multiplier_and_a_cap_of_the_logits(backend, wrapped):
    hidden, labels, head = batch()
    head = Wrapped(head) if wrapped else head

    def expected(hidden, head):
        logits = 1.5 * torch.tanh(0.3 * head(hidden) / 1.5)
        return ForCausalLMLoss(logits, labels, V)

    found = ours(labels, multiplier=0.3, cap=1.5, backend=backend, chunk_elements=SMALL)
    pairs = zip(
        loss_and_gradients(hidden, head, found),
        loss_and_gradients(hidden, head, expected),
        strict=True,
    )
    for one, other in pairs:
        assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("way", ["chunked", "full", "module", "logits"])
def test_label_smoothing_is_the_cross_entropy_with_a_share_for_every_token(way, z_loss, cap):
    """Targets 1 - e at the label plus e / V everywhere, as probabilities of torch's cross entropy."""
    hidden, labels, head = batch(torch.float64)
    e = 0.2

    def expected(hidden, head):
        logits = transform_logits(head(hidden), cap=cap)[:, :-1][labels[:, 1:] != -100]
        picked = nn.functional.one_hot(labels[:, 1:][labels[:, 1:] != -100], V).double()
        nll = nn.functional.cross_entropy(logits, (1 - e) * picked + e / V, reduction="sum")
        return nll + z_loss * logits.exp().sum(-1).log().square().sum()

    def found(hidden, head):
        targets, options = next_tokens(labels), {"z_loss": z_loss, "label_smoothing": e}
        if way == "logits":
            logits = transform_logits(head(hidden), cap=cap)
            return of_logits(logits, targets, chunk_elements=SMALL, **options)
        backend = "full" if way == "full" else "chunked"
        options |= {"cap": cap, "backend": backend, "chunk_elements": SMALL}
        return cross_entropy(hidden, head, targets, **options)

    wanted = loss_and_gradients(hidden, head, expected)
    head = Wrapped(head) if way == "module" else head
    for one, other in zip(loss_and_gradients(hidden, head, found), wanted, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_nan_where_nothing_is_predicted_reaches_no_loss_and_no_hidden_state():
    hidden, labels, head = batch()
    clean = loss_and_gradients(hidden, head, ours(labels, **OPTIONS))
    assert labels[0, 4] == -100
    hidden[0, 3] = torch.nan  # predicts token 4
    found = loss_and_gradients(hidden, head, ours(labels, **OPTIONS))
    assert_close(found[0], clean[0])
    assert_close(found[1], clean[1])


def test_a_loss_scale_reaches_gradients_that_float16_would_lose():
    """Per token they are 1e-9 here: taken as those of the sum, and scaled with the loss."""
    hidden, labels, head = batch()
    exact = loss_and_gradients(hidden, head, ours(labels, items=10**9))
    found = loss_and_gradients(
        hidden.half(), head.half(), lambda h, m: 2.0**24 * ours(labels, items=10**9)(h, m)
    )
    assert_close(found[1].double() / 2**24, exact[1].double(), rtol=2e-2, atol=1e-11)


def test_loss_of_logits_that_exist():
    hidden, labels, head = batch()
    logits = head(hidden)
    expected = reference(labels)(hidden, head) * (labels[:, 1:] != -100).sum()
    found = of_logits(logits, next_tokens(labels), chunk_elements=SMALL)
    assert_close(found, expected)
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        of_logits(logits[:, -1:], next_tokens(labels))


def test_z_loss_where_the_target_is_unlikely():
    # log Z from the target's own logit and probability would be a difference of 10,000s
    hidden, target = torch.tensor([[1.0, 1e4]]), torch.tensor([1])
    weight = torch.tensor([[0.5, 0.0], [0.0, -1.0], [0.25, 0.0]])
    total, of_hidden, _ = in_chunks(hidden, weight, target, 1.0, 0.0, 1.0, None, 8, True, True)
    log_z = torch.tensor([0.5, 0.25], dtype=torch.float64).logsumexp(0)
    torch.testing.assert_close(total.double(), 1e4 + log_z + log_z.square(), atol=1e-3, rtol=0)
    p = torch.tensor([0.5, 0.25], dtype=torch.float64).softmax(0) * (1 + 2 * log_z)
    wanted = torch.stack([0.5 * p[0] + 0.25 * p[1], torch.ones((), dtype=torch.float64)])
    torch.testing.assert_close(of_hidden[0].double(), wanted, atol=0, rtol=1e-6)


def test_softcap_bounds_and_keeps_small_logits():
    x = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    assert_close(transform_logits(x, cap=30.0), torch.tensor([-30.0, -0.01, 0.0, 0.01, 30.0]))
    assert transform_logits(x) is x
    assert_close(transform_logits(x, 0.5), x / 2)
    assert_close(transform_logits(x, 2.0, 30.0)[1], torch.tensor(-0.02))


def test_liger_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    hidden, labels, head = batch()
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        cross_entropy(hidden, head, next_tokens(labels), backend="liger")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels are Triton's")
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.3}, {"cap": 0.7}])
def test_liger_is_equal_to_transformers(options):
    pytest.importorskip("liger_kernel")
    hidden, labels, head = batch()
    hidden, labels, head = hidden.cuda(), labels.cuda(), head.cuda()
    expected = loss_and_gradients(hidden, head, reference(labels, **options))
    found = loss_and_gradients(hidden, head, ours(labels, backend="liger", **options))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
