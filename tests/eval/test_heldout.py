import math
import zlib

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybrid_eval.corpus import Corpus, Document, load_corpus, stdlib_documents
from hybrid_eval.heldout import evaluate_heldout, windows
from hybrid_eval.tokens import ByteEncoder

TEXT = "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor quer \u00fcber den gro\u00dfen Sylter Deich " * 20


@pytest.fixture
def word_tokenizer():
    pieces = sorted({*TEXT.split(), "[UNK]"})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def one(text):
    return Corpus((Document("d", text),), "one document")


def test_a_uniform_model_needs_eight_bits_per_byte(rule_model):
    result = evaluate_heldout(rule_model(lambda ids: None), corpus=one(TEXT), length=50)
    assert result["bits_per_byte"] == pytest.approx(8)
    assert result["loss"] == pytest.approx(math.log(256))


def test_bits_per_byte_do_not_depend_on_the_tokenizer_of_a_uniform_guesser(
    rule_model, word_tokenizer
):
    # windows of 11 words, 10 scored: each window's bytes run from the end of its first word to
    # the end of its last, counted here by hand
    result = evaluate_heldout(
        rule_model(lambda ids: None, vocab_size=16),
        corpus=one(TEXT),
        tokenizer=word_tokenizer,
        length=11,
        n=None,
    )
    words = TEXT.split()
    count = (len(words) - 1) // 10
    scored_bytes = sum(len((" " + w).encode("utf-8")) for w in words[1 : 10 * count + 1])
    assert result["bytes_scored"] == scored_bytes
    assert result["bits_per_byte"] == pytest.approx(10 * count * math.log2(16) / scored_bytes)


def test_every_token_but_the_first_is_scored_once():
    text = bytes(range(65, 91)).decode() * 3
    cut = windows(one(text), ByteEncoder(), 12)
    scored = b"".join(bytes(window.ids[1:].tolist()) for window in cut)
    assert scored == text.encode()[1 : 1 + 11 * len(cut)]
    assert len(text) - 1 - len(scored) < 11


def test_position_buckets_cover_the_window(rule_model):
    # a model that knows the text once it has seen 20 bytes
    def late(ids):
        return (ids[-1] + 1) if len(ids) > 20 else None

    text = "".join(chr(32 + i % 64) for i in range(4000)).replace("_", "_")
    result = evaluate_heldout(rule_model(late), corpus=one(text), length=41, buckets=2)
    first, last = result["positions"]
    assert (first["first"], first["last"], last["first"], last["last"]) == (1, 20, 21, 40)
    assert first["loss"] == pytest.approx(math.log(256))
    assert last["loss"] < 0.5


def test_the_split_of_the_standard_library_is_the_published_rule():
    held, rest = stdlib_documents("heldout"), stdlib_documents("train")
    assert all(zlib.crc32(d.name.encode()) % 20 == 0 for d in held)
    assert all(zlib.crc32(d.name.encode()) % 20 != 0 for d in rest)
    assert {d.name for d in held} | {d.name for d in rest} == {
        d.name for d in stdlib_documents("all")
    }
    assert [d.name for d in rest] == sorted(d.name for d in rest)
    assert not any("site-packages" in d.name or d.name.startswith("test/") for d in held + rest)


def test_the_users_own_text(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.jsonl").write_text('{"text": "world"}\n')
    assert load_corpus(tmp_path).text == "hello\nworld"
    (tmp_path / "bad.jsonl").write_text('{"body": "world"}\n')
    with pytest.raises(ValueError, match=r'bad.jsonl, line 1: expected an object with .*"text"'):
        load_corpus(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="no such text file"):
        load_corpus(tmp_path / "absent.txt")


def test_a_text_shorter_than_a_window_is_named(tiny_llama):
    with pytest.raises(ValueError, match="no document of one document fills a window of 64"):
        evaluate_heldout(tiny_llama, corpus=one("short"), length=64)
