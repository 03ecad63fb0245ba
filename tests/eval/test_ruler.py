"""RULER's definitions, in words: each sample is read, not compared with our own generator."""

import json
import re
from collections import Counter as Tally
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hybrid_eval import Settings, evaluate, load, write_report
from hybrid_eval.cli import main
from hybrid_eval.registry import TASKS
from hybrid_eval.text.counter import Counter
from hybrid_eval.text.evaluate import evaluate_text, forced_row
from hybrid_eval.text.matching import string_match
from hybrid_eval.text.tasks import Material, maker, samples
from hybrid_eval.tokens import ByteEncoder, continuation_ids

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def one(name, length=4096, index=0, material=None):
    make = maker(name, material or Material(), Counter(ByteEncoder()))
    return make(length=length, index=index, seed=0)


@pytest.mark.parametrize("index", range(3))
def test_variable_tracking(index):
    made = one("long_vt", 6000, index)
    example, question = re.findall(
        r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\n\n"
        r"(.*?)\nQuestion: Find all variables that are assigned the value (\d+) in the text above\.",
        made.prompt,
        re.S,
    )
    for body, value, letters in ((*example, 3), (*question, 5)):
        lines = body.split("\n")
        statements = [line for line in lines if line != NOISE]
        # on lines of their own, at least one sentence between two
        places = [i for i, line in enumerate(lines) if line != NOISE]
        assert all(b - a > 1 for a, b in pairwise(places))
        assert statements[0].startswith("VAR ")
        assert statements[0].endswith(f" = {value}")
        chain = [
            re.fullmatch(r"VAR ([A-Z]+) = (?:VAR )?(\w+) ?", line).groups() for line in statements
        ]
        assert [name for name, _ in chain[:-1]] == [source for _, source in chain[1:]]
        assert {len(name) for name, _ in chain} == {letters}
        assert len(chain) == 5
    assert example[0].split("\n").count(NOISE) == 14
    value = question[1]
    assert made.text.endswith(
        ". Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are: "
    )
    # the example, solved in the order of its chain, and one empty line
    shown = re.findall(r"VAR (\w+) =", example[0])
    assert f"they are:  {' '.join(shown)}\n\nMemorize" in made.prompt
    assert made.max_new_tokens == 30
    # a prefix with its space: the answer begins without one
    assert made.answer == ", ".join(made.outputs)


def test_frequent_words_have_rulers_vocabulary():
    made = one("long_fwe", 6000)
    body = made.prompt[made.prompt.index("coded words. ") + 13 : made.prompt.rindex("\nQuestion")]
    counted = Tally(body.split())
    size = (6000 - 50) // 50
    total = made.details["words"]
    seen = sum(int(total * rank**-2.0 / 1.6449340668482264) > 0 for rank in range(1, size + 1))
    assert len(counted) == seen
    assert (made.max_new_tokens, len(made.outputs), made.match) == (50, 3, "all")


def test_common_words_need_a_list_that_fills_the_length(tmp_path):
    with pytest.raises(ValueError, match=r"cwe at length 4194304: .* do not fill it.*option words"):
        one("long_cwe", 2**22)
    words = tmp_path / "english_words.json"
    words.write_text(json.dumps({i: f"word{i:05d}" for i in range(20_000)}))
    made = one("long_cwe", 2**19, material=Material(words=str(words)))
    assert made.slack < made.filler_tokens
    assert all(re.fullmatch(r"word\d{5}", word) for word in made.outputs)


def articles(tmp_path):
    data = [
        {
            "paragraphs": [
                {
                    "context": f"Article {a} paragraph {p}. " + "Some words. " * 6,
                    "qas": [
                        {
                            "question": f"Which is {a}.{p}?",
                            "answers": [{"text": f"paragraph {p}"}],
                            "is_impossible": False,
                        }
                    ],
                }
                for p in range(5)
            ]
        }
        for a in range(40)
    ]
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"data": data}))
    return Material(squad=str(path))


@pytest.mark.parametrize("index", range(4))
def test_distractors_of_squad_are_of_the_same_article_first(tmp_path, index):
    material = articles(tmp_path)
    for length, kept in ((800, None), (3000, 5)):
        made = one("ruler_qa_1", length, index, material)
        article = re.search(r"Which is (\d+)\.(\d+)\?", made.prompt)[1]
        found = re.findall(r"Document \d+:\nArticle (\d+) paragraph", made.prompt)
        if kept is None:
            assert set(found) == {article}
            assert 1 < len(found) < 5
        else:
            assert found.count(article) == kept < len(found)
        assert made.match == "any"


def test_answers_are_matched_behind_control_characters():
    assert string_match(["ab"], " a\x07b AB\x00", "all") == 1.0
    assert string_match(["a b"], "a\x07b", "all") == 0.0


class Writer(torch.nn.Module):
    """Writes the same words behind every prompt."""

    def __init__(self, words):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.words, self.asked = list(words.encode()), []
        self.config = type("Config", (), {"vocab_size": 256, "max_position_embeddings": None})()

    def generate(self, ids, *, max_new_tokens, **options):
        self.asked.append(max_new_tokens)
        return torch.cat([ids, torch.tensor([self.words[:max_new_tokens]])], dim=1)


