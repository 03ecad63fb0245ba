import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hybrid.config.options import ConfigError
from hybrid.data.documents import encode
from hybrid.tokenizer import byte_tokenizer, is_byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@given(TEXT)
def test_any_text_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", "  a  .  ' n't", "a\r\n\tb", "\x00\x7f", "caf\u00e9 \U0001f600"]
)
def test_texts_that_tokenizers_like_to_tidy(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_special_tokens_follow_the_bytes():
    ids = (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert ids == (256, 257, 258)
    assert len(TOKENIZER) == 259


def test_a_special_token_written_in_a_text_is_its_bytes_when_split():
    text = "x<|eos|>y"
    assert TOKENIZER(text)["input_ids"][1] == 258
    ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_a_checkpoint_loads_it_without_our_code(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert not type(loaded).__module__.startswith("hybrid")
    assert is_byte_tokenizer(loaded)
    assert loaded("na\u00efve")["input_ids"] == list("na\u00efve".encode())


@given(st.lists(TEXT, max_size=5))
def test_the_short_cut_for_bytes_gives_the_tokenizer_s_ids(texts):
    fast = [ids.tolist() for ids in encode(texts, TOKENIZER)]
    slow = [TOKENIZER(t, split_special_tokens=True)["input_ids"] + [258] for t in texts]
    assert fast == slow


def test_another_tokenizer_goes_through_its_own_encoding(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["def "])
    assert not is_byte_tokenizer(other)
    (ids,) = encode(["def f"], other)
    np.testing.assert_array_equal(ids, [259, ord("f"), 258])


@pytest.mark.parametrize("name", ["byte", "bytse", "Bytes", "bites"])
def test_bytes_misspelt_is_named_and_no_hub_is_asked(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", asked.append)
    with pytest.raises(ConfigError, match=f"unknown tokenizer '{name}', did you mean 'bytes'"):
        load_tokenizer(name)
    assert asked == []
    (tmp_path / name).mkdir()
    load_tokenizer(name)
    for other in ("gpt2", "byt5", "me/bytes"):
        load_tokenizer(other)
    assert asked == [name, "gpt2", "byt5", "me/bytes"]


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"tokenizer: expected 'bytes', a folder with a tokenizer, .* got '.*nowhere'",
    ):
        load_tokenizer(str(tmp_path / "nowhere"))
