import re
from collections import Counter as Tally
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hybrid_eval.corpus import Corpus, Document, stdlib_documents
from hybrid_eval.text.counter import Counter
from hybrid_eval.text.evaluate import evaluate_text, forced_row, read_again
from hybrid_eval.text.fill import alike, fill
from hybrid_eval.text.latent import LANDMARKS
from hybrid_eval.text.matching import string_match
from hybrid_eval.text.material import uuids
from hybrid_eval.text.tasks import GRIDS, NAMES, RULER, Material, maker, samples
from hybrid_eval.tokens import ByteEncoder, prompt_ids

LONG = tuple(f"long_{name}" for name in RULER)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of a thousand pieces, trained on the text of the haystack; BOS in front."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.text for d in stdlib_documents()[:12]), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def one(name, tokenizer, length=4096, index=0, seed=0, **options):
    return maker(name, Material(), Counter(tokenizer))(
        length=length, index=index, seed=seed, **options
    )


def solve(prompt):
    """Answer any of the tasks by reading the prompt alone."""
    if "Which character" in prompt:
        place = re.search(r"Which character has been to (.+)\?", prompt)[1]
        homes = re.findall(r"(\w+) lives next to the ([\w' ]+?)\.", prompt)
        return [who for who, mark in homes if LANDMARKS[mark][0] == place]
    if "phone book" in prompt:
        name = re.findall(r"phone number of (.+?) in the phone book\?", prompt)[-1]
        return re.findall(rf"^{name}: (\d+)$", prompt, re.M)
    if "special magic" in prompt:
        question = re.search(r"\nWhat (?:are all|is) the special magic \w+ for (.+?) ment", prompt)
        table = {}
        for key, value in re.findall(
            r"special magic \w+ for (\S+) is: ([\w-]+)\.", prompt[: question.start()]
        ):
            table.setdefault(key, []).append(value)
        queries = re.split(r", and |, ", question[1])
        return [value for query in queries for value in table[query]]
    if "chain(s) of variable" in prompt:
        asked = prompt[prompt.rindex("Memorize and track") :]
        value = re.findall(r"assigned the value (\d+)", asked)[-1]
        known = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked):
            known[name] = known.get(source, source)
        return [name for name, found in known.items() if found == value]
    if "numbered list of words" in prompt:
        asked = prompt[prompt.rindex("Below is") :]
        words = re.findall(r"\d+\. (\S+)", asked[: asked.rindex("Question")])
        return [word for word, _ in Tally(words).most_common(10)]
    if "coded" in prompt:
        body = prompt[prompt.index("coded words. ") + 13 : prompt.rindex("\nQuestion")]
        words = [word for word in body.split() if word != "..."]
        return [word for word, _ in Tally(words).most_common(3)]
    person = re.search(r"did (.+?) settle\?|town in which (.+?) settled\?", prompt)
    documents = prompt[: prompt.rindex("\nQuestion")]
    settled = rf"{person[1] or person[2]} was a \w+ who settled in the town of (.+?) in \d"
    town = re.search(settled, documents)[1]
    if person[1]:
        return [town]
    return [re.search(rf"{town} is a small town on the river (.+?)\.", documents)[1]]


@pytest.mark.parametrize("name", [*GRIDS, *LONG])
def test_a_solver_that_reads_the_prompt_is_right_and_an_echo_is_not(name, tokenizer):
    for length in (2048, 6000):
        for made in samples(name, tokenizer=tokenizer, lengths=[length], depths=[0.5], n=3):
            answer = ", ".join(solve(made.prompt))
            assert string_match(made.outputs, answer, made.match) == 1.0
            first = re.split(r"(?<=[.?!:])\s", made.prompt)[0]
            assert string_match(made.outputs, first, made.match) == 0.0


