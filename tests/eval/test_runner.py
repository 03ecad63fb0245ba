import json
import re

import pytest

from hybrid_eval import Settings, evaluate, load, write_report
from hybrid_eval.cli import main, parse_options, parse_tokens

QUICK = Settings(lengths=(32,), depths=(0.0, 1.0), limit=2)
TASKS = ("mqar", "needle", "heldout", "cost")


@pytest.fixture
def checkpoint(tmp_path, tiny_llama):
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    return folder


class Counter:
    def __init__(self):
        self.finished = []

    def start(self, model, task):
        pass

    def advance(self, done, total):
        assert 0 < done <= total

    def finish(self, model, task, *, cached):
        self.finished.append((model, task, cached))


def test_a_run_that_was_cut_off_resumes(checkpoint, tmp_path):
    first, second = Counter(), Counter()
    arguments = {"out": tmp_path / "out", "settings": QUICK, "tokenizer": "bytes"}
    before = evaluate(checkpoint, TASKS[:2], watcher=first, **arguments)
    after = evaluate(checkpoint, TASKS, watcher=second, **arguments)
    assert [cached for *_, cached in first.finished] == [False, False]
    assert [cached for *_, cached in second.finished] == [True, True, False, False]
    for task in TASKS[:2]:
        assert before["models"][0]["results"][task] == after["models"][0]["results"][task]


def test_other_settings_or_other_weights_are_not_served_from_the_cache(
    checkpoint, tmp_path, tiny_llama
):
    def cached(**changes):
        watcher = Counter()
        arguments = {"out": tmp_path / "out", "settings": QUICK, **changes}
        evaluate(checkpoint, ("mqar",), watcher=watcher, **arguments)
        return watcher.finished[0][2]

    assert not cached()
    assert cached()
    assert not cached(settings=Settings(limit=2, seed=1))
    assert not cached(options={"mqar": {"pairs": 4}})
    tiny_llama.lm_head.weight.data.zero_()
    tiny_llama.save_pretrained(checkpoint)
    assert not cached()


def test_the_report_opens_from_disk(tiny_llama, tmp_path):
    results = evaluate(
        [
            load(tiny_llama, name="one <b>", tokenizer="bytes"),
            load(tiny_llama, name="two", tokenizer="bytes"),
        ],
        TASKS,
        settings=QUICK,
    )
    path = write_report(results, tmp_path / "report")
    html = path.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "one &lt;b&gt;" in html
    pictures = sorted(p.name for p in path.parent.glob("*.png"))
    assert pictures == [
        "heldout_by_position.png",
        "needle_heatmap.png",
        "retrieval_vs_cache.png",
        "retrieval_vs_loss.png",
    ]
    assert html.count("data:image/png;base64,") == 4
    assert json.loads((path.parent / "results.json").read_text()) == results
    for words in ("truncated", "true counts", "standard library", "torch"):
        assert words in html


