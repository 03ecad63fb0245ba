"""Parts of one tensor: their gradients are those of any parts, and are not copied together."""

import pytest
import torch

import hybrid_kernels
from hybrid_kernels import joint, linear_attention
from hybrid_kernels.testing import FORMS, assert_agrees, sample

EVEN = [form for form in FORMS if len(set(form.heads)) == 1]
HEADS, SIZE = 2, 8


@pytest.fixture
def rejoined(monkeypatch):
    """Whether each gradient was found in one piece."""
    found = []
    original = joint._rejoined

    def spy(*arguments):
        whole = original(*arguments)
        found.append(whole is not None)
        return whole

    monkeypatch.setattr(joint, "_rejoined", spy)
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
    assert joint.places(*tensors) is None


def test_what_places_say():
    tensors = BUFFER.split([3, 5, 2], -1)
    found = joint.places(*tensors)
    assert found.row == 30
    for x, part in zip(tensors, found.cut(BUFFER.flatten(2)), strict=True):
        assert (part.data_ptr(), part.shape, part.stride()) == (x.data_ptr(), x.shape, x.stride())
