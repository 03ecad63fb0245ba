"""The invariants of the design, for every sample of every registered mixer.

Two layers of the mixer in float64, so that a tolerance of 1e-9 tells a mistake from rounding.
"""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

import hybrid
from hybrid.modeling.cache import HybridCacheLayer

CLOSE = {"rtol": 1e-8, "atol": 1e-9}
TIME = 23


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def continued(model, pieces, **kwargs):
    """Logits of the pieces run one after the other through one cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        outputs = [model(piece, past_key_values=cache, **kwargs).logits for piece in pieces]
    return torch.cat(outputs, dim=1)


def test_gradcheck(stack):
    mixer = stack.model.layers[0].mixer
    width = stack.config.stack.mixers["Q"].sizes.hidden_size
    x = torch.randn(1, 5, width, dtype=torch.float64, requires_grad=True)
    positions = {s: r(x, torch.arange(5)[None]) for s, r in stack.model.rotary.items()}
    masks = {"full_attention": torch.ones(5, 5, dtype=torch.bool).tril()[None, None]}
    direction = torch.randn(5, stack.config.hidden_size, dtype=torch.float64)

    def project(x):
        mask = masks.get(mixer.layer_type)
        y, _ = mixer(x, attention_mask=mask, position_embeddings=positions.get("Q"))
        return (y * direction).sum()

    assert torch.autograd.gradcheck(project, (x,), fast_mode=True)


@pytest.mark.parametrize("at", [0, 1, 11, TIME - 1])
def test_causality_forward_bit_for_bit(stack, ids, at):
    x = ids(2, TIME)
    changed = x.clone()
    changed[:, at] = (changed[:, at] + 1) % stack.config.vocab_size
    before, after = logits(stack, x), logits(stack, changed)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])


def test_causality_of_gradients(stack, ids):
    embeds = stack.model.embed_tokens(ids(1, TIME)).detach().requires_grad_()
    out = stack(inputs_embeds=embeds, use_cache=False).logits
    (grad,) = torch.autograd.grad(out[:, :10].square().sum(), embeds)
    assert grad[:, :10].abs().sum() > 0
    assert torch.count_nonzero(grad[:, 10:]) == 0


@pytest.mark.parametrize("splits", [(22, 1), (1, 22), (7, 1, 1, 9, 5), (1,) * TIME])
def test_any_split_equals_one_pass(stack, ids, splits):
    x = ids(2, TIME)
    assert_close(continued(stack, x.split(splits, dim=1)), logits(stack, x), **CLOSE)


def test_split_with_gradients_equals_one_pass(stack, ids):
    x = ids(1, 12)
    whole = stack(x, use_cache=False).logits.square().sum()
    expected = torch.autograd.grad(whole, list(stack.parameters()))
    cache = DynamicCache(config=stack.config)
    parts = [stack(piece, past_key_values=cache).logits for piece in x.split(5, dim=1)]
    found = torch.autograd.grad(torch.cat(parts, 1).square().sum(), list(stack.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


def packed(rows):
    """Rows of documents -> ids (B, T), position_ids (B, T)."""
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in rows])
    return ids, positions


def test_packed_documents_equal_each_alone(stack, ids):
    tokens = ids(2, TIME)
    rows = [tokens[0].split([5, 1, 17]), tokens[1].split([11, 12])]
    x, positions = packed(rows)
    for use_cache in (False, True):  # the default of a user who does not train
        found = stack(x, position_ids=positions, use_cache=use_cache).logits
        for row, out in zip(rows, found, strict=True):
            alone = torch.cat([stack(doc[None], use_cache=False).logits[0] for doc in row])
            assert_close(out, alone, **CLOSE)


def test_packed_gradients_equal_the_sum_of_each_alone(stack, ids):
    docs = ids(1, TIME)[0].split([4, 13, 6])
    x, positions = packed([docs])
    weights = list(stack.parameters())
    loss = stack(x, position_ids=positions, use_cache=False).logits.square().sum()
    alone = sum(stack(doc[None], use_cache=False).logits.square().sum() for doc in docs)
    found, expected = torch.autograd.grad(loss, weights), torch.autograd.grad(alone, weights)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_packed_documents_cannot_fill_a_given_cache(stack, ids):
    x, positions = packed([ids(1, 9)[0].split([4, 5])])
    with pytest.raises(ValueError, match="packed documents"):
        stack(x, position_ids=positions, past_key_values=DynamicCache(config=stack.config))


def pad(rows, side):
    time = max(map(len, rows))
    x = torch.zeros(len(rows), time, dtype=torch.long)
    mask = torch.zeros_like(x)
    for i, row in enumerate(rows):
        at = slice(time - len(row), time) if side == "left" else slice(0, len(row))
        x[i, at], mask[i, at] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return x, mask, positions


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_alone(stack, ids, side):
    rows = [ids(1, n, seed=n)[0] for n in (TIME, 1, 9)]
    x, mask, positions = pad(rows, side)
    found = logits(stack, x, attention_mask=mask, position_ids=positions)
    for i, row in enumerate(rows):
        assert_close(found[i][mask[i].bool()], logits(stack, row[None])[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_padded_prefill_then_decode_equals_each_alone(stack, ids, side, chunk):
    rows = [ids(1, n, seed=n)[0] for n in (12, 3, 7)]
    tail = ids(3, 4, seed=99)
    x, mask, positions = pad(rows, side)
    cache = DynamicCache(config=stack.config)
    lengths = mask.sum(1, keepdim=True)
    with torch.no_grad():
        for start in range(0, x.shape[1], chunk):
            end = min(start + chunk, x.shape[1])
            stack(
                x[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
        for t in range(tail.shape[1]):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            out = stack(
                tail[:, t : t + 1],
                attention_mask=mask,
                position_ids=lengths + t,
                past_key_values=cache,
            ).logits[:, 0]
            for i, row in enumerate(rows):
                alone = torch.cat([row, tail[i, : t + 1]])[None]
                assert_close(out[i], logits(stack, alone)[0, -1], **CLOSE)


def test_batch_composition_changes_nothing(stack, ids):
    x = ids(4, TIME)
    assert_close(logits(stack, x)[2:3], logits(stack, x[2:3]), **CLOSE)


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 130])
def test_lengths_around_the_chunks(stack, ids, time):
    x = ids(1, time)
    out = logits(stack, x)
    assert out.shape == (1, time, stack.config.vocab_size)
    assert_close(continued(stack, x.split(50, dim=1)), out, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit(
    stack, ids, tmp_path, dtype, assert_same_weights, assert_close_to_rounding
):
    stack = stack.to(dtype)
    stack.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, hybrid.HybridForCausalLM)
    assert again.dtype == dtype
    assert again.config.to_dict() | {"_name_or_path": ""} == stack.config.to_dict() | {
        "_name_or_path": "", "auto_map": again.config.auto_map
    }  # fmt: skip
    x = ids(2, TIME)
    assert_same_weights(again, stack)
    assert_close_to_rounding(logits(again, x), logits(stack, x))


def test_gradient_checkpointing_changes_no_gradient(stack, ids):
    x = ids(2, 10)
    stack.train()
    stack(x, labels=x).loss.backward()
    expected = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    enable = getattr(stack, "activation_checkpointing_enable", stack.gradient_checkpointing_enable)
    enable()
    stack(x, labels=x, use_cache=False).loss.backward()
    for p, grad in zip(stack.parameters(), expected, strict=True):
        assert_close(p.grad, grad, **CLOSE)


@pytest.mark.slow
def test_compiled_without_graph_breaks(stack, ids):
    torch.compiler.reset()  # every mixer compiles the same code objects, whose caches hold few
    torch._dynamo.reset()  # the limit on recompilations counts those of other mixers
    x = ids(2, TIME)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    expected = stack(x, labels=x, use_cache=False)
    found = compiled(x, labels=x, use_cache=False)
    assert_close(found.logits, expected.logits, **CLOSE)
    found.loss.backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_bfloat16_is_finite_and_near_float64(build, mixer_name, mixer_options, ids):
    config = {"layout": "QQ", "mixers": {"Q": {"type": mixer_name, **mixer_options}}}
    config["initializer_range"] = 0.05
    exact, rounded = build(**config), build(dtype=torch.bfloat16, **config)
    rounded.load_state_dict(exact.state_dict())
    x = ids(2, TIME)
    a, b = logits(exact, x), logits(rounded, x).double()
    assert (a - b).square().mean().sqrt() <= 0.05 * a.square().mean().sqrt()


def test_a_cache_holds_what_mixers_declare(stack, ids):
    """By name: shapes of states, and of columns of tokens."""
    time = 11
    cache = stack(ids(1, time), use_cache=True).past_key_values
    for layer, held in zip(stack.model.layers, cache.layers, strict=True):
        mixers = getattr(layer.mixer, "branches", [layer.mixer] if layer.mixer else [])
        tokens = [shapes_of_tokens(mixer, time) for mixer in mixers]
        states = [
            {name: (1, *spec.shape) for name, spec in part.states().items()}
            for part in (*mixers, *layer.canon.values())
        ]
        if not isinstance(held, HybridCacheLayer):
            assert not any(states)
            found = {"k": tuple(held.keys.shape), "v": tuple(held.values.shape)} if mixers else {}
            assert [found] == tokens or not mixers
            continue
        slots = [held.slots[i] for i in sorted(held.slots)]
        assert [
            {name: tuple(columns.tensor.shape) for name, columns in slot.tokens.items()}
            for slot in slots
        ] == tokens + [{}] * len(layer.canon)
        assert [
            {name: tuple(state.shape) for name, state in slot.states.items()} for slot in slots
        ] == states


def shapes_of_tokens(mixer, time):
    return {
        name: (1, spec.heads, time if spec.window is None else min(time, spec.window - 1), spec.dim)
        for name, spec in mixer.tokens().items()
    }
