import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid.data.collate import RowCollator
from hybrid.data.documents import Documents
from hybrid.data.packing import IGNORE, pack
from hybrid.data.rows import packed_stream

PAD = 99
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def numbered(lengths):
    """Documents whose tokens are all different: token i is i."""
    stops = np.cumsum(lengths)
    return Documents.from_arrays([np.arange(b - n, b) for n, b in zip(lengths, stops, strict=True)])


def spans_of(row):
    """The stretches of a row between restarts of `position_ids`."""
    starts = np.flatnonzero(row["position_ids"] == 0)
    return np.split(row["input_ids"], starts[1:])


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "none"])
@given(lengths=LENGTHS, length=st.integers(1, 16))
def test_every_token_is_laid_out_once_with_its_document(packing, lengths, length):
    documents = numbered(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    total = sum(lengths)
    rows = pack(documents, length, total, packing)
    seen = []
    for i in range(len(rows)):
        row = rows[i]
        assert all(value.shape == (length,) for value in row.values())
        for span in spans_of(row):
            tokens = span[span < total]
            assert len(tokens) in (0, len(span))  # padding never shares a span with text
            assert len(set(owner[tokens])) <= 1  # and no span leaves its document
            assert (np.diff(tokens) == 1).all()
            seen.extend(tokens)
    assert sorted(seen) == list(range(total))


@given(lengths=LENGTHS, length=st.integers(1, 16))
def test_labels_are_the_ids_but_at_the_first_token_of_a_document_and_in_padding(lengths, length):
    rows = pack(numbered(lengths), length, -7)
    for i in range(len(rows)):
        row = rows[i]
        unlabelled = (row["position_ids"] == 0) | (row["input_ids"] == -7)
        expected = np.where(unlabelled, IGNORE, row["input_ids"])
        np.testing.assert_array_equal(row["labels"], expected)


@given(lengths=LENGTHS, length=st.integers(1, 16))
def test_concatenated_rows_are_full_but_for_the_last(lengths, length):
    rows = pack(numbered(lengths), length, -7)
    assert len(rows) == -(-sum(lengths) // length)
    for i in range(len(rows) - 1):
        assert -7 not in rows[i]["input_ids"]


def test_a_long_document_is_cut_only_where_a_row_ends():
    rows = pack(numbered([3, 10]), 4, PAD)
    assert [r.tolist() for i in range(len(rows)) for r in spans_of(rows[i])] == [
        [0, 1, 2],
        [3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12],
        [PAD, PAD, PAD],
    ]


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_best_fit_splits_nothing_that_fits_and_leaves_no_two_rows_that_would_be_one(lengths):
    rows = pack(numbered(lengths), 16, -7, "best_fit")
    spans = [s for i in range(len(rows)) for s in spans_of(rows[i]) if s[0] != -7]
    assert sorted(map(len, spans)) == sorted(lengths)
    full = sorted((rows[i]["input_ids"] != -7).sum() for i in range(len(rows)))
    assert sum(full[:2]) > 16 or len(rows) == 1


def test_best_fit_fills_the_fullest_row_that_has_room():
    rows = pack(numbered([5, 7, 3, 1]), 8, PAD, "best_fit")
    laid = [[len(s) for s in spans_of(rows[i]) if s[0] != PAD] for i in range(len(rows))]
    assert laid == [[7, 1], [5, 3]]


def test_long_documents_truncated_or_refused():
    rows = pack(numbered([6, 2]), 4, PAD, "none", "truncate")
    assert [rows[i]["input_ids"].tolist() for i in range(2)] == [[0, 1, 2, 3], [6, 7, PAD, PAD]]
    with pytest.raises(ValueError, match=r"no document above sequence_length 4 .*got 1 of 2 .*'sp"):
        pack(numbered([6, 2]), 4, PAD, "none", "refuse")


@given(lengths=LENGTHS, length=st.integers(1, 16))
def test_a_stream_packs_as_documents_at_hand_do(lengths, length):
    documents = numbered(lengths)
    at_hand = pack(documents, length, PAD)
    arrays = np.split(documents.tokens, documents.offsets[1:-1])
    for i, row in enumerate(packed_stream(arrays, length, PAD)):
        for key, value in at_hand[i].items():
            np.testing.assert_array_equal(row[key], value)


@given(lengths=LENGTHS, length=st.integers(1, 16), packing=st.sampled_from(["best_fit", "none"]))
def test_a_stream_that_fits_the_window_is_packed_as_a_whole(lengths, length, packing):
    documents = numbered(lengths)
    at_hand = pack(documents, length, PAD, packing)
    arrays = np.split(documents.tokens, documents.offsets[1:-1])
    streamed = list(packed_stream(arrays, length, PAD, packing))
    assert len(streamed) == len(at_hand)
    for i, row in enumerate(streamed):
        for key, value in at_hand[i].items():
            np.testing.assert_array_equal(row[key], value)


def test_best_fit_packing_of_a_stream_goes_on_with_the_next_window(monkeypatch):
    monkeypatch.setattr("hybrid.data.rows.WINDOW", 2)
    arrays = [np.full(size, size) for size in (3, 1, 2, 2)]
    rows = [row["input_ids"].tolist() for row in packed_stream(arrays, 4, PAD, "best_fit")]
    assert rows == [[3, 3, 3, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "none"])
def test_long_documents_of_a_stream(packing):
    arrays = [np.arange(2), np.arange(6)]
    (first, *_) = packed_stream(arrays[1:], 4, PAD, packing, "truncate")
    assert first["input_ids"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"document 1 of the stream with 6 tokens.*'truncate'"):
        list(packed_stream(arrays, 4, PAD, packing, "refuse"))


def test_a_batch_without_boundaries_carries_no_positions():
    whole = [pack(numbered([8]), 4, PAD)[i] for i in range(2)]
    assert set(RowCollator()(whole)) == {"input_ids", "labels"}
    packed = [pack(numbered([3, 5]), 4, PAD)[i] for i in range(2)]
    assert set(RowCollator()(packed)) == {"input_ids", "labels", "position_ids"}


def llama():
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("layout", ["LLLS", "SLN", "llama"])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_the_packed_loss_is_the_loss_of_the_documents_alone(build, layout, packing):
    model = llama() if layout == "llama" else build(layout=layout)
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 61, n) for n in (5, 11, 1, 16, 7, 9, 2)]
    rows = pack(Documents.from_arrays(texts), 16, 0, packing)
    batch = RowCollator()([rows[i] for i in range(len(rows))])
    packed = model(**batch, num_items_in_batch=1, use_cache=False).loss
    spans = [s for i in range(len(rows)) for s in np.split(*_labelled(rows[i]))]
    alone = sum(
        model(input_ids=ids, labels=ids, num_items_in_batch=1).loss
        for ids in (torch.from_numpy(s)[None] for s in spans if len(s) > 1)
    )
    torch.testing.assert_close(packed, alone)


def _labelled(row):
    """A row's ids without its padding, and where to cut them."""
    labelled = np.flatnonzero(row["labels"] != IGNORE)
    stop = labelled[-1] + 1 if len(labelled) else 0
    return row["input_ids"][:stop], np.flatnonzero(row["position_ids"][:stop] == 0)[1:]
