"""Keys of `training:` that change how a step is computed, through the YAML file's own values."""

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hybrid.cli import main
from hybrid.config.options import ConfigError
from hybrid.train import parse_config, run
from hybrid.train.build import check_trackers
from hybrid.train.runner import prepare_run


@pytest.fixture
def trained(tmp_path):
    """Train a tiny hybrid for three steps; rows have different numbers of labels."""

    def train(name, **training):
        values = {
            "model": {
                "layout": "LS",
                "hidden_size": 16,
                "mixers": {"L": {"num_heads": 2, "conv_size": 4}, "S": {"num_heads": 2}},
            },
            "data": {"source": "mqar", "pairs": 6, "min_pairs": 1},
            "sequence_length": 24,
            "training": {
                "output_dir": str(tmp_path / name),
                "max_steps": 3,
                "logging_steps": 1,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "save_strategy": "no",
                "disable_tqdm": True,
                **training,
            },
        }
        return run(parse_config(values))

    return train


def losses(result):
    return torch.tensor([loss for _, loss in result.losses])


def test_bf16_computes_in_half_and_keeps_weights_in_full(trained, tmp_path, monkeypatch):
    seen = set()
    real = torch.nn.functional.linear

    def linear(x, *args):
        y = real(x, *args)
        seen.add(y.dtype)
        return y

    plain = trained("plain")
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    half = trained("half", bf16=True)
    assert torch.bfloat16 in seen
    assert not torch.equal(losses(half), losses(plain))
    torch.testing.assert_close(losses(half), losses(plain), rtol=2e-2, atol=0)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_gradient_checkpointing_runs_a_layer_again_and_changes_nothing(trained, monkeypatch):
    from hybrid.mixers.softmax_attention import SoftmaxAttention

    calls = []
    real = SoftmaxAttention.forward

    def forward(self, *args, **kwargs):
        calls.append(self.layer_idx)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SoftmaxAttention, "forward", forward)
    plain = trained("plain")
    once = len(calls)
    again = trained("again", gradient_checkpointing=True)
    assert once == 3
    assert len(calls) - once == 2 * once
    torch.testing.assert_close(losses(again), losses(plain), rtol=1e-6, atol=0)


def test_label_smoothing_keeps_the_losses_of_the_config_and_spares_evaluation(tmp_path):
    """The model smooths, so that z-loss, balance and multi-token prediction stay in the loss."""
    experts = {"num_experts": 4, "top_k": 2, "balance_loss": 0.1, "intermediate_size": 8}
    values = {
        "model": {
            "layout": "S",
            "ffn": "E",
            "hidden_size": 16,
            "mixers": {"S": {"num_heads": 2}},
            "feed_forwards": {"E": experts},
            "z_loss": 0.02,
            "num_mtp_layers": 1,
        },
        "data": "stdlib",
        "eval_data": {"source": "stdlib", "split": "heldout"},
        "eval_rows": 2,
        "sequence_length": 16,
        "training": {
            "output_dir": str(tmp_path),
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "disable_tqdm": True,
            "label_smoothing_factor": 0.2,
        },
    }
    trainer = prepare_run(parse_config(values))
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_loss(model, dict(batch))
    expected = model(**batch, use_cache=False, label_smoothing=0.2).loss
    torch.testing.assert_close(found, expected)
    assert abs(found - model(**batch, use_cache=False).loss) > 1e-4
    rows = [trainer.eval_dataset[i] for i in range(2)]
    with torch.no_grad():
        plain = model.eval()(**trainer.data_collator(rows), use_cache=False).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.item(), rel=1e-5)


def test_accumulated_rows_count_by_their_tokens(trained):
    """Four rows of one label to six: one batch of four is four batches of one."""
    whole = trained("whole")
    parts = trained("parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_torch_compile_trains_the_same(trained):
    from torch._dynamo.utils import counters

    plain = trained("plain", max_steps=2)
    before = counters["stats"]["unique_graphs"]
    compiled = trained("compiled", max_steps=2, torch_compile=True)
    assert counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=0)


# Trackers


class Kept(TrainerCallback):
    """A tracker that keeps what it is told."""

    logged: list = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append({"step": state.global_step, **logs})


def test_a_tracker_by_name_is_told_all(trained, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "kept", Kept)
    monkeypatch.setattr(Kept, "logged", [])
    result = trained("tracked", report_to="kept")
    told = [entry for entry in Kept.logged if "loss" in entry]
    assert [(entry["step"], entry["loss"]) for entry in told] == result.losses
    assert all(entry["tokens_per_second"] > 0 for entry in told)


def test_a_tracker_that_is_not_there_is_named():
    with pytest.raises(ConfigError) as caught:
        check_trackers(["tensorbord"])
    assert caught.value.mistakes == [
        "training.report_to: unknown tracker 'tensorbord', did you mean 'tensorboard'?"
    ]
    absent = next(
        name
        for name, package in (("tensorboard", "tensorboard"), ("comet_ml", "comet_ml"))
        if find_spec(package) is None
    )
    with pytest.raises(ConfigError, match=f"got '{absent}'; try pip install"):
        check_trackers([absent])


# Data prepared on the command line


def test_prepared_data_trains_as_its_source_does(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"body": f"{i} and {i * i}"}) for i in range(40)))
    ready = str(tmp_path / "ready")
    words = ["data", "prepare", str(texts), ready, "--text-key", "body", "--shard-tokens", "200"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{ready}: 40 documents, ")
    assert "shards" in printed

    def first_row(**data):
        values = {"model": {"layout": "S", "hidden_size": 16}, "sequence_length": 32}
        training = {"max_steps": 2, "output_dir": str(tmp_path / "run"), "disable_tqdm": True}
        return parse_config({**values, "data": data, "packing": "none", "training": training})

    ours = first_row(source=ready)
    assert run(ours).steps == 2
    rows, same = (
        prepare_run(config).train_dataset.sources[0]
        for config in (ours, first_row(source=str(texts), text_key="body"))
    )
    assert rows.per_epoch == same.per_epoch == 40
    texts_of = [{tuple(source.row(i)["input_ids"]) for i in range(40)} for source in (rows, same)]
    assert texts_of[0] == texts_of[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl", "out"], "nowhere.jsonl: expected existing files, got none"),
        (["mqar", "out"], "got the plug-in 'mqar'"),
        (["stdlib", "out", "--split", "test"], "expected a split of stdlib, got 'test'"),
        (["stdlib", "out", "--shard-tokens", "many"], "--shard-tokens: 'many' is no number"),
        (["stdlib", "out", "--shard-tokens", "0"], "shard_tokens: expected at least 1"),
        (["stdlib", "taken"], "taken: expected a folder to write, got a file"),
    ],
)
def test_data_prepare_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert main(["data", "prepare", *words]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.strip()]
    assert line.startswith("hybrid data: ")
    assert message in line
    assert not (tmp_path / "out").exists()