def test_rulers_own_words_are_used_where_they_are_installed(tokenizer):
    pytest.importorskip("wonderwords", reason="the extra eval is not installed")
    essays = Corpus((Document("d", "It was a dull day. Nothing happened. " * 300),), "essays")
    for name in (name for name in RULER if not name.startswith("qa")):
        (made,) = samples(
            f"ruler_{name}",
            tokenizer=tokenizer,
            lengths=[3000],
            n=1,
            material=Material(essays=essays),
        )
        assert made.task == f"ruler_{name}"
        assert string_match(made.outputs, ", ".join(solve(made.prompt)), made.match) == 1.0
        if name == "cwe":
            assert made.haystack == "wonderwords"


@pytest.mark.parametrize("name", [*GRIDS, *LONG])
@pytest.mark.parametrize("length", [2000, 6000])
def test_the_length_is_filled_to_within_one_unit(name, length, tokenizer):
    for encoder, room in ((tokenizer, length), (ByteEncoder(), 4 * length)):
        made = one(name, encoder, room, **({"depth": 0.3} if name in GRIDS else {}))
        tokens = len(prompt_ids(encoder, made.text))
        assert tokens == made.prompt_tokens
        assert 0 <= room - tokens - made.max_new_tokens == made.slack < made.filler_tokens


@pytest.mark.parametrize("name", [*GRIDS, *LONG])
def test_a_sample_does_not_depend_on_what_was_drawn_before(name, tokenizer):
    few = samples(name, tokenizer=tokenizer, lengths=[2000], depths=[0.5], n=1)
    many = samples(name, tokenizer=tokenizer, lengths=[1800, 2000], depths=[0.5], n=2)
    assert many[2].prompt == few[0].prompt
    assert many[3].prompt != few[0].prompt
    other = samples(name, tokenizer=tokenizer, lengths=[2000], depths=[0.5], n=1, seed=1)
    assert few[0].prompt != other[0].prompt


@pytest.mark.parametrize("name", [*GRIDS, *LONG])
def test_the_needles_token_is_where_the_sample_says(name, tokenizer):
    made = one(name, tokenizer, 5000, **({"depth": 0.7} if name in GRIDS else {}))
    ids = prompt_ids(tokenizer, made.text)
    for position in made.needle_positions:
        tail = tokenizer.decode(ids[position:])
        assert re.match(
            r" ?(The special|One of|VAR|Document|[A-Z]\w+ (lives|[A-Z]\w+: \d))", tail
        ), tail[:30]
    assert made.haystack


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_grids_depth_is_exact(depth, tokenizer):
    made = one("niah_grid", tokenizer, 3000, depth=depth)
    text = made.prompt[made.prompt.index("\n") + 1 : made.prompt.rindex("\nWhat")]
    before, after = re.split(r"The special magic number for \S+ is: \d+\.", text)
    words = len(before.split()) + len(after.split())
    assert len(before.split()) == round(depth * words)
    book = one("kv_recall", tokenizer, 3000, depth=depth)
    lines = book.prompt.split("\n")[1:-1]
    assert lines.index(f"{book.details['key']}: {book.outputs[0]}") == round(
        depth * (len(lines) - 1)
    )


