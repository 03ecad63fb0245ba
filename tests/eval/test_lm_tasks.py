from pathlib import Path

import pytest
import yaml

import hybrid_eval
from hybrid_eval.text.tasks import NAMES, RULER

FOLDER = Path(hybrid_eval.__file__).parent / "lm_tasks"

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # lm-eval's own imports warn
]


def run(lm_checkpoint, tasks, metadata, **options):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    given = {"tokenizer": lm_checkpoint, "pretrained": lm_checkpoint, **metadata}
    return simple_evaluate(
        HFLM(pretrained=lm_checkpoint, device="cpu", batch_size=2),
        tasks=tasks,
        # without lm-eval's own tasks: indexing them takes most of a minute
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=given),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )


def test_lm_eval_runs_our_tasks_and_limit_takes_a_share_of_every_length(lm_checkpoint):
    found = run(
        lm_checkpoint,
        ["niah_grid_forced", "niah_grid"],
        {"lengths": [512, 1024], "depths": [0.0, 1.0], "samples": 2},
        limit=4,
    )
    for task in ("niah_grid_forced", "niah_grid"):
        scores = found["results"][task]
        lengths = {key.split(",")[0] for key in scores if key[0].isdigit()}
        assert {length.removesuffix("_stderr") for length in lengths} == {"512", "1024"}
        seen = [(s["doc"]["length"], s["doc"]["depth"]) for s in found["samples"][task]]
        assert sorted(seen) == [(512, 0.0), (512, 1.0), (1024, 0.0), (1024, 1.0)]
        assert "accuracy_stderr,none" in scores
    assert found["results"]["niah_grid_forced"]["nll,none"] > 0


def test_a_prompt_reaches_the_model_whole(lm_checkpoint):
    found = run(lm_checkpoint, ["niah_grid"], {"lengths": [1024], "depths": [0.5], "samples": 1})
    (sample,) = found["samples"]["niah_grid"]
    sent = sample["arguments"][0][0]
    doc = sample["doc"]
    assert len(sent.encode()) == doc["prompt_tokens"] <= 1024 - doc["max_new_tokens"]
    assert sent == f"{doc['prompt']} {doc['answer_prefix']}"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"lengths": [2048]}, "would cut samples of 2048 tokens to 1024"),
        ({"lengths": [1000]}, "powers of two"),
        ({"tokenizer": None, "pretrained": None}, "no tokenizer to count with"),
    ],
)
def test_what_lm_eval_would_cut_is_refused(lm_checkpoint, metadata, words):
    with pytest.raises(ValueError, match=words):
        run(lm_checkpoint, ["niah_grid"], metadata)


def test_every_task_has_a_file_of_its_name():
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text().replace("!function ", "")
        assert yaml.safe_load(text)["task"] == name
    assert len(RULER) == 13
