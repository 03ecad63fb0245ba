"""Parts of one tensor: their gradients are those of any parts, and are not copied together."""

from itertools import permutations

import pytest
import torch

import hybrid_kernels
from hybrid_kernels import fused_qkv_grad, linear_attention
from hybrid_kernels.testing import FORMS, assert_agrees, sample

EVEN = [form for form in FORMS if len(set(form.heads)) == 1]
HEADS, SIZE = 2, 8


@pytest.fixture
def rejoined(monkeypatch):
    """Whether each gradient was found in one piece."""
    found = []
    original = fused_qkv_grad._rejoined

    def spy(*arguments):
        whole = original(*arguments)
        found.append(whole is not None)
        return whole

    monkeypatch.setattr(fused_qkv_grad, "_rejoined", spy)
    return found


def by_head(cut, rows):
    """(B, T, H * 3 * K) -> q, k, v: those of a head lie side by side."""
    return cut(rows.unflatten(-1, (HEADS, -1)), [SIZE] * 3, -1)


def by_part(cut, rows):
    """(B, T, 3 * H * K) -> v, q and k, which lie there in this order."""
    v, q, k = (x.unflatten(-1, (HEADS, -1)) for x in cut(rows, [HEADS * SIZE] * 3, -1))
    return q, k, v


def gradients(cut, layout, inputs, rows, constants):
    """Those of the rows and of all other inputs but the constants."""
    rows = rows.clone().requires_grad_()
    rest = {
        name: x.clone().requires_grad_(x.is_floating_point() and name not in constants)
        for name, x in inputs.items()
        if name not in "qkv"
    }
    o, state = linear_attention(
        **dict(zip("qkv", layout(cut, rows), strict=True)), **rest, output_final_state=True
    )
    wanted = {name: x for name, x in (rest | {"rows": rows}).items() if x.requires_grad}
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    loss = (o * weights).sum() + state.to(o.dtype).square().sum()
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@pytest.mark.parametrize("form", EVEN, ids=lambda form: form.name)
@pytest.mark.parametrize("layout", [by_head, by_part])
@pytest.mark.parametrize("constant", [False, True], ids=["all", "constant_decay"])
@pytest.mark.parametrize(("time", "lengths"), [(128, None), (70, None), (70, [40, 0, 30])])
def test_gradients_are_the_same_bits(form, layout, constant, time, lengths, rejoined):
    inputs = sample(form, time=time, lengths=lengths, key_dim=SIZE, value_dim=SIZE)
    batch, heads = inputs["q"].shape[0], inputs["q"].shape[2]
    assert heads == HEADS
    # Keys short enough for the delta rule.
    rows = torch.randn(batch, time, 3 * HEADS * SIZE) / 4
    constants = ("log_decay", "value_log_decay") if constant else ()
    expected = gradients(torch.split, layout, inputs, rows, constants)
    found = gradients(hybrid_kernels.split, layout, inputs, rows, constants)
    assert rejoined == [True]
    assert_agrees(found, expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes(dtype, rejoined):
    inputs = sample(EVEN[0], time=70, key_dim=SIZE, value_dim=SIZE)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    rows = torch.randn(inputs["q"].shape[0], 70, 3 * HEADS * SIZE, dtype=dtype)
    expected = gradients(torch.split, by_head, inputs, rows, ())
    found = gradients(hybrid_kernels.split, by_head, inputs, rows, ())
    assert rejoined == [True]
    assert_agrees(found, expected, 0.0)


def test_keys_and_values_of_unlike_size(rejoined):
    sizes, rows = [12, 12, 20], torch.randn(2, 50, 3, 44, requires_grad=True)
    parts = hybrid_kernels.split(rows, sizes)
    found = torch.autograd.grad(linear_attention(*parts)[0].square().sum(), rows)[0]
    parts = rows.split(sizes, -1)
    expected = torch.autograd.grad(linear_attention(*parts)[0].square().sum(), rows)[0]
    assert rejoined == [True]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_use_of_the_parts(dim, rejoined):
    """One of them is not used at all, one is changed on its way."""
    x = torch.randn(6, 6, 6, dtype=torch.float64, requires_grad=True)

    def loss(cut):
        a, b, _ = cut(x, [1, 2, 3], dim)
        return a.sum() * b.square().sum()

    found, expected = (
        torch.autograd.grad(loss(cut), x)[0] for cut in (hybrid_kernels.split, torch.split)
    )
    assert torch.equal(found, expected)
    assert rejoined == [False]


@pytest.mark.parametrize("order", list(permutations("qkv")), ids="".join)
def test_parts_in_any_order(order, rejoined):
    rows = torch.randn(2, 70, HEADS, 3 * SIZE, requires_grad=True)

    def gradient(cut):
        parts = dict(zip(order, cut(rows, [SIZE] * 3, -1), strict=True))
        return torch.autograd.grad(linear_attention(**parts)[0].square().sum(), rows)[0]

    found, expected = (gradient(cut) for cut in (hybrid_kernels.split, torch.split))
    assert rejoined == [True]
    assert torch.equal(found, expected)


def test_gradients_that_share_memory_with_others():
    """Those of ``torch.cat`` are views of one tensor, which is the gradient of ``b`` as well."""
    a, b = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    weights = torch.randn(4, 6)
    for _ in range(2):
        joined = (torch.cat(hybrid_kernels.split(x, [2, 4]), dim=-1) for x in (a, b))
        (sum(joined) * weights).sum().backward()
    assert torch.equal(a.grad, 2 * weights)
    assert torch.equal(b.grad, 2 * weights)


def test_a_gradient_from_outside_stays_as_it_is():
    x, given = torch.randn(4, 6, requires_grad=True), torch.ones(4, 6)
    for _ in range(2):
        torch.cat(hybrid_kernels.split(x, [2, 4]), dim=-1).backward(given)
    assert torch.equal(given, torch.ones(4, 6))


def test_conjugate_gradients():
    x = torch.randn(4, 6, dtype=torch.complex64, requires_grad=True)
    weights = torch.randn(4, 6, dtype=torch.complex64)

    def gradient(cut):
        a, b = cut(x, [2, 4], -1)
        return torch.autograd.grad(torch.cat([a.conj(), b], dim=-1), x, weights)[0]

    found, expected = (gradient(cut) for cut in (hybrid_kernels.split, torch.split))
    assert torch.equal(found, expected)


def test_only_one_of_the_parts_is_wanted():
    """Then its gradient keeps no memory for the others."""
    q, k, v = torch.randn(1, 40, HEADS, 3 * SIZE).split(SIZE, dim=-1)
    q.requires_grad_()
    found = torch.autograd.grad(linear_attention(q, k, v)[0].square().sum(), q)[0]
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def through_split(x):
    return torch.cat(hybrid_kernels.split(x, [2, 4]), dim=-1) ** 3


def test_many_gradients_at_once():
    x = torch.randn(6, requires_grad=True)
    y = through_split(x)
    found = torch.autograd.grad(y, x, torch.eye(6), is_grads_batched=True)[0]
    assert torch.equal(found, torch.diag(3 * x.detach() ** 2))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_function_transforms():
    x = torch.randn(3, 6, dtype=torch.float64)
    by_row = torch.func.vmap(torch.func.grad(lambda row: through_split(row).sum()))(x)
    torch.testing.assert_close(by_row, 3 * x**2)
    second = torch.func.hessian(lambda row: through_split(row).sum())(x[0])
    torch.testing.assert_close(second, torch.diag(6 * x[0]))


def test_a_second_derivative():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def function(x):
        a, b = hybrid_kernels.split(x, [2, 4])
        return a.exp().sum() * b.square()

    assert torch.autograd.gradgradcheck(function, x)


def test_sizes_that_do_not_add_up():
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        hybrid_kernels.split(torch.randn(2, 6, requires_grad=True), [2, 3])


def test_compiles_without_a_graph_break():
    rows = torch.randn(1, 40, HEADS, 3 * SIZE, requires_grad=True)

    def function(rows):
        return linear_attention(*hybrid_kernels.split(rows, [SIZE] * 3))[0].square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(rows), rows)[0] for f in (compiled, function))
    assert torch.equal(found, expected)


