"""Documents in rows, however they are named, with padding beside them; and masks that do not fit."""

import pytest
import torch
from torch.testing import assert_close
from transformers import StaticCache

from hybrid_kernels.chunked.chunk_plan import ChunkPlan

ROW = {
    # documents of 5 and 4 tokens, and 3 columns of padding
    "right": ([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2], [1] * 9 + [0] * 3, slice(0, 5), slice(5, 9)),
    "left": ([0, 0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3], [0] * 3 + [1] * 9, slice(3, 8), slice(8, 12)),
    "between": ([0, 1, 2, 3, 4, 1, 1, 1, 0, 1, 2, 3], [1] * 5 + [0] * 3 + [1] * 4,
                slice(0, 5), slice(8, 12)),
}  # fmt: skip

BOUNDARIES = {
    "empty document": {"cu_seq_lens_q": [0, 5, 5, 9, 9]},
    "both boundaries": {
        "cu_seq_lens_q": [0, 5, 9],
        "cu_seq_lens_k": [0, 5, 9],
        "max_length_q": 5,
    },
    "numbers": {"seq_idx": [[0] * 5 + [1] * 4]},
    "numbers and positions": {
        "seq_idx": [[0] * 5 + [1] * 4],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 3]],
    },
}


@pytest.mark.parametrize(
    ("side", "named"),
    [
        pytest.param(side, named, marks=[pytest.mark.slow] * ((side, named) != ("right", "both")))
        for side in ROW
        for named in ("positions and mask", "numbers", "both")
    ],
)
def test_packed_and_padded(stack, ids, side, named):
    positions, mask, first, second = ROW[side]
    row = ids(2, 12)
    positions, mask = torch.tensor([positions] * 2), torch.tensor([mask] * 2)
    numbers = mask.clone()
    numbers[:, second] = 2
    given = {
        "positions and mask": {"position_ids": positions, "attention_mask": mask},
        "numbers": {"attention_mask": numbers},
        "both": {"position_ids": positions, "attention_mask": numbers},
    }[named]
    with torch.no_grad():
        logits = stack(row, use_cache=False, **given).logits
        for document in (first, second):
            alone = stack(row[:, document], use_cache=False).logits
            assert_close(logits[:, document], alone, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(given, id=name, marks=[pytest.mark.slow] * (name != "empty document"))
        for name, given in BOUNDARIES.items()
    ],
)
def test_boundaries(stack, ids, given):
    row = ids(1, 9)
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    with torch.no_grad():
        logits = stack(row, use_cache=False, **given).logits
        for document in (slice(0, 5), slice(5, 9)):
            alone = stack(row[:, document], use_cache=False).logits
            assert_close(logits[:, document], alone, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": [0, 5, 12], "seq_idx": [[0] * 4 + [1] * 8]}, "different documents"),
        ({"cu_seq_lens_q": [0, 5, 12], "position_ids": [list(range(12))]}, "different documents"),
        ({"cu_seq_lens_q": [0, 5, 11]}, "from 0 to the 12 tokens"),
        ({"cu_seq_lens_q": [0, 7, 5, 12]}, "expected ascending"),
        ({"seq_idx": [[0] * 11]}, "seq_idx: expected"),
        ({"position_ids": [list(range(11))]}, "position_ids: expected"),
        ({"attention_mask": [[1] * 11]}, "attention_mask: expected"),
        ({"attention_mask": [[1] * 13]}, "attention_mask: expected"),
        ({"attention_mask": [[1] * 12] * 2}, "attention_mask: expected"),
        ({"attention_mask": [[[1] * 12]]}, "attention_mask: expected"),
        ({"attention_mask": [[0.0] * 11 + [-1e9]]}, "floating-point"),
    ],
)
@pytest.mark.parametrize("layout", ["LL", "SS", "LS"])
def test_what_does_not_fit(build, ids, layout, given, message):
    model = build(layout=layout)
    given = {k: torch.tensor(v) for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        model(ids(1, 12), use_cache=False, **given)


@pytest.mark.parametrize(
    "options", [{}, {"sinks": True}, {"soft_cap": 3.0}, {"dual_chunk_size": 4}], ids=str
)
def test_a_static_cache_filled_without_a_mask(build, ids, options):
    model = build(layout="SS", mixers={"S": {"num_heads": 2, **options}})
    x = ids(2, 7)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        want = model(x, use_cache=False).logits
        assert_close(model(x[:, :4], past_key_values=cache).logits, want[:, :4])
        assert_close(model(x[:, 4:], past_key_values=cache).logits, want[:, 4:])


@pytest.mark.parametrize("mixer", ["gated_delta_net", "mamba2", "mamba"])
def test_boundaries_are_read_and_planned_once_for_all_layers(build, ids, mixer, monkeypatch):
    """Four layers cost as many plans, and as many reads of offsets, as one; so does a backward."""
    counts = {"plans": 0, "reads": 0}
    pack, tolist = ChunkPlan._pack, torch.Tensor.tolist

    def counted_pack(*args):
        counts["plans"] += 1
        return pack(*args)

    def counted_tolist(*args):
        counts["reads"] += 1
        return tolist(*args)

    monkeypatch.setattr(ChunkPlan, "_pack", counted_pack)
    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 2)
    found = {}
    for layers in (1, 4):
        model = build(torch.float32, layout="Q" * layers, mixers={"Q": {"type": mixer}})
        for row in (ids(2, 9), ids(2, 9, seed=1)):
            counts.update(plans=0, reads=0)
            model(row, position_ids=positions, use_cache=False, labels=row).loss.backward()
        found[layers] = dict(counts)
    assert found[4] == found[1]
    assert found[1]["reads"] == 1
    assert 1 <= found[1]["plans"] <= 2