def test_results_hold_what_the_footer_needs(tiny_llama):
    results = evaluate(load(tiny_llama, tokenizer="bytes"), TASKS, settings=QUICK)
    for task in ("mqar", "needle", "heldout"):
        result = results["models"][0]["results"][task]
        assert result["truncated"] == 0
        assert result["tokens"]["min"] <= result["tokens"]["max"]
        assert len(result["items"]) == result["n"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/absent"], "no such checkpoint folder"),
        (["{tmp}"], "is not a checkpoint: no config.json"),
        (
            ["{tmp}/tiny", "--tasks", "mqarr"],
            "unknown task 'mqarr', neither ours nor lm-eval's; did you mean 'mqar'?",
        ),
        (["{tmp}/tiny", "--tasks", "heldout"], "no tokenizer beside the model"),
        (["{tmp}/tiny", "--tasks", "needle", "--lengths", "4k"], "max_position_embeddings = 512"),
        (["{tmp}/tiny", "--set", "mqar.pair=3"], "no option 'pair'; did you mean 'pairs'?"),
        (["{tmp}/tiny", "--set", "pairs"], "TASK.OPTION=VALUE"),
        (["{tmp}/tiny", "--tasks", "recall_kv"], "did you mean 'kv_recall'?"),
        (["a={tmp}/tiny", "a={tmp}/tiny", "--tasks", "cost"], "two models are called 'a'"),
        (["{tmp}/tiny", "--set", "mqar.pairs=many"], "mqar.pairs must be a whole number"),
        (["{tmp}/tiny", "--set", "mqar.n=1.5"], "mqar.n must be a whole number, got 1.5"),
        (
            ["{tmp}/tiny", "--set", "mqar.key_ids=5"],
            "mqar.key_ids must be two whole numbers, got 5",
        ),
        (["{tmp}/tiny", "--set", "mqar.key_ids=[1, b]"], "mqar.key_ids must be two whole numbers"),
        (["{tmp}/tiny", "--set", "mqar.power=.nan"], "mqar.power must be finite, got nan"),
        (["{tmp}/tiny", "--set", "mqar.gap=x"], "mqar.gap must be one of 'power', 'uniform'"),
        (["{tmp}/tiny", "--set", "mqar.n=0"], "mqar.n must be at least 1, got 0"),
        (["{tmp}/tiny", "--set", "needle.depths=3"], "needle.depths must be a list of numbers"),
        (["{tmp}/tiny", "--set", "needle.lengths=[]"], "needle.lengths must be a list of whole"),
        (["{tmp}/tiny", "--set", "speed.repeats=0"], "speed.repeats must be at least 1"),
        (["{tmp}/tiny", "--set", "heldout.buckets=-1"], "heldout.buckets must be at least 0"),
        (["{tmp}/tiny", "--set", "kv_recall.pairs=x"], "kv_recall.pairs must be a whole number"),
        (["{tmp}/tiny", "--set", "based_fda.path=3"], "based_fda.path must be a text, got 3"),
        (["{tmp}/tiny", "--set", "ruler_qa_1.squad=3"], "ruler_qa_1.squad must be a text, got 3"),
        (["{tmp}/tiny", "--set", "mqar.pairs=" + "[" * 3000], "nested too deeply"),
        (["{tmp}/tiny", "--set", "mqar.pairs=[1"], "--set mqar.pairs=[1: the value is not YAML"),
        (["{tmp}/tiny", "--dtype", "float31"], "no dtype 'float31'; did you mean 'float32'?"),
        (["{tmp}/tiny", "--tokenizer", "bytse"], "no tokenizer 'bytse'; did you mean 'bytes'?"),
        (["{tmp}/tiny", "--tokenizer", "{tmp}/none"], "none: no tokenizer that could be loaded"),
        (["{tmp}/tiny", "--device", "tpu"], "no device 'tpu'; write cpu, cuda"),
        (
            ["{tmp}/tiny", "--tasks", "cost", "--include-path", "{tmp}/gone"],
            "gone: no such folder of lm-eval YAML files",
        ),
        (
            ["{tmp}/tiny", "--tasks", "mmlu_cloze", "--tokenizer", "bytes", "--mmlu-dir", "{tmp}"],
            "no .jsonl, .parquet or .csv file",
        ),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, capsys, arguments, words):
    status = main([a.format(tmp=tmp_path) for a in arguments] + ["--out", str(tmp_path / "o")])
    assert status == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lengths", "0"),
        ("--lengths", ""),
        ("--lengths", "\u00b2"),
        ("--limit", "9" * 20),
        ("--batch-size", "0"),
        ("--depths", "nan"),
        ("--context", "-4"),
        ("--tasks", ","),
        ("--out", ""),
    ],
)
def test_a_setting_that_nobody_can_mean_is_refused(checkpoint, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(checkpoint), *arguments])
    assert caught.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text.txt", b"\xff\xfe\x00"),
        ("text.txt", b""),
        ("text.jsonl", b'{"text": 3}'),
        ("text.jsonl", b"[" * 100_000),
        ("text.jsonl", b"[]"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(checkpoint, tmp_path, capsys, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    arguments = [str(checkpoint), "--tasks", "heldout", "--tokenizer", "bytes"]
    assert main([*arguments, "--text", str(path), "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err.strip()
    assert str(path) in err
    assert len(err.splitlines()) == 1


def test_results_do_not_go_to_a_file(checkpoint, capsys):
    file = checkpoint / "config.json"
    assert main([str(checkpoint), "--tasks", "cost", "--out", str(file)]) == 2
    assert "config.json is a file" in capsys.readouterr().err


def test_a_model_type_that_nobody_registered_is_named(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "marvel"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no model type 'marvel'"):
        load(checkpoint)
    config["auto_map"] = {"AutoConfig": "code.Config"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load(checkpoint)


def test_the_command_line_leaves_a_report(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"tiny={checkpoint}", "--tokenizer", "bytes", "--out", str(out)]
    arguments += ["--limit", "2", "--lengths", "32,64", "--set", "mqar.pairs=4"]
    assert main(arguments) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["models"][0]["results"]["mqar"]["options"] == {"pairs": 4}


def test_words_of_the_command_line():
    assert parse_tokens("4k") == 4096
    assert parse_options(["mqar.key_ids=[1, 5]"]) == {"mqar": {"key_ids": [1, 5]}}