BUFFER = torch.zeros(2, 9, 3, 10)


@pytest.mark.parametrize(
    "tensors",
    [
        BUFFER.split([2, 3, 4, 1], -1)[:3],
        (BUFFER, BUFFER, BUFFER),
        BUFFER.mT.contiguous().mT.split([3, 3, 4], -1),
        BUFFER[:, ::2].split([3, 3, 4], -1),
        BUFFER.transpose(0, 1).split([3, 3, 4], -1),
        [x.clone() for x in BUFFER.split([3, 3, 4], -1)],
        BUFFER[:, :1].split([3, 3, 4], -1),
        BUFFER[:, :, :1].expand(2, 9, 3, 10).split([3, 3, 4], -1),
    ],
    ids=["gap", "same", "turned", "sparse", "by_time", "apart", "one_token", "expanded"],
)
def test_tensors_that_do_not_fill_rows(tensors):
    assert fused_qkv_grad.places(*tensors) is None


def test_what_places_say():
    tensors = BUFFER.split([3, 5, 2], -1)
    found = fused_qkv_grad.places(*tensors)
    assert found.row == 30
    for x, part in zip(tensors, found.cut(BUFFER.flatten(2)), strict=True):
        assert (part.data_ptr(), part.shape, part.stride()) == (x.data_ptr(), x.shape, x.stride())
