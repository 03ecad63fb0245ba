"""Fertility, continued words and premiums of tokenizers by hand; what a vocabulary costs by the plan."""

import csv
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hybrid
from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.data.tokenizer_report import default_texts, measure, read_texts, vocabulary_costs
from hybrid.plan import plan
from hybrid.tokenizer import byte_tokenizer


def word_pieces(*pieces):
    vocabulary = {"[UNK]": 0} | {piece: i for i, piece in enumerate(pieces, 1)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_fertility_and_continued_words():
    tokenizer = word_pieces("a", "long", "##er", "##est", "word")
    one, two = measure("t", tokenizer, {"en": "a longer word", "de": "longest  longer\nword a"})
    assert (one.tokens, one.fertility, one.continued) == (4, 4 / 3, 1 / 3)
    assert (two.tokens, two.fertility, two.continued) == (6, 6 / 4, 2 / 4)
    assert (one.premium, two.premium) == (1, 6 / 4)
    assert one.bytes_per_token == len("a longer word") / 4
    assert one.vocabulary == 6


def test_white_space_is_not_a_piece_of_a_word():
    """With bytes a token is a letter, and every word of more than one letter is continued."""
    (row,) = measure("bytes", byte_tokenizer(), {"en": "a bc def"})
    assert (row.tokens, row.fertility, row.continued) == (8, 8 / 3, 2 / 3)
    (row,) = measure("bytes", byte_tokenizer(), {"de": "ä b"})
    assert (row.tokens, row.continued) == (4, 1 / 2)  # ä has two bytes


def test_languages_without_white_space_have_no_words():
    texts = default_texts()
    found = {row.language: row for row in measure("bytes", byte_tokenizer(), texts)}
    assert found.keys() == texts.keys()
    for language, row in found.items():
        assert (row.fertility is None) == (language in ("zh", "ja"))
        assert row.tokens == len(texts[language].encode())
    assert next(iter(texts)) == "en"
    assert found["hi"].premium == len(texts["hi"].encode()) / len(texts["en"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_cost_of_a_vocabulary_is_that_of_the_model(tied):
    sizes = {"small": 300, "large": 5000}
    options = {"layout": "LS", "hidden_size": 32, "tie_word_embeddings": tied}
    config = hybrid.HybridConfig(vocab_size=100, **options)
    for cost in vocabulary_costs(sizes, config):
        whole = plan(hybrid.HybridConfig(vocab_size=cost.vocabulary, **options), 1)
        assert cost.parameters == whole.embedding_parameters
        assert cost.share == pytest.approx(whole.embedding_parameters / whole.parameters)
        assert cost.head_flops == 2 * cost.vocabulary * 32


def test_reports_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "en.txt").write_text("some words of text")
    (tmp_path / "m.yaml").write_text("layout: LS\nhidden_size: 32\nvocab_size: 100\n")
    words = ["tokenizer", "bytes", "--text", "en=en.txt", "--model", "m.yaml"]
    for name in ("r.md", "r.csv", "r.json"):
        assert main([*words, "--out", name]) == 0
    assert "fertility" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    values = json.loads((tmp_path / "r.json").read_text())
    assert float(row["fertility"]) == values["texts"][0]["fertility"] == 18 / 4
    assert values["vocabularies"][0]["vocabulary"] == 259
    assert "| bytes | en | 18 |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["en"], "--text: expected LANGUAGE=FILE, got 'en'"),
        (["en=nothing.txt"], "--text: expected a UTF-8 file, got 'nothing.txt'"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        read_texts(words)


def test_another_format_is_refused_first(capsys):
    assert main(["tokenizer", "bytes", "--out", "r.pdf"]) == 2
    assert "--out: expected a file in .md, .csv, .json, got 'r.pdf'" in capsys.readouterr().err