def test_rulers_tasks_are_scored_by_what_a_model_writes():
    made = samples("long_niah_multivalue", tokenizer=ByteEncoder(), lengths=[2048], n=1)
    # two of the four, in another order and with other words between them
    model = Writer(f" {made[0].outputs[3]} and then {made[0].outputs[1]}.")
    result = evaluate_text(
        model, task="long_niah_multivalue", tokenizer=ByteEncoder(), lengths=[2048], n=1
    )
    assert (result["mode"], result["accuracy"], model.asked) == ("generate", 0.5, [128])


def test_no_name_of_ours_is_a_task_of_lm_evals():
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager()
    assert not set(TASKS) & {*manager.all_tasks, *manager.all_tags}


def test_a_forced_figure_is_named_so(tiny_llama, tmp_path):
    subject = load(tiny_llama, name="tiny", tokenizer="bytes")
    results = evaluate(
        subject,
        ["niah_grid", "cost"],
        settings=Settings(lengths=(512,), depths=(0.5,), limit=2),
    )
    html = write_report(results, tmp_path).read_text()
    assert "niah_grid (forced): accuracy" in html
    assert "niah_grid: accuracy" not in html
    assert "n = 2, forced" in html


@pytest.fixture
def prepending():
    """A tokenizer whose normaliser puts a mark before every text, as Llama 2's does."""
    marks = [f"<{i}>" for i in range(4)]
    vocabulary = {token: i for i, token in enumerate([*marks, *map(chr, range(32, 127)), "\u2581"])}
    vocabulary["\u2581x"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "x")]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_no_stray_piece_before_an_answer(prepending):
    ids, start = continuation_ids(prepending, "say:", " x1")
    tokens = prepending.convert_ids_to_tokens(ids)
    assert tokens == ["\u2581", "s", "a", "y", ":", "\u2581x", "1"]
    assert start == 5
    # no space in between: what follows is scored as it stands there
    ids, start = continuation_ids(prepending, "say:", "7")
    assert prepending.convert_ids_to_tokens(ids)[start:] == ["7"]


def test_spaces_at_the_end_of_a_context_belong_to_the_answer(prepending):
    joined = continuation_ids(prepending, "say: ", "x1")
    assert joined == continuation_ids(prepending, "say:", " x1")


def test_a_token_across_the_seam_is_scored():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert continuation_ids(tokenizer, "ab", "c") == ([0, 3], 1)


def test_a_forced_row_is_one_text(prepending):
    made = samples("niah_grid", tokenizer=prepending, lengths=[1024], depths=[0.5], n=1)[0]
    row = forced_row(made, prepending)
    whole = prepending(made.text + made.answer)["input_ids"]
    assert row["input_ids"].tolist() == whole
    scored = [int(i) for i in row["labels"] if i != -100]
    assert prepending.decode(scored).strip() == made.outputs[0]


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chatty():
    backend = Tokenizer(models.BPE(vocab={chr(i): i - 9 for i in range(9, 127)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("name", ["long_niah_single_1", "niah_grid", "long_cwe"])
def test_a_chat_template_is_around_the_prompt_and_before_the_answer(chatty, name):
    made = samples(name, tokenizer=chatty, lengths=[3000], depths=[0.5], n=2, chat=True)
    for sample in made:
        assert sample.text == f"<|user|>{sample.prompt}<|end|><|assistant|>{sample.answer_prefix}"
        assert sample.length == 3000
        assert (
            sample.prompt_tokens == len(sample.text) == 3000 - sample.max_new_tokens - sample.slack
        )
        assert sample.slack >= 0


def test_without_a_chat_template_chat_is_refused(prepending):
    with pytest.raises(ValueError, match="has no chat template; leave --chat out"):
        samples("niah_grid", tokenizer=prepending, lengths=[1024], n=1, chat=True)


LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
)


@pytest.mark.parametrize(
    ("name", "before", "behind", "bos"),
    [
        ("meta-llama3", *LLAMA3, "<|begin_of_text|>"),
        # this one leaves its first token to the tokenizer
        ("meta-chat", "[INST] ", " [/INST]", "<|begin_of_text|>"),
        ("jamba", "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> ", None, None),
    ],
)
def test_rulers_templates_are_around_the_prompt(chatty, name, before, behind, bos):
    if bos is not None:
        chatty.add_special_tokens({"bos_token": bos})
        chatty.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, chatty.bos_token_id)]
        )
    behind = "<|eom|><|bom|><|assistant|>" if behind is None else behind
    (sample,) = samples("long_niah_single_1", tokenizer=chatty, lengths=[3000], n=1, chat=name)
    assert sample.text == f"{before}{sample.prompt}{behind} {sample.answer_prefix}"
    row = forced_row(sample, chatty)["input_ids"].tolist()
    assert sample.prompt_tokens + sample.slack + sample.max_new_tokens == 3000
    if bos is not None:
        # once, whoever puts it there
        assert row.count(chatty.bos_token_id) == 1
        assert row[0] == chatty.bos_token_id


def test_a_template_that_ruler_has_not_is_refused(chatty, capsys):
    with pytest.raises(ValueError, match="unknown name 'meta-lama3'; did you mean 'meta-llama3'"):
        samples("niah_grid", tokenizer=chatty, lengths=[1024], n=1, chat="meta-lama3")
    assert main(["model", "--template", "lama"]) == 2
    assert "template: unknown name 'lama'" in capsys.readouterr().err
    assert main(["model", "--template", "Phi3", "--chat"]) == 2
    assert "two templates" in capsys.readouterr().err
