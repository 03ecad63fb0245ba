"""Generation through transformers: every road to the same tokens gives the same tokens.

Float64 throughout, so that two roads never part over a rounding error in a near tie.
"""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from hybrid.nn.arguments import CACHE

MIXERS = {
    "S": {"num_heads": 2, "num_kv_heads": 1},
    "L": {"num_heads": 2},
    "N": {"num_heads": 2},
    "C": {"type": "lightning_attention", "num_heads": 2, "conv_size": 3},
    "D": {"type": "softmax_attention", "num_heads": 2, "conv_size": 4},
    "B": {"num_heads": 2, "chunk_size": 4},
    "V": {"num_heads": 2, "block_size": 2, "block_stride": 1, "select_size": 2, "window": 3,
          "num_selected": 2, "num_local": 1},
    "Q": {"type": "softmax_attention", "num_heads": 2, "dual_chunk_size": 4, "temperature": 0.5,
          "temperature_length": 3},
}  # fmt: skip
pytestmark = pytest.mark.compat
LAYOUTS = ["SS", "LL", "LLLS", "NS", "[LS]2", "C-D-", "[CS]", "[CD]L", "BVQ"]
NEW = 12


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def model(build, layout):
    return make(build, layout)


def make(build, layout, **config):
    return build(
        layout=layout,
        mixers=MIXERS,
        feed_forwards={"-": {"intermediate_size": 24}},
        pad_token_id=0,
        **config,
    )


def generate(model, prompt, **kwargs):
    """Greedy tokens after the prompt, all NEW of them."""
    kwargs = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, **kwargs}
    mask = kwargs.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, **kwargs)[:, prompt.shape[1] :]


