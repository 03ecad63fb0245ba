"""lm-eval's own tasks through our command line, from data on disk."""

import builtins
import json

import pytest

import hybrid
from hybrid_eval import Settings, evaluate, lm_harness, load, write_report
from hybrid_eval.lm_harness import resolve

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # lm-eval's own imports warn
]

CHOICE = """
task: colour_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
tag: colours
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
PERPLEXITY = """
task: colour_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
tag: colours
metric_list: [{{metric: bits_per_byte}}]
"""
REMOTE = """
task: colour_remote
dataset_path: nobody/nothing
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of lm-eval tasks; lm-eval's own fourteen thousand take ten seconds to index."""
    from lm_eval.tasks import TaskManager

    place = tmp_path / "tasks"
    place.mkdir()
    data = place / "data.jsonl"
    rows = [
        {"question": f"Thing {i}?", "choices": ["ruby", "blue", "lime"], "answer": i % 3}
        for i in range(8)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("a", CHOICE), ("b", PERPLEXITY), ("c", REMOTE)):
        (place / f"{name}.yaml").write_text(text.format(data=data))
    manager = TaskManager(include_path=str(place), include_defaults=False)
    monkeypatch.setattr(lm_harness, "_manager", lambda include_path: manager)
    return place


def direct(checkpoint, task, manager, **options):
    """The figures of lm-eval called by hand."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=checkpoint, device="cpu")
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, **options)
    return found["results"][task]


def test_a_task_of_lm_evals_gives_lm_evals_figures(lm_checkpoint, folder, tmp_path):
    arguments = {
        "settings": Settings(limit=6),
        "include_path": folder,
        "out": tmp_path / "out",
        "options": {"colour_choice": {"num_fewshot": 1}},
    }
    results = evaluate(lm_checkpoint, ["colours"], **arguments)
    found = results["models"][0]["results"]
    assert list(found) == ["colour_choice", "colour_text"]
    choice, text = found["colour_choice"], found["colour_text"]
    manager = lm_harness._manager(None)
    own = direct(lm_checkpoint, "colour_choice", manager, limit=6, num_fewshot=1)
    assert choice["accuracy"] == own["acc,none"]
    assert choice["accuracy_stderr"] == pytest.approx(own["acc_stderr,none"])
    assert choice["lm_eval"]["num_fewshot"] == 1
    assert choice["chance"] == pytest.approx(1 / 3)
    assert (choice["n"], len(choice["items"]), choice["truncated"]) == (6, 6, 0)
    # bytes are tokens: one worked example and the question
    assert choice["tokens"]["max"] == len("Thing 0? ruby\n\nThing 0? ruby")
    own = direct(lm_checkpoint, "colour_text", manager, limit=6)
    assert text["bits_per_byte"] == pytest.approx(own["bits_per_byte,none"])
    assert (text["metric"], text["axis"]) == ("bits_per_byte", "language")
    html = write_report(results, tmp_path / "report").read_text()
    for words in ("colour_choice: accuracy", "colour_text: bits per byte", "1-shot"):
        assert words in html


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("niah_single_1", "retrieval"),
        ("ruler_vt", "retrieval"),
        ("babilong_qa1", "retrieval"),
        ("longbench2_code", "retrieval"),
        ("infinitebench_passkey", "retrieval"),
        ("infinitebench_math_find", "reasoning"),
        ("fda", "retrieval"),
        ("lambada_openai", "language"),
        ("wikitext", "language"),
        ("arc_easy", "reasoning"),
        ("gsm8k", "reasoning"),
    ],
)
def test_the_axis_of_lm_evals_tasks(name, axis):
    assert lm_harness.axis_of(name) == axis


def test_the_axis_that_is_asked_for_wins(lm_checkpoint, folder):
    arguments = {"include_path": folder, "settings": Settings(limit=2)}
    for asked, found in ((None, "reasoning"), ("retrieval", "retrieval")):
        axes = {} if asked is None else {"colours": asked}
        results = evaluate(lm_checkpoint, ["colours"], axes=axes, **arguments)
        results = results["models"][0]["results"]
        assert results["colour_choice"]["axis"] == found
        assert results["colour_text"]["axis"] == (asked or "language")
    ours = evaluate(
        lm_checkpoint,
        ["mqar"],
        axes={"mqar": "reasoning"},
        settings=Settings(limit=2),
        options={"mqar": {"pairs": 4}},
    )
    assert ours["models"][0]["results"]["mqar"]["axis"] == "reasoning"


def test_a_model_without_a_limit_is_given_whole_prompts(lm_checkpoint, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    mixers = {"L": {"num_heads": 2}}
    config = hybrid.HybridConfig(layout="LL", hidden_size=32, vocab_size=256, mixers=mixers)
    model = hybrid.HybridForCausalLM(config)
    assert getattr(config, "max_position_embeddings", None) is None
    subject = load(model, tokenizer=lm_checkpoint)
    seen = []
    build = lm_harness._language_model

    def language_model(*arguments):
        seen.append(build(*arguments))
        return seen[-1]

    monkeypatch.setattr(lm_harness, "_language_model", language_model)
    rows = [{"question": "word " * 700, "choices": ["ruby", "blue"], "answer": 0}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(subject, ["colour_choice"])["models"][0]["results"]["colour_choice"]
    assert isinstance(seen[0], HFLM)
    assert seen[0].max_length > 3500
    assert (found["truncated"], found["tokens"]["max"]) == (0, 3505)


def test_results_of_lm_eval_are_kept(lm_checkpoint, folder, tmp_path, monkeypatch):
    arguments = {"include_path": folder, "out": tmp_path / "out", "settings": Settings(limit=2)}
    before = evaluate(lm_checkpoint, ["colour_choice"], **arguments)

    def never(*args, **options):
        raise AssertionError("run again")

    monkeypatch.setattr("lm_eval.simple_evaluate", never, raising=False)
    after = evaluate(lm_checkpoint, ["colour_choice"], **arguments)
    assert before["models"] == after["models"]


def test_a_prompt_that_lm_eval_cuts_is_counted(lm_checkpoint, folder, tiny_llama):
    tiny_llama.config.max_position_embeddings = 16
    subject = load(tiny_llama, name="short", tokenizer=lm_checkpoint)
    options = {"colour_choice": {"num_fewshot": 2}}
    results = evaluate(subject, ["colour_choice"], settings=Settings(limit=3), options=options)
    assert results["models"][0]["results"]["colour_choice"]["truncated"] == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("colour_choise", "neither ours nor lm-eval's; did you mean 'colour_choice'?"),
        ("niah_gird", "neither ours nor lm-eval's; did you mean 'niah_grid'?"),
        ("xyzzy", "--list has ours"),
    ],
)
def test_a_name_that_nobody_knows(folder, name, words):
    with pytest.raises(ValueError, match=words):
        resolve(name)


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    lm_harness._manager.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"'hellaswag' is not ours.*pip install lm-eval;"):
            resolve("hellaswag")
    finally:
        lm_harness._manager.cache_clear()


def test_a_task_whose_data_are_out_of_reach(lm_checkpoint, folder, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=r"colour_remote needs the data set .* cannot be reached"):
        evaluate(lm_checkpoint, ["colour_remote"], include_path=folder)


def test_bytes_are_no_tokenizer_for_lm_eval(folder, tiny_llama):
    subject = load(tiny_llama, name="tiny", tokenizer="bytes")
    with pytest.raises(ValueError, match="need a Hugging Face tokenizer, found ByteEncoder"):
        evaluate(subject, ["colour_choice"])


def test_every_lm_eval_task_is_known_by_name():
    for name in ("hellaswag", "piqa", "arc_easy", "openbookqa", "winogrande", "mmlu"):
        assert [task.name for task in resolve(name)] == [name]
