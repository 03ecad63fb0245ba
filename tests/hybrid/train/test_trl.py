"""Supervised fine-tuning of a hybrid with TRL's own trainer."""

import pytest
import torch
from datasets import Dataset

from hybrid.tokenizer import byte_tokenizer

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

# TRL 1.16 and PEFT 0.21 ask transformers 5.23 by names that are about to go
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture
def fine_tune(build, tmp_path):
    """Two steps of TRL on questions and answers; returns the trainer and the untouched weights."""

    def run(peft_config=None, config=None, **options):
        pairs = [
            {"prompt": f"{i} plus {i} is ", "completion": f"{i + i}." * (1 + i % 3)}
            for i in range(16)
        ]
        model = build(layout="LSD", vocab_size=259, dtype=torch.float32, **(config or {}))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            logging_steps=1,
            max_length=32,
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            disable_tqdm=True,
            **{"learning_rate": 1e-2, **options},
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=byte_tokenizer(),
            peft_config=peft_config,
        )
        trainer.train()
        return trainer, before

    return run


def test_every_weight_of_a_hybrid_is_tuned_on_completions_alone(fine_tune):
    trainer, before = fine_tune()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    unmoved = [n for n, v in trainer.model.state_dict().items() if torch.equal(v, before[n])]
    assert unmoved == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"logits_multiplier": 0.25},
        {"logit_softcap": 2.0},
        {"mup_base_width": 16, "init": "fixed"},
        {"tie_word_embeddings": False, "logits_multiplier": 3.0, "logit_softcap": 5.0},
    ],
    ids=["plain", "multiplier", "cap", "muP", "all, untied"],
)
def test_the_loss_is_that_of_the_logits_of_the_model(fine_tune, config):
    """TRL takes it from the weight of the head, and from what the config says is done behind it."""
    trainer, _ = fine_tune(config=config, learning_rate=0.0)
    dataset = trainer.train_dataset
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batches = [list(batch) for batch in trainer.get_train_dataloader().batch_sampler][:2]
    for found, rows in zip(losses, batches, strict=True):
        inputs = trainer.data_collator([dataset[i] for i in rows])
        with torch.no_grad():
            logits = trainer.model.eval()(inputs["input_ids"], inputs["attention_mask"]).logits
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        )
        assert float(found) == pytest.approx(expected.item(), rel=1e-4)


def test_losses_that_trl_skips_are_named_once(fine_tune, caplog):
    logging = pytest.importorskip("transformers").utils.logging
    logging.get_logger("hybrid.modeling.training_losses").warning_once.cache_clear()
    fine_tune(config={"z_loss": 0.1, "num_mtp_layers": 1})
    lines = [r.message for r in caplog.records if "add nothing to the loss" in r.message]
    assert len(lines) == 1
    assert "z_loss, num_mtp_layers" in lines[0]


def test_lora_adapters_are_trained_saved_and_reloaded(
    fine_tune, build, tmp_path, assert_same_weights, assert_close_to_rounding
):
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, before = fine_tune(config)
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    with torch.no_grad():  # as the adapters that are read back, which do not train
        expected = trainer.model.eval()(ids).logits
    fresh = build(layout="LSD", vocab_size=259, dtype=torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert not torch.allclose(fresh(ids).logits, expected)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert_same_weights(reloaded, trainer.model)
    assert_close_to_rounding(reloaded(ids).logits, expected)
