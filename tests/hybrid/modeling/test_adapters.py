"""PEFT's methods on every mixer, on experts, on the head and on MTP modules; weights on disk."""

import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hybrid.config import registry

peft = pytest.importorskip("peft")
# PEFT reads it of every model of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

METHODS = {
    "lora": lambda **where: peft.LoraConfig(r=2, init_lora_weights=False, **where),
    "dora": lambda **where: peft.LoraConfig(r=2, init_lora_weights=False, use_dora=True, **where),
    "ia3": lambda **where: peft.IA3Config(init_ia3_weights=False, feedforward_modules=[], **where),
    "adalora": lambda **where: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, init_lora_weights=False, **where
    ),
    "vera": lambda **where: peft.VeraConfig(r=4, init_weights=False, **where),
}


@pytest.fixture
def zoo(build):
    """One layer of each registered mixer, and experts in the last."""
    names = registry.mixers.names()
    letters = dict(zip(string.ascii_uppercase.replace("E", ""), names, strict=False))
    mixers = {s: {"type": n, **registry.mixers.get(n).samples()[0]} for s, n in letters.items()}
    layout = "".join(letters)
    small = {"-": {"intermediate_size": 16}, "E": {"num_experts": 4, "intermediate_size": 16}}

    def make():
        model = build(layout=f"{'-'.join(layout)}E", mixers=mixers, feed_forwards=small)
        for parameter in model.parameters():
            if not parameter.any():  # what starts at zero would hide what is before it
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


def linears(model, below="model."):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(below)]


def decode(model, x, steps=2):
    """Logits of a prefill and of single tokens behind it."""
    with torch.no_grad():
        out = model(input_ids=x[:, :-steps], use_cache=True)
        logits = [out.logits]
        for t in range(x.shape[1] - steps, x.shape[1]):
            past = {"past_key_values": out.past_key_values}
            out = model(input_ids=x[:, t : t + 1], **past)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def whole(model, x):
    with torch.no_grad():
        return model(input_ids=x, use_cache=False).logits


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[pytest.mark.slow] * (m not in ("ia3", "vera")))
        for m in sorted(METHODS)
    ],
)
def test_every_method_on_every_mixer(zoo, ids, method, tmp_path):
    """Heeded in prefill and decode alike, trained, saved and loaded, and merged."""
    base, x = zoo(), ids(2, 7)
    plain = whole(base, x)
    targets = linears(base)
    if method == "vera":  # its shared matrices are of the widest layer
        targets = [n for n in targets if n.endswith("o_proj")]
    torch.manual_seed(0)
    model = peft.get_peft_model(base, METHODS[method](target_modules=targets)).double().eval()
    adapted = whole(model, x)
    assert (adapted - plain).abs().max() > 1e-3
    assert_close(decode(model, x), adapted, rtol=1e-6, atol=1e-6)
    model.train()
    model(input_ids=x, labels=x).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum()]
    assert not idle
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(zoo(), tmp_path).double().eval()
    assert_close(whole(again, x), adapted, rtol=1e-6, atol=1e-6)
    assert_close(whole(again.merge_and_unload(), x), adapted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "batched_mm"])
def test_lora_on_experts(build, ids, backend):
    """Stacked weights of experts are parameters, which PEFT adapts by name."""
    model, x = build(layout="LS", ffn="E", feed_forwards={"E": {"num_experts": 4}}), ids(2, 7)
    model.set_experts_implementation(backend)
    plain = whole(model, x)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=names, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).double().eval()
    adapted = whole(model, x)
    assert (adapted - plain).abs().max() > 1e-3
    assert_close(decode(model, x), adapted, rtol=1e-6, atol=1e-6)
    assert_close(whole(model.merge_and_unload(), x), adapted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("backend", ["chunked", "full"])
def test_an_adapter_on_the_head(build, ids, method, backend):
    """The loss of hidden states, which may not read the weight of the head, is that of the logits."""
    options = {"tie_word_embeddings": False, "logits_multiplier": 0.5, "loss_backend": backend}
    model, x = build(layout="LS", **options), ids(2, 7)
    model = peft.get_peft_model(model, METHODS[method](target_modules=["lm_head"])).double()
    loss = model.train()(input_ids=x, labels=x).loss
    logits = model.eval()(input_ids=x).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert_close(loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad(y, parameters) for y in (loss, expected))
    assert_close(got, want)


def test_adapters_on_mtp_modules(build, ids):
    """They get gradients from the loss of the modules, and drafts do not change what is generated."""
    model, x = build(layout="LS", num_mtp_layers=1, mtp_layout="S"), ids(1, 7)
    names = linears(model, "mtp.")
    model = peft.get_peft_model(model, METHODS["lora"](target_modules=names)).double()
    model.train()(input_ids=x, labels=x).loss.backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 2 * len(names) > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.eval()
    plain = model.generate(input_ids=x, **greedy)
    assert torch.equal(model.generate(input_ids=x, use_mtp=True, **greedy), plain)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
@pytest.mark.parametrize("layout", ["LS", "MS", "[MS]L"])
def test_layers_on_disk(build, ids, tmp_path, layout):
    """A device map with `disk`: logits, decoding, generation, and the checkpoint written again."""
    model, x = build(layout=layout, ffn="E", tie_word_embeddings=False), ids(2, 7)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "disk", "model.rotary": "cpu", "lm_head": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    assert any(p.is_meta for p in offloaded.parameters())
    assert_close(whole(offloaded, x), whole(model, x))
    assert_close(decode(offloaded, x), decode(model, x))
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(offloaded.generate(x, **greedy), model.generate(x, **greedy))
    offloaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(Path(f) / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