def by_hand(model, prompt):
    """Greedy tokens without a cache: the whole text again for every token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def padded(rows, side):
    """Rows of unequal length -> ids and mask (B, T)."""
    time = max(map(len, rows))
    ids = torch.zeros(len(rows), time, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(time - len(row), time) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_whole_text_again(model, ids, use_cache):
    prompt = ids(2, 9)
    expected = by_hand(model, prompt)
    assert len(set(expected.flatten().tolist())) > 3  # a constant answer would prove nothing
    assert torch.equal(generate(model, prompt, use_cache=use_cache), expected)


def test_a_prompt_of_one_token(model, ids):
    prompt = ids(2, 1)
    assert torch.equal(generate(model, prompt), by_hand(model, prompt))


def test_beam_search_with_and_without_cache(model, ids):
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    prompt = ids(2, 9)
    cached = generate(model, prompt, use_cache=True, **beams)
    assert torch.equal(cached, generate(model, prompt, use_cache=False, **beams))
    assert len({tuple(row) for row in cached.tolist()}) == 6


def test_sampling_is_reproducible_and_the_cache_does_not_matter(model, ids):
    prompt = ids(3, 5)

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return generate(model, prompt, do_sample=True, top_k=20, temperature=0.8, **kwargs)

    first = sample(1)
    assert torch.equal(first, sample(1))
    assert torch.equal(first, sample(1, use_cache=False))
    assert not torch.equal(first, sample(2))


def test_left_padded_batch_generates_what_each_row_does_alone(model, ids):
    rows = [ids(1, n, seed=n)[0] for n in (11, 1, 6)]
    prompt, mask = padded(rows, "left")
    together = generate(model, prompt, attention_mask=mask)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(out[None], generate(model, row[None]))


def test_left_padded_beams_and_chunks(model, ids):
    """Padding, beams that change places, and a prefill in pieces, all at once."""
    rows = [ids(1, n, seed=n)[0] for n in (10, 3)]
    prompt, mask = padded(rows, "left")
    together = generate(model, prompt, attention_mask=mask, num_beams=3, prefill_chunk_size=4)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(out[None], generate(model, row[None], num_beams=3))


def test_right_padded_logits_equal_each_row_alone(model, ids):
    rows = [ids(1, n, seed=n)[0] for n in (11, 1, 6)]
    x, mask = padded(rows, "right")
    with torch.no_grad():
        found = model(x, attention_mask=mask).logits
        for row, out in zip(rows, found, strict=True):
            alone = model(row[None]).logits[0]
            assert_close(out[: len(row)], alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_chunked_prefill_changes_nothing(model, ids, chunk):
    prompt = ids(2, 9)
    chunked = generate(model, prompt, prefill_chunk_size=chunk)
    assert torch.equal(chunked, generate(model, prompt))


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_other_caches_change_nothing(model, ids, implementation):
    prompt, mask = padded([ids(1, n, seed=n)[0] for n in (9, 4)], "left")
    kwargs = {"attention_mask": mask, "cache_implementation": implementation}
    found = generate(model, prompt, disable_compile=True, **kwargs)
    assert torch.equal(found, generate(model, prompt, attention_mask=mask))


LATENT = {"type": "multi_head_latent_attention", "num_heads": 2, "latent_dim": 12, "head_dim": 6,
          "rope_dim": 4}  # fmt: skip


@pytest.mark.parametrize(
    "mixers",
    [
        {"Q": LATENT, "S": LATENT},
        {"Q": LATENT, "S": {"num_heads": 2}},
        {
            "Q": {"type": "softmax_attention", "num_heads": 4},
            "S": {"num_heads": 4, "num_kv_heads": 2},
        },
        {"Q": {"num_heads": 2, "type": "lightning_attention"}, "S": {"num_heads": 2}},
    ],
    ids=["latent", "latent-softmax", "unequal heads", "one shape"],
)
def test_a_static_cache_filled_in_chunks_has_the_shape_of_each_layer(build, ids, mixers):
    """transformers creates all keys and values before the first chunk, by one shape."""
    model, prompt = build(layout="QS", mixers=mixers, pad_token_id=0), ids(2, 9)
    static = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4}
    assert torch.equal(generate(model, prompt, **static), by_hand(model, prompt))


def test_a_static_cache_is_filled_in_place(model, ids):
    prompt = ids(2, 9)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        return_dict_in_generate=True,
    )
    assert isinstance(out.past_key_values, StaticCache)
    assert len(out.past_key_values.layers) == len(model.config.layers)


@pytest.mark.parametrize("pieces", [[9], [7, 1, 1], [4, 5]])
def test_a_full_static_cache_is_refused(model, layout, ids, pieces):
    cache, places = (
        StaticCache(config=model.config, max_cache_len=8),
        ids(2, 9).split(pieces, dim=1),
    )
    with torch.no_grad():
        for piece in places[:-1]:
            model(piece, past_key_values=cache)
        if layout == "LL":
            model(places[-1], past_key_values=cache)  # states have no limit
            return
        with pytest.raises(ValueError, match=r"cache: expected at most 8 tokens .* try a larger"):
            model(places[-1], past_key_values=cache)


def test_generation_goes_on_from_a_returned_cache(model, ids):
    prompt = ids(2, 9)
    kwargs = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    mask = torch.ones_like(prompt)
    first = model.generate(prompt, attention_mask=mask, max_new_tokens=5, **kwargs)
    rest = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        **{CACHE: first.past_key_values},
        max_new_tokens=NEW - 5,
        **kwargs,
    )
    assert torch.equal(rest.sequences[:, 9:], generate(model, prompt))


def test_a_cache_can_be_copied_and_forked(model, ids):
    """One prompt, two continuations: the second must not see what the first has written."""
    prompt, tails = ids(1, 9), ids(2, 3, seed=5)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        for tail in tails:
            fork = copy.deepcopy(cache)
            found = model(tail[None], past_key_values=fork).logits
            expected = model(torch.cat([prompt, tail[None]], dim=1)).logits[:, 9:]
            assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_from_embeddings(model, ids):
    prompt = ids(2, 9)
    embeds = model.get_input_embeddings()(prompt)
    found = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(found, generate(model, prompt))


def test_prompt_lookup_equals_greedy(model, ids):
    """A prompt that repeats itself, so that some guesses are taken and some are not."""
    prompt = ids(1, 6).repeat(1, 3)
    found = generate(model, prompt, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(found, generate(model, prompt))


@pytest.mark.parametrize("assistant_seed", [0, 1])
def test_assisted_decoding_equals_greedy(build, model, layout, ids, assistant_seed):
    """The model as its own assistant (every guess is right), and a stranger (hardly any is)."""
    assistant = make(build, layout, seed=assistant_seed)
    assistant.generation_config.num_assistant_tokens = 3
    prompt = ids(1, 9)
    found = generate(model, prompt, assistant_model=assistant)
    assert torch.equal(found, generate(model, prompt))


def test_logits_to_keep(model, ids):
    x = ids(2, 9)
    with torch.no_grad():
        every = model(x).logits
        for keep in (1, 4):
            found = model(x, logits_to_keep=keep).logits
            assert_close(found, every[:, -keep:], rtol=1e-12, atol=1e-12)
        picked = torch.tensor([0, 3, 8])
        found = model(x, logits_to_keep=picked).logits
        assert_close(found, every[:, picked], rtol=1e-12, atol=1e-12)


def test_eos_ends_a_row_and_pads_it(model, ids):
    prompt = ids(2, 9)
    free = generate(model, prompt)
    eos = int(free[0, 3])
    first = free[0].tolist().index(eos)
    out = generate(model, prompt, eos_token_id=eos)
    assert torch.equal(out[0, : first + 1], free[0, : first + 1])
    assert (out[0, first + 1 :] == 0).all()


def recording(model):
    """A cache of which tokens can be taken back."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def test_tokens_taken_back_leave_no_trace(stack, ids):
    """For every mixer: crops within one forward, across several, two in a row, and of nothing."""
    x, wrong = ids(1, 20), ids(1, 20, seed=1)
    with torch.no_grad():
        expected = stack(x, use_cache=False).logits
        cache, done = recording(stack), 0
        for pieces, crops in [
            ((7,), [3]),
            ((1, 1, 4), [5]),
            ((3, 2), [1, 2]),
            ((2,), [0]),
            ((), []),
        ]:
            for piece in pieces:
                stack(wrong[:, :piece], past_key_values=cache)
            for crop in crops:
                cache.crop(-crop)
            # whatever was kept of the wrong tokens must go too
            if kept := sum(pieces) - sum(crops):
                cache.crop(-kept)
            out = stack(x[:, done : done + 4], past_key_values=cache).logits
            assert_close(out, expected[:, done : done + 4], rtol=1e-8, atol=1e-9)
            done += 4


