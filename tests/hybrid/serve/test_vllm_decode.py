"""A decode step in vLLM never waits for the device: it runs on tensors without data.

A meta tensor has no values, so ``.item()``, ``.tolist()``, ``.cpu()``, ``bool(...)`` and shapes that
depend on values raise. Run in an environment that has vLLM (docs/serving.md); skipped elsewhere.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hybrid
from hybrid.config.registry import mixers
from hybrid.mixers.attention import CAPPED_FUNCTIONS

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (docs/serving.md)"),
    pytest.mark.filterwarnings("default"),  # vLLM's own
]

NAME, REQUESTS, PAGES = "without_data", 3, 8
REFUSED = {"native_sparse_attention"}


@pytest.fixture(autouse=True)
def attention():
    """An attention function without data in place of vLLM's, which has no kernel for meta tensors."""

    def attend(module, q, k, v, mask, **_):
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    CAPPED_FUNCTIONS.add(NAME)
    yield
    CAPPED_FUNCTIONS.discard(NAME)


@pytest.fixture
def build(monkeypatch):
    """Build the plugin's model on no device, with the metadata of a decode step of three requests."""
    from hybrid.serve.vllm import model as plugin
    from hybrid.serve.vllm.states import StatePages

    def made(dtype=torch.float32, **options):
        config = hybrid.HybridConfig(vocab_size=64, hidden_size=32, **options)
        config._attn_implementation = NAME
        model = plugin.HybridForVllm.__new__(plugin.HybridForVllm)
        nn.Module.__init__(model)
        model.pages = {}
        with torch.device("meta"):
            model.hybrid = hybrid.HybridForCausalLM(config).eval().to(dtype)
            metadata = SimpleNamespace(
                query_start_loc=torch.empty(REQUESTS + 1, dtype=torch.int32),
                seq_lens=torch.empty(REQUESTS, dtype=torch.int32),
                state_indices_tensor=torch.empty(REQUESTS, dtype=torch.int32),
                num_prefills=0,
                num_decodes=REQUESTS,
            )
            vllm = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
            for i, layer in enumerate(model.hybrid.model.layers):
                for j, page in plugin._pages(layer, dtype):
                    pages = StatePages(page, vllm, f"layers.{i}.state_{j}", 0)
                    pages.kv_cache = (torch.empty(PAGES, page.words),)
                    model.pages[i, j] = pages
        by_layer = {pages.prefix: metadata for pages in model.pages.values()}
        context = SimpleNamespace(attn_metadata=by_layer)
        monkeypatch.setattr(plugin, "get_forward_context", lambda: context)
        return model

    return made


@torch.no_grad()
def decode(model):
    """One step; the logits of each request."""
    ids, positions = torch.empty(2, REQUESTS, dtype=torch.int64, device="meta")
    return model.compute_logits(model(ids, positions))


@pytest.mark.parametrize("name", sorted(set(mixers.names()) - REFUSED))
def test_every_mixer(name, build):
    samples = [s for s in mixers.get(name).samples() if "dual_chunk_size" not in s]
    letters = {"QXYZUV"[i]: {"type": name, **options} for i, options in enumerate(samples)}
    assert decode(build(layout="".join(letters), mixers=letters)).shape == (REQUESTS, 64)


def test_feed_forwards_side_by_side_canon_and_shared_weights(build):
    experts = {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}
    model = build(
        dtype=torch.bfloat16,  # what torch's grouped product takes
        layout="[MS]QLQT",
        ffn={"M": "E", "default": "-"},
        feed_forwards={"E": experts},
        canon={"T": "ABCD", "L": "AC", "default": ""},
        mixers={name: {"type": "softmax_attention", "num_heads": 2} for name in "QT"},
        shared={"Q": {"lora_rank": 3, "concat_embeddings": True, "output": "next"}},
    )
    assert decode(model).shape == (REQUESTS, 64)


def test_a_look_at_values_is_an_error(build):
    """What the tests above rely on."""
    model = build(layout="L")
    model.hybrid.model.layers[0].register_forward_hook(lambda _, __, y: y.sum().item())
    with pytest.raises((RuntimeError, NotImplementedError)):
        decode(model)
