"""Cached results: served for the very same measurement and for no other."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid_eval import Settings, evaluate, load, stored
from hybrid_eval.identity import model_digest, path_digest, tokenizer_digest
from hybrid_eval.tokens import ByteEncoder

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
QUICK = Settings(lengths=(32,), limit=2)


def llama(seed=0, **config):
    torch.manual_seed(seed)
    options = {"vocab_size": 256, "num_hidden_layers": 2, **SMALL, **config}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def headline(spec, out, **arguments):
    arguments = {"settings": QUICK, "tokenizer": "bytes", **arguments}
    result = evaluate(spec, ["heldout"], out=out, **arguments)["models"][0]["results"]["heldout"]
    return result["loss"]


def permuted(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    return model


def swapped(model):
    """Two layers exchanged: the same tensors under other names."""
    model.model.layers[0].mlp, model.model.layers[1].mlp = (
        model.model.layers[1].mlp,
        model.model.layers[0].mlp,
    )
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: llama(seed=1),
        lambda: permuted(llama()),
        lambda: swapped(llama()),
        lambda: llama(rope_theta=20.0),
        lambda: llama(rms_norm_eps=0.3),
        lambda: llama().to(torch.bfloat16),
    ],
    ids=["weights", "permuted", "swapped", "rope", "eps", "dtype"],
)
def test_another_model_object_is_measured(tmp_path, other):
    first = headline(llama(), tmp_path)
    assert headline(llama(), tmp_path) == first
    assert headline(other(), tmp_path) == headline(other(), None) != first


def test_a_subject_that_was_trained_since_it_was_loaded_is_measured_again(tmp_path):
    subject = load(llama(), tokenizer="bytes")
    first = headline(subject, tmp_path)
    permuted(subject.model)
    assert headline(subject, tmp_path) != first


def test_weights_replaced_with_their_time_stamp_are_measured(tmp_path):
    place = tmp_path / "m"
    llama(0).save_pretrained(place)
    first = headline(place, tmp_path / "out")
    file = place / "model.safetensors"
    before = file.stat()
    llama(1).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / file.name, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert headline(place, tmp_path / "out") == headline(place, None) != first


def test_the_same_checkpoint_elsewhere_and_renamed_files_are_the_same_model(tmp_path):
    llama().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    digests = {model_digest(load(tmp_path / name).model) for name in "ab"}
    assert len(digests) == 1


def test_another_tokenizer_in_the_same_place_is_measured(lm_checkpoint, tmp_path):
    first = headline(lm_checkpoint, tmp_path, tokenizer=None)
    assert headline(lm_checkpoint, tmp_path, tokenizer=None) == first
    path = Path(lm_checkpoint) / "tokenizer.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"normalizer": {"type": "Lowercase"}}))
    changed = headline(lm_checkpoint, tmp_path, tokenizer=None)
    assert changed == headline(lm_checkpoint, None, tokenizer=None) != first


def test_data_of_a_task_changed_in_place_are_measured(tmp_path):
    questions = tmp_path / "questions.jsonl"

    def accuracy(answer):
        item = {"question": "Which?", "choices": ["a", "b"], "answer": answer}
        questions.write_text(json.dumps(item))
        os.utime(questions, ns=(0, 0))
        results = evaluate(
            llama(),
            ["mmlu_cloze"],
            out=tmp_path / "out",
            tokenizer="bytes",
            options={"mmlu_cloze": {"path": str(questions), "shots": 0}},
        )
        return results["models"][0]["results"]["mmlu_cloze"]["accuracy"]

    assert sorted([accuracy(0), accuracy(1)]) == [0.0, 1.0]


def test_documents_cut_elsewhere_are_other_data(tmp_path):
    from hybrid_eval.corpus import Corpus, Document

    def loss(*texts):
        documents = tuple(Document(str(i), text) for i, text in enumerate(texts))
        settings = Settings(lengths=(32,), limit=2, corpus=Corpus(documents, "mine"))
        return headline(llama(), tmp_path, settings=settings)

    text = "the quick brown fox jumps over the lazy dog and runs on " * 12
    assert loss(text) != loss(text[:311], text[312:])


class Doubled(ByteEncoder):
    """An encoder with a state of its own."""

    def __init__(self, times):
        self.times = times


def test_an_encoder_of_ones_own_is_told_by_its_state():
    assert tokenizer_digest(Doubled(1)) == tokenizer_digest(Doubled(1))
    assert tokenizer_digest(Doubled(1)) != tokenizer_digest(Doubled(2))
    with pytest.raises(ValueError, match="Doubled: cannot be pickled"):
        tokenizer_digest(Doubled(lambda: 1))


def test_names_in_a_folder_belong_to_its_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    before = path_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert path_digest(tmp_path) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"[]",
        lambda data: b'{"task": "heldout"}',
        lambda data: b"\xff\xfe",
        lambda data: data.replace(b'"n": 2', b'"n": 3'),
        lambda data: b"[" * 100_000,
    ],
    ids=["half", "empty", "list", "another object", "not text", "a digit", "deep"],
)
def test_a_damaged_result_is_one_line_that_names_the_file(tmp_path, damage):
    headline(llama(), tmp_path)
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged cached result") as caught:
        headline(llama(), tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_results_come_back_as_they_were(tmp_path):
    result = {"task": "t", "items": [0.1, None, 1e-300], "words": "\u00e9 [b]"}
    path = stored.place(tmp_path, "a/b [c]", "f" * 32, "x/y", {"k": 1})
    stored.write(path, result)
    assert stored.read(path) == result
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]


def test_hashes_cover_every_bit():
    model = llama()
    before = model_digest(model)
    values = model.model.norm.weight.detach().numpy().view(np.uint32)
    values[7] ^= 1
    assert model_digest(model) != before
    values[7] ^= 1
    assert model_digest(model) == before
