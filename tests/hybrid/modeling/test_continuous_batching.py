"""generate_batch of transformers: the tokens of generate for softmax stacks; states are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

PROMPTS = (5, 7, 1)
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)

QUERIES = {"type": "softmax_attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
           "rope_parameters": None, "qk_norm": "head"}  # fmt: skip
# without sizes transformers takes most of the free memory; 8 tokens a step split the prompts
SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=8)


def _prompts(ids):
    return [ids(1, length)[0].tolist() for length in PROMPTS]


def _each_alone(model, prompts):
    rows = [torch.tensor([prompt]) for prompt in prompts]
    generated = [
        model.generate(row, attention_mask=torch.ones_like(row), generation_config=GREEDY)
        for row in rows
    ]
    return [y[0, row.shape[1] :].tolist() for y, row in zip(generated, rows, strict=True)]


def _batched(model, prompts):
    results = model.generate_batch(
        prompts,
        generation_config=GREEDY,
        continuous_batching_config=SMALL,
        progress_bar=False,
    )
    assert not [result.error for result in results.values() if result.error]
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize(
    ("layout", "options", "implementation"),
    [
        ("SS", {"num_heads": 2}, "sdpa"),
        ("SS", {"num_heads": 4, "num_kv_heads": 2}, "sdpa"),
        ("QS", {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}, "sdpa"),
        ("SS", {"num_heads": 4, "num_kv_heads": 2}, "eager"),
        ("SS", {"num_heads": 2, "qk_norm": "head", "nope_every": 2, "temperature": 0.5}, "sdpa"),
    ],
    ids=["heads", "grouped", "two-mixers", "grouped-eager", "nope-temperature"],
)
def test_the_tokens_of_generate(build, ids, layout, options, implementation):
    mixers = {"S": options, "Q": QUERIES} if "Q" in layout else {"S": options}
    model = build(layout=layout, mixers=mixers, pad_token_id=0)
    # random weights at their usual scale repeat one token, whatever the cache holds
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    model.set_attn_implementation(implementation)
    prompts = _prompts(ids)
    want = _each_alone(model, prompts)
    assert len({token for row in want for token in row}) > 3
    for _ in range(3):
        assert _batched(model, prompts) == want


@pytest.mark.parametrize(
    ("layout", "got"),
    [
        ("LS", "the mixers 'L'"),
        ("[LS]S", "the mixers 'L'"),
        ("S-S-", "layers of a feed-forward alone"),
    ],
)
def test_what_the_paged_cache_cannot_hold_is_refused(build, ids, layout, got):
    message = rf"plain softmax attention in every layer, got .*{got}.*try generate\(\)"
    with pytest.raises(ValueError, match=message):
        build(layout=layout).generate_batch(_prompts(ids), generation_config=GREEDY)
