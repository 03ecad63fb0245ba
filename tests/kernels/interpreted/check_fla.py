"""The adapter for flash-linear-attention, on that package's own kernels in triton's interpreter.

Two things of its kernels the interpreter cannot do: an autotuner asks the device, and a loop index
is a Python number there, which has no ``.to``. Both are mended here, for these tests only.
"""

import builtins
import importlib
import sys
import warnings

import pytest
import torch
from triton.runtime.autotuner import Autotuner

from hybrid_kernels import adapters, linear_attention
from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.testing import FORMS, TOLERANCE, assert_agrees, evaluate, relative_rms, sample

with warnings.catch_warnings():
    # It says that it finds no GPU.
    warnings.simplefilter("ignore")
    for name in ("delta_rule", "gated_delta_rule", "gla", "kda", "rwkv6", "simple_gla"):
        importlib.import_module(f"fla.ops.{name}")

# An adapter sees values that have been multiplied, and refuses erase keys.
NAMED = {form.name: form for form in FORMS if not (form.write_scale or form.erase)}
SMALL = {"batch": 1, "time": 20, "key_dim": 16, "value_dim": 16}


class Index(int):
    """A loop index that lets itself be cast."""

    def to(self, dtype):
        """Return it as it is: the interpreter counts in Python numbers."""
        return self


def counted(*bounds):
    """Stand in for ``range`` over numbers of the interpreter."""
    numbers = (x.handle.data.item() if hasattr(x, "handle") else x for x in bounds)
    return (Index(i) for i in builtins.range(*numbers))


def run_first(self, *args, **kwargs):
    """Run an autotuned kernel with the first of its configurations."""
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


@pytest.fixture(autouse=True)
def interpretable(monkeypatch):
    monkeypatch.setattr(Autotuner, "run", run_first)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops") and module is not None:
            monkeypatch.setattr(module, "range", counted, raising=False)


def adapted(output_final_state=True, **inputs):
    """Call the adapter as ``linear_attention`` would."""
    arguments = LinearAttention(**inputs, scale=0.3)
    assert adapters.unsupported(arguments) is None
    return adapters.linear_attention(arguments)


def compare(form, dtype, **sizes):
    inputs = sample(form, dtype=dtype, **{**SMALL, **sizes})
    run = {"backend": "reference", "scale": 0.3}
    expected = evaluate(linear_attention, inputs, dtype=torch.float64, **run)
    assert_agrees(evaluate(adapted, inputs), expected, TOLERANCE[dtype])


def taken(dtype):
    """Return the forms that the adapter takes in a dtype."""
    found = []
    for form in NAMED.values():
        if adapters.unsupported(LinearAttention(**sample(form, dtype=dtype))) is None:
            found.append(form)
    return found


@pytest.mark.parametrize("form", taken(torch.float32), ids=lambda form: form.name)
def test_agrees(form):
    compare(form, torch.float32)


@pytest.mark.parametrize("name", ["additive_scalar", "bonus_vector", "delta_scalar"])
def test_agrees_on_packed_documents(name):
    compare(NAMED[name], torch.float32, lengths=[5, 1, 14])


def test_agrees_in_half_precision():
    compare(NAMED["delta"], torch.float16)


def test_nearly_all_forms_are_taken():
    left_out = set(NAMED) - {form.name for form in taken(torch.float16)}
    assert left_out == {
        "additive_outer",
        "additive_value",
        "additive_scalar_value",
        "bonus",
        "bonus_scalar",
    }


@pytest.mark.parametrize("form", taken(torch.float16), ids=lambda form: form.name)
def test_decode_step(form):
    inputs = sample(form, dtype=torch.float16, **{**SMALL, "time": 1})
    with torch.no_grad():
        found = adapted(**inputs)
        wide = {name: x.double() for name, x in inputs.items()}
        run = {"backend": "reference", "scale": 0.3, "output_final_state": True}
        expected = linear_attention(**wide, **run)
    for x, y in zip(found, expected, strict=True):
        assert relative_rms(x, y) <= TOLERANCE[torch.float16]
