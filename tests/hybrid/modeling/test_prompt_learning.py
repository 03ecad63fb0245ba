"""PEFT's learnt prompts: virtual tokens before the text, in embeddings or in the cache."""

import pytest
import torch
from torch.testing import assert_close

import hybrid

peft = pytest.importorskip("peft")

# PEFT 0.21 asks transformers by a name that is about to go
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient"),
]

MIXERS = {"S": {"num_heads": 4, "num_kv_heads": 2}, "L": {"num_heads": 2}, "C": {"type": "rg_lru"}}
PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


def adapted(build, layout, config):
    model = build(dtype=torch.float32, layout=layout, mixers={s: MIXERS[s] for s in set(layout)})
    model.generation_config.eos_token_id = None
    return peft.get_peft_model(model, config)


def greedy(model, x, mask):
    with torch.no_grad():
        return model.generate(
            input_ids=x, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
        )[:, x.shape[1] :]


@pytest.mark.compat
@pytest.mark.parametrize("layout", ["SS", "LL", "LS", "CC"])
@pytest.mark.parametrize("method", sorted(PROMPTS))
def test_prompts_are_learnt_and_heeded_in_every_step(build, ids, method, layout, tmp_path):
    config = PROMPTS[method]()
    model = adapted(build, layout, config)
    x = ids(2, 7)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    model(input_ids=x, attention_mask=mask, labels=x).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    tokens, text = greedy(model, x, mask), x
    for step in range(4):  # the same tokens as from the whole text, prompt and all, each time
        whole = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = model(input_ids=text, attention_mask=whole).logits[:, -1]
        assert torch.equal(logits.argmax(-1), tokens[:, step])
        text = torch.cat([text, tokens[:, step : step + 1]], dim=1)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        adapted(build, layout, config).get_base_model(), tmp_path
    )
    assert_close(again(input_ids=x).logits, model(input_ids=x).logits)


@pytest.mark.compat
def test_a_prefix_is_in_the_cache_of_softmax_layers(build, ids):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = adapted(build, "SS", config).eval()
    # key heads of grouped attention, read from the config
    assert (config.num_attention_heads, config.token_dim) == (2, 2 * 8)
    x = ids(2, 7)
    mask = torch.ones_like(x)
    with torch.no_grad():
        first = model(input_ids=x, attention_mask=mask).logits[:, -1].argmax(-1)
    assert torch.equal(greedy(model, x, mask)[:, 0], first)


def test_a_prefix_has_no_place_in_a_state(build, ids):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = adapted(build, "LS", config)
    with pytest.raises(ValueError, match="layer 0 of this cache cannot hold a recurrent state"):
        model(input_ids=ids(1, 5))


def test_sizes_that_peft_looks_up_are_no_keys_of_the_config():
    config = hybrid.HybridConfig(layout="LS", mixers={"S": MIXERS["S"], "L": MIXERS["L"]})
    values = config.to_dict()
    assert "num_attention_heads" in values
    assert values["num_attention_heads"] == values.get("num_attention_heads") == 4
    assert values["num_key_value_heads"] == 2
    assert "num_attention_heads" not in dict(values)
    assert "num_attention_heads" not in config.to_json_string()
    wider = hybrid.HybridConfig(**{**values, "hidden_size": 256})
    assert wider.head_dim == 64
