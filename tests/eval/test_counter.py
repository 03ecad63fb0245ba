"""Token counts by pieces: exact with tokenizers of every make, or not taken at all."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hybrid_eval.corpus import stdlib_documents
from hybrid_eval.text import tasks
from hybrid_eval.text.counter import Counter, parts_at_spaces
from hybrid_eval.text.tasks import samples
from hybrid_eval.tokens import ByteEncoder, prompt_ids

TEXT = [document.text[:40_000] for document in stdlib_documents()[:4]]


def trained(backend, trainer, **options):
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        backend,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
        eos_token="</s>",
    )


def metaspace():
    """As SentencePiece has it: a space put in front of the text, pieces of a unigram model."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return trained(
        backend,
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
        unk_token="<unk>",
    )


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(
        backend,
        trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=["<s>", "<unk>"], show_progress=False
        ),
        unk_token="<unk>",
    )


def closed():
    """The byte-level one, which puts a special token at both ends."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def across_spaces():
    """Pieces that reach over spaces: nothing is split before they are learnt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return trained(
        backend,
        trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], show_progress=False),
    )


def random_text(rng):
    """Words, numbers and code, parted by all kinds of white space."""
    words = rng.choice(TEXT).split()
    words += ["na\u00efve", "\u4f60\u597d", "\u201cquoted\u201d", "x\n\n\ny", "1234567.\nOne", "\t"]
    parts = [rng.choice(words) + rng.choice([" ", " ", " ", "  ", "\n", " \n ", "\u00a0"])]
    parts += [rng.choice(words) + rng.choice([" "] * 9 + ["  ", "\n"]) for _ in range(200)]
    return "".join(parts) + rng.choice(["end", "end.", "is ", "\n"])


@pytest.mark.parametrize("make", [byte_level, closed, metaspace, word_piece])
def test_the_sum_of_the_pieces_is_the_count_of_the_whole(make):
    tokenizer = make()
    assert parts_at_spaces(tokenizer)
    counter, rng = Counter(tokenizer), random.Random(0)
    for _ in range(60):
        text = random_text(rng)
        assert counter.text(text) == len(prompt_ids(tokenizer, text))
        places = [i for i in rng.sample(range(len(text)), 9) if text[i].isascii() and text[i] > " "]
        encoded = tokenizer(text)
        assert counter.positions(text, places) == tuple(encoded.char_to_token(i) for i in places)
    assert counter.by_pieces
    assert not counter.disagreed
    assert len(counter._pieces) > 100


def test_a_text_with_an_added_token_is_counted_whole():
    tokenizer = byte_level()
    counter = Counter(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    counter = Counter(tokenizer)
    for text in ("a <tool> b c", "<tool> a b c", "a b<tool>c d", "a b c </s> d"):
        assert counter.text(text) == len(tokenizer(text)["input_ids"])
    assert not counter.disagreed


def test_what_reaches_across_spaces_is_counted_whole():
    tokenizer = across_spaces()
    assert not parts_at_spaces(tokenizer)
    assert not Counter(tokenizer).by_pieces
    assert not Counter(ByteEncoder()).by_pieces


def test_a_wrong_sum_is_found_and_everything_is_counted_again(monkeypatch):
    tokenizer = byte_level()
    wanted = samples("niah_grid", tokenizer=tokenizer, lengths=[900], depths=[0, 1], n=2)
    monkeypatch.setattr(Counter, "_measure", lambda self, pieces: [len(piece) for piece in pieces])
    made = []

    def counter(*arguments, **options):
        made.append(Counter(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(tasks, "Counter", counter)
    assert samples("niah_grid", tokenizer=tokenizer, lengths=[900], depths=[0, 1], n=2) == wanted
    assert [c.disagreed for c in made] == [True, False]


def test_padding_left_on_by_an_earlier_call_is_not_counted():
    tokenizer = byte_level()
    tokenizer.pad_token = "</s>"
    text = "some words that stand behind each other and are counted"
    counter = Counter(tokenizer)
    tokenizer(["a", "b"], padding="max_length", max_length=50, truncation=True)
    assert counter.count(text) == len(byte_level()(text)["input_ids"])
    tokenizer(["a", "b"], padding="max_length", max_length=50, truncation=True)
    assert counter.text(text) == len(byte_level()(text)["input_ids"])
