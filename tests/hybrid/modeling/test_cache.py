"""The cache layer of mixers with states and windows, and windows through attention functions by name."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybrid.mixers.attention import capped_attention
from hybrid.modeling.cache import CachePast, HybridCacheLayer

WINDOW = 5
LOCAL = {
    "W": {"num_heads": 4, "num_kv_heads": 2, "window": WINDOW},
    "B": {"num_heads": 4, "num_kv_heads": 2, "chunk_size": WINDOW},
}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def seen(symbol, time):
    """(T, T), which keys a query sees."""
    query, key = torch.arange(time)[:, None], torch.arange(time)
    near = query - key < WINDOW if symbol == "W" else query // WINDOW == key // WINDOW
    return (key <= query) & near


@pytest.mark.parametrize("symbol", ["W", "B"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_of_eager_attention(build, ids, symbol, side):
    """Whole rows and a padded one: weights of the tokens within reach, whose sum is 1."""
    model = build(layout=symbol, mixers=LOCAL, attn_implementation="eager")
    x, mask = ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    short = slice(0, 4) if side == "left" else slice(9, 13)
    mask[1, short] = 0
    (found,) = model(x, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    assert found.shape == (2, 4, 13, 13)
    assert_close(found.sum(-1)[0], torch.ones(4, 13, dtype=found.dtype))
    assert torch.equal(found[0, 0] > 0, seen(symbol, 13))
    real = mask[1].bool()
    assert torch.equal(found[1, 0][real][:, real] > 0, seen(symbol, 9))
    assert torch.count_nonzero(found[1, :, real][:, :, ~real]) == 0


def test_a_function_with_windows_is_handed_the_window(build, ids, monkeypatch):
    """A stand-in for flash attention: columns without a token in a mask, the last W tokens by itself."""
    calls = []

    def windowed(module, q, k, v, mask, *, scaling, sliding_window, dropout=0.0, **kwargs):
        calls.append((tuple(k.shape), None if mask is None else tuple(mask.shape)))
        query = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        key = torch.arange(k.shape[2])
        see = ((key <= query) & (query - key < sliding_window))[None, None]
        if mask is not None:
            see = see & mask[:, None, None]
        return capped_attention(q, k, v, see, scaling=scaling, dropout=dropout)

    name = "flash_of_this_test"
    ALL_ATTENTION_FUNCTIONS.register(name, windowed)
    model = build(layout="WW", mixers=LOCAL)
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(x, **kwargs)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", name)
    assert torch.equal(model.generate(x, **kwargs), expected)
    assert calls[0] == ((2, 2, 9, 8), (2, 9))
    assert calls[-1][0] == (2, 2, WINDOW, 8)
    # none of them has chunks: sdpa takes its place
    calls.clear()
    chunks = build(layout="B", mixers=LOCAL)
    with torch.no_grad():
        expected = chunks(x).logits
        monkeypatch.setattr(chunks.config, "_attn_implementation_internal", name)
        assert_close(chunks(x).logits, expected, **CLOSE)
    assert calls == []


@pytest.mark.parametrize("symbol", ["W", "B"])
def test_two_windows_and_a_window_beside_keys(build, ids, symbol):
    """Windows of unequal sizes in a stack, and beside softmax attention and a recurrence in a layer."""
    mixers = {**LOCAL, "X": {"type": "sliding_window_attention", "num_heads": 2, "window": 3},
              "S": {"num_heads": 2}, "L": {"num_heads": 2}}  # fmt: skip
    model = build(layout=f"X[{symbol}SL][{symbol}X]", mixers=mixers)
    x, cache = ids(2, 17), DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in x.split([6, 1, 7, 3], 1)]
        assert_close(torch.cat(pieces, dim=1), model(x, use_cache=False).logits, **CLOSE)
    held = [[c.tensor.shape[2] for s in layer.slots.values() for c in s.tokens.values()]
            for layer in cache.layers]  # fmt: skip
    assert held == [[2, 2], [4, 4, 17, 17], [4, 4, 2, 2]]


@pytest.mark.parametrize("symbol", ["W", "B"])
def test_memory_is_that_of_the_window(build, ids, symbol, monkeypatch):
    """No mask and no attention call is larger than a block of queries and what is within its reach."""
    sizes = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module, q, k, v, mask, **kwargs):
        sizes.append((q.shape[2], k.shape[2]))
        assert mask is None or mask.numel() <= q.shape[2] * k.shape[2]
        return plain(module, q, k, v, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    model = build(layout=symbol, mixers={symbol: {"num_heads": 2, **SIZE[symbol]}})
    with torch.no_grad():
        model(ids(1, 1000), use_cache=False)
    assert sum(queries for queries, _ in sizes) == 1000
    assert max(keys - queries for queries, keys in sizes) <= 200
    assert max(queries for queries, _ in sizes) <= 200


SIZE = {"W": {"window": 200}, "B": {"chunk_size": 200}}


def test_a_cache_can_be_cut_and_repeated(build, ids):
    """Rows repeated and chosen, states and windows alike."""
    model = build(layout="LW", mixers={**LOCAL, "L": {"num_heads": 2}})
    x, tail = ids(2, 9), ids(2, 3, seed=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(x, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = model(tail, past_key_values=cache).logits
        whole = model(torch.cat([x.flip(0), tail], dim=1), use_cache=False).logits
    assert_close(found, whole[:, 9:], **CLOSE)


def test_a_static_cache_holds_fixed_shapes(build, ids):
    """In the memory that the prefill reserved."""
    model = build(layout="L[SC]W", mixers={**LOCAL, "L": {"num_heads": 2}, "S": {"num_heads": 2}})
    x, cache = ids(2, 12), StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(x[:, :7], past_key_values=cache)
        before = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
        found = [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(7, 12)]
        whole = model(x, use_cache=False).logits
    assert_close(torch.cat(found, dim=1), whole[:, 7:], **CLOSE)
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors()] == before
    assert int(cache.get_seq_length()) == 12


def test_tokens_cropped_beyond_what_is_kept_are_refused():
    layer = HybridCacheLayer()
    for name in "kv":
        layer.append(0, name, torch.zeros(1, 1, 9, 2), window=4)
    with pytest.raises(ValueError, match=r"crop: expected at most 0 tokens, .* got 1"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="expected minus the number of tokens to remove, got 2"):
        layer.crop(2)


def test_padding_takes_no_room_in_a_window():
    layer = HybridCacheLayer()
    new = torch.arange(12.0).view(2, 1, 6, 1)
    layer.append(0, "k", new, window=4, lengths=torch.tensor([5, 2]))
    found = layer.append(0, "k", new + 100, window=4, lengths=torch.tensor([6, 1]))
    assert found[0, 0, :, 0].tolist() == [2, 3, 4, *range(100, 106)]
    assert found[1, 0, 1:4, 0].tolist() == [6, 7, 106]


def test_a_slot_of_a_cache_without_states_says_so(build, ids):
    slot = CachePast(DynamicCache()).slot(0, 0)
    with pytest.raises(ValueError, match="layer 0 of this cache cannot hold a recurrent state"):
        slot.state("recurrent")
