"""A weight is used only through its module: adapters, offloading and quantization are heeded."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from hybrid.config.registry import feed_forwards

peft = pytest.importorskip("peft")
# PEFT reads it of every model of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


class Opaque(nn.Module):
    """A Linear of another name, whose weight nobody may read."""

    def __init__(self, linear):
        super().__init__()
        self.inner = linear

    @property
    def weight(self):
        raise AssertionError("the weight is read past its module")

    def forward(self, x):
        return self.inner(x)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def prefill_and_decode(model, x):
    with torch.no_grad():
        out = model(x[:, :-2], use_cache=True)
        logits = [out.logits]
        for t in (-2, -1):
            last = x.shape[1] + t
            out = model(x[:, last : last + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def linears(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def hide_weights(model):
    for name, linear in linears(model):
        head, _, last = name.rpartition(".")
        setattr(model.get_submodule(head), last, Opaque(linear))


def check_hidden(model, x):
    want = prefill_and_decode(model, x)
    hide_weights(model)
    with torch.no_grad():
        assert_close(model(x, use_cache=False).logits, want)
    assert_close(prefill_and_decode(model, x), want)


def test_no_weight_is_read_past_its_module(stack, ids):
    check_hidden(stack, ids(2, 9))


@pytest.mark.parametrize("name", feed_forwards.names())
def test_nor_in_a_feed_forward(build, ids, name):
    check_hidden(build(layout="SL", ffn=feed_forwards.get(name).symbol), ids(2, 9))


def test_offloaded(stack, ids):
    x = ids(2, 9)
    want = prefill_and_decode(stack, x)
    offloaded = cpu_offload(stack, execution_device=torch.device("cpu"))
    assert_close(prefill_and_decode(offloaded, x), want)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_every_linear(stack, ids, dora):
    x = ids(2, 9)
    tied = bool(stack.config.shared)
    config = peft.LoraConfig(
        r=2,
        # not the adapters that a depth of shared weights has itself
        target_modules=[f"model.{n}" for n, _ in linears(stack.model) if ".lora_" not in n],
        init_lora_weights=False,
        use_dora=dora,
    )
    model = peft.get_peft_model(stack, config).eval()
    live = prefill_and_decode(model, x)
    with torch.no_grad():
        assert_close(model(x, use_cache=False).logits, live, atol=1e-8, rtol=1e-8)
    if not tied:  # PEFT would merge the adapters of all depths into the one weight
        assert_close(prefill_and_decode(model.merge_and_unload(), x), live, atol=1e-8, rtol=1e-8)


def test_parametrized(stack, ids):
    x, twin = ids(2, 9), copy.deepcopy(stack)
    doubled = set()
    with torch.no_grad():
        for name, linear in linears(stack.model.layers):
            weight = twin.model.layers.get_submodule(name).weight
            if weight.data_ptr() not in doubled:  # layers of shared weights have one
                doubled.add(weight.data_ptr())
                weight.mul_(2)
            parametrize.register_parametrization(linear, "weight", Doubled())
    assert_close(prefill_and_decode(stack, x), prefill_and_decode(twin, x))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantized(stack, ids):
    model = torch.ao.quantization.quantize_dynamic(stack.float(), {nn.Linear}, dtype=torch.qint8)
    assert prefill_and_decode(model, ids(2, 9)).isfinite().all()