def test_rulers_definitions(tokenizer):
    @cache
    def made(name):
        return one(f"long_{name}", tokenizer, 6000)

    def needles(name):
        body = made(name).prompt.rsplit("\n", 1)[0]
        return re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", body)

    assert len(needles("niah_single_1")) == len(needles("niah_single_2")) == 1
    assert re.fullmatch(r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", needles("niah_single_3")[0][2])
    assert len({key for _, key, _ in needles("niah_multikey_1")}) == 4
    assert len({key for _, key, _ in needles("niah_multivalue")}) == 1
    assert len(needles("niah_multivalue")) == len(made("niah_multivalue").outputs) == 4
    assert len(made("niah_multiquery").outputs) == 4
    # the haystack of the hardest two is nothing but needles
    for name in ("niah_multikey_2", "niah_multikey_3"):
        lines = made(name).prompt.split("\n")[1:-1]
        assert all(line.startswith("One of the special magic") for line in lines)
        keys = re.findall(r"for (\S+) is", "\n".join(lines))
        assert len(set(keys)) == len(keys) > 20
    tracked = made("vt")
    assert len(tracked.outputs) == 5
    assert tracked.prompt.count("Memorize and track") == 2
    assert "5 variables are assigned the value" in tracked.answer_prefix
    common = made("cwe")
    assert common.prompt.count("Below is a numbered list") == 2
    counted = Tally(re.findall(r"\d+\. (\S+)", common.prompt[common.prompt.rindex("Below") :]))
    assert sorted(set(counted.values())) == [3, 30]
    assert sum(count == 30 for count in counted.values()) == 10
    assert made("qa_1").match == made("qa_2").match == "any"
    assert made("niah_single_1").prompt.startswith("A special magic number is hidden")
    assert made("niah_multivalue").prompt.startswith("Some special magic numbers are hidden")


def test_frequent_words_follow_the_zeta_law(tokenizer):
    made = one("long_fwe", tokenizer, 16384)
    body = made.prompt[made.prompt.index("coded words. ") + 13 : made.prompt.rindex("\nQuestion")]
    counted = Tally(body.split())
    total = made.details["words"]
    for rank, word in enumerate(["...", *made.outputs], 1):
        assert counted[word] == int(total * rank**-2.0 / (np.pi**2 / 6))


@pytest.mark.parametrize("name", [*GRIDS, *LONG])
def test_what_is_too_short_is_refused_and_nothing_hangs(name, tokenizer):
    depth = {"depth": 0.5} if name in GRIDS else {}
    with pytest.raises(ValueError, match=r"length 40.*ask for a greater length"):
        one(name, tokenizer, 40, **depth)
    for length in (150, 512):
        try:
            one(name, tokenizer, length, **depth)
        except ValueError as error:
            assert f"length {length}" in str(error)  # noqa: PT017


def test_fill_counts_on_the_prompt_itself():
    # estimates that are wrong in both directions
    for factor in (0.3, 1, 3):
        found = fill(lambda u: 7 + 5 * u, alike(int(5 * factor), 500), 1000, minimum=0, what="x")
        assert found.tokens == 7 + 5 * found.units
        assert 0 <= 1000 - found.tokens < (5 if factor <= 1 else 15)
        assert 1000 - found.tokens < found.next_tokens
    with pytest.raises(ValueError, match="x: the shortest prompt takes 107 tokens, only 100"):
        fill(lambda u: 107 + u, alike(1, 10), 100, minimum=0, what="x")


def test_an_answer_is_matched_as_ruler_matches():
    assert string_match(["Ab", "cd"], "it is AB.", "all") == 0.5
    assert string_match(["Ab", "cd"], "it is AB.", "any") == 1.0
    assert string_match(["Ab", "cd"], "no", "any") == 0.0


def test_uuids_are_version_four():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert re.fullmatch(
            r"[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}", uuids(rng, 1)[0]
        )


def test_nothing_is_called_ruler_without_rulers_material(tokenizer, tmp_path):
    for name, words in (("ruler_qa_1", "squad"), ("ruler_qa_2", "hotpot")):
        with pytest.raises(ValueError, match=f"{name} needs the option {words}"):
            one(name, tokenizer)
    with pytest.raises(ValueError, match="did you mean 'niah_grid'"):
        one("niah_gird", tokenizer)
    for name in ("ruler_variable_tracking", "ruler_frequent_words"):
        assert one(name, tokenizer).task == name
    squad = tmp_path / "dev.json"
    squad.write_text(
        '{"data": [{"paragraphs": [{"context": "Ann lives in Rome.", "qas": [{"question": "Where '
        'does Ann live?", "is_impossible": false, "answers": [{"text": "Rome"}, {"text": "in '
        'Rome"}]}]}, {"context": "Bob lives in Oslo.", "qas": []}]}]}'
    )
    made = maker("ruler_qa_1", Material(squad=str(squad)), Counter(tokenizer))(
        length=1024, index=0, seed=0
    )
    assert made.outputs == ("Rome", "in Rome")
    assert "Bob lives in Oslo." in made.prompt
    assert made.haystack == "SQuAD (dev.json)"


def test_the_users_text_is_the_haystack(tokenizer):
    corpus = Corpus((Document("d", "lorem ipsum dolor sit amet " * 50),), "lorem")
    made = samples(
        "niah_grid",
        tokenizer=tokenizer,
        lengths=[1000],
        depths=[0.5],
        n=1,
        material=Material(corpus),
    )[0]
    assert made.haystack == "lorem"
    assert "ipsum dolor sit" in made.prompt


def test_forced_scoring_asks_for_the_whole_answer(tokenizer, rule_model):
    made = one("niah_grid", tokenizer, 800, depth=0.5)
    row = forced_row(made, tokenizer)
    labels = row["labels"][row["labels"] != -100].tolist()
    assert tokenizer.decode(labels) == " " + made.outputs[0]
    assert len(row["input_ids"]) <= 800

    def read(ids):
        """Solve the prompt; spell the answer out token by token."""
        text = tokenizer.decode(ids, skip_special_tokens=True)
        prompt, _, begun = text.partition("mentioned in the provided text is")
        answer = tokenizer(" " + solve(prompt)[0], add_special_tokens=False)["input_ids"]
        done = len(tokenizer(begun, add_special_tokens=False)["input_ids"]) if begun else 0
        return answer[done]

    model = rule_model(read, vocab_size=len(tokenizer))
    result = evaluate_text(
        model, task="niah_grid", tokenizer=tokenizer, lengths=[700, 900], depths=[0, 1], n=2
    )
    assert result["accuracy"] == 1.0
    assert [cell["n"] for cell in result["cells"]] == [2] * 4
    assert result["tokens"]["max"] <= 900 - 16
    wrong = evaluate_text(
        rule_model(lambda ids: 5, vocab_size=len(tokenizer)),
        task="niah_grid",
        tokenizer=tokenizer,
        lengths=[700],
        depths=[0],
        n=2,
    )
    assert wrong["accuracy"] == 0.0


def test_a_prompt_is_read_twice(tokenizer, rule_model):
    made = one("niah_grid", tokenizer, 600, depth=0.5)
    again = read_again(made, 2, tokenizer)
    assert again.text == f"{made.text}\n\n{made.text}"
    assert again.outputs == made.outputs
    assert again.answer == made.answer
    assert again.prompt_tokens == len(prompt_ids(tokenizer, again.text))
    arguments = {"task": "niah_grid", "tokenizer": tokenizer, "lengths": [600], "depths": [0.5]}
    model = rule_model(lambda ids: 5, vocab_size=len(tokenizer))
    once, twice = (evaluate_text(model, reads=reads, n=1, **arguments) for reads in (1, 2))
    assert twice["tokens"]["max"] > 1.9 * once["tokens"]["max"]
    with pytest.raises(ValueError, match="reads: expected 1 with a chat template, got 2"):
        evaluate_text(model, reads=2, chat=True, n=1, **arguments)


def test_every_name_is_a_task():
    from hybrid_eval import TASKS

    assert set(NAMES) <= set(TASKS)


def test_units_measured_around_the_end_save_counts_of_the_whole():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(5, 40, 200)
        counted = []

        def count(units, sizes=sizes, counted=counted):
            counted.append(units)
            return 50 + int(sizes[:units].sum())

        average = alike(int(sizes[:8].mean()), 200)
        found = fill(
            count, average, 2000, minimum=1, what="x", measure=lambda i, s=sizes: int(s[i])
        )
        assert found.tokens <= 2000 < found.tokens + sizes[found.units]
        assert found.next_tokens == sizes[found.units]
        # the shortest prompt, the estimate, and the end
        assert len(counted) <= 3
