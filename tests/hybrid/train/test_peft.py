"""Fine-tuning a hybrid with PEFT under transformers' own `Trainer`."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hybrid.data import Mixture, RowCollator
from hybrid.data.sources import RowFormat, SourceConfig, open_source
from hybrid.tokenizer import byte_tokenizer

peft = pytest.importorskip("peft")


# peft 0.21 asks transformers 5.23 by a name that is about to go
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_on_the_projections_trains_saves_and_reloads(
    build, tmp_path, assert_same_weights, assert_close_to_rounding
):
    base = build(layout="LSN", vocab_size=259, dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    for layer in range(3):
        assert any(f"layers.{layer}.mixer." in name for name in adapted), layer
    rows = open_source(SourceConfig(source="stdlib"), byte_tokenizer(), RowFormat(32, 256), 0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Mixture([rows], [1.0], 4, 0),
        data_collator=RowCollator(),
    )
    trainer.train()
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == len(adapted)
    model.save_pretrained(tmp_path / "adapter")

    ids = torch.arange(20)[None]
    with torch.no_grad():  # as the adapters that are read back, which do not train
        expected = model.eval()(ids).logits
    fresh = build(layout="LSN", vocab_size=259, dtype=torch.float32)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.allclose(fresh(ids).logits, expected)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert_same_weights(reloaded, model)
    assert_close_to_rounding(reloaded(ids).logits, expected)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