def test_taking_back_more_than_was_recorded_is_refused(model, layout, ids):
    if layout == "SS":
        pytest.skip("keys and values can be dropped however many there are")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(1, 5), past_key_values=cache)
        cache.activate_past_recording()
        model(ids(1, 3), past_key_values=cache)
        with pytest.raises(ValueError, match="expected at most 3 tokens"):
            cache.crop(-4)


def test_padding_is_recorded_too(model, ids):
    row = ids(1, 6)[0]
    x, mask = padded([row], "left")
    x, mask = (torch.nn.functional.pad(y, (3, 0)) for y in (x, mask))
    cache = recording(model)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(x, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.crop(-2)
        mask = torch.nn.functional.pad(mask[:, :-2], (0, 3), value=1)
        tail = ids(1, 3, seed=4)
        positions = torch.arange(4, 7)[None]
        out = model(tail, attention_mask=mask, position_ids=positions, past_key_values=cache)
        alone = model(torch.cat([row[None, :4], tail], dim=1)).logits[:, 4:]
    assert_close(out.logits, alone, rtol=1e-8, atol=1e-9)


def test_a_mixer_that_does_not_record_says_so(model, layout, ids, monkeypatch):
    if layout in ("SS", "BVQ"):
        pytest.skip("no state to record: keys and values of all tokens, or of the last")
    monkeypatch.setattr("hybrid.modeling.cache.CacheSlot.begin", lambda *args: None)
    with pytest.raises(ValueError, match="expected a mixer that records its inputs"):
        model(ids(1, 3), past_key_values=recording(model))
