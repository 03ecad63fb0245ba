"""TRL's trainers of preferences, rewards and policies on hybrids, against losses computed here."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hybrid.tokenizer import byte_tokenizer

trl = pytest.importorskip("trl")

# TRL 1.16 asks transformers 5.23 by names that are about to go
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

MODELS = {
    "plain": {"layout": "LLLS"},
    "muP, cap, untied": {
        "layout": "LSD",
        "mup_base_width": 16,
        "init": "fixed",
        "logits_multiplier": 3.0,
        "logit_softcap": 2.0,
        "tie_word_embeddings": False,
    },
}
PREFERENCES = [
    {"prompt": f"{i} plus {i} is ", "chosen": f"{i + i}.", "rejected": "no " * (1 + i % 3)}
    for i in range(8)
]


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def language_model(request, build, tmp_path):
    """Models from a checkpoint, by whose name TRL finds the reference."""

    def make(seed=0):
        folder = tmp_path / f"model-{seed}"
        if not folder.exists():
            model = build(vocab_size=259, dtype=torch.float32, seed=seed, **request.param)
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return make


@pytest.fixture
def arguments(tmp_path):
    """Options of any trainer of TRL: two steps on a CPU, at whose losses nothing moves."""

    def make(config, **options):
        return config(
            output_dir=str(tmp_path / "run"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            disable_tqdm=True,
            **{
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 0.0,
                "per_device_train_batch_size": 4,
                **options,
            },
        )

    return make


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def log_prob_of(model, prompt, completion_ids):
    """Sum of the log probabilities of the ids of a completion, of one row without padding."""
    start = byte_tokenizer()(prompt)["input_ids"]
    ids = torch.tensor([start + list(completion_ids)])
    with torch.no_grad():
        scores = model.eval()(ids).logits[0].log_softmax(-1)
    index = torch.arange(len(start), ids.shape[1])
    return scores[index - 1, ids[0, index]].sum()


def log_prob(model, prompt, completion):
    """Log probability of the text of a completion, with the token of the end."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    return log_prob_of(model, prompt, ids)


@pytest.mark.parametrize("reference", ["the same", "another"])
def test_dpo_is_the_loss_of_its_paper(language_model, arguments, reference):
    """Equation 7 of https://arxiv.org/abs/2305.18290; log 2 where policy and reference are one."""
    policy = language_model()
    other = language_model(seed=int(reference == "another"))
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=other,
        args=arguments(trl.DPOConfig, beta=0.3, max_steps=1, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    policy, other = language_model(), language_model(seed=int(reference == "another"))
    margins = [
        log_prob(policy, row["prompt"], row["chosen"])
        - log_prob(other, row["prompt"], row["chosen"])
        - log_prob(policy, row["prompt"], row["rejected"])
        + log_prob(other, row["prompt"], row["rejected"])
        for row in PREFERENCES
    ]
    expected = -logsigmoid(0.3 * torch.stack(margins)).mean().item()
    assert losses(trainer) == [pytest.approx(expected, rel=1e-4)]
    if reference == "the same":
        assert expected == pytest.approx(math.log(2), rel=1e-6)
    else:
        assert abs(expected - math.log(2)) > 1e-2


def test_dpo_moves_every_weight_towards_what_is_preferred(language_model, arguments):
    trainer = trl.DPOTrainer(
        model=language_model(),
        args=arguments(trl.DPOConfig, learning_rate=1e-2, max_steps=2),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=byte_tokenizer(),
    )
    before = language_model().state_dict()
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(math.log(2), rel=1e-4)
    assert second < first
    assert [n for n, v in trainer.model.state_dict().items() if torch.equal(v, before[n])] == []


def test_rewards_are_those_of_the_last_token(language_model, arguments):
    """Bradley and Terry's loss on the classification head, as of each row by itself."""
    config = language_model().config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    tokenizer = byte_tokenizer()
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments(trl.RewardConfig, max_steps=1, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )
    trainer.train()

    def reward(text):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            return model.eval()(ids).logits[0, 0]

    margins = [
        reward(row["prompt"] + row["chosen"]) - reward(row["prompt"] + row["rejected"])
        for row in PREFERENCES
    ]
    expected = -logsigmoid(torch.stack(margins)).mean().item()
    assert losses(trainer) == [pytest.approx(expected, rel=1e-4)]
    assert abs(expected - math.log(2)) > 1e-4


PROMPTS = ["ab", "abcdef", "x", "what is it"]


@pytest.fixture
def grpo(language_model, arguments):
    """One step of GRPO; returns the trainer, and pairs of a prompt and a completion that it saw."""

    def run(reward, **options):
        seen = []

        def rewards(prompts, completion_ids, **_):
            seen.extend(zip(prompts, completion_ids, strict=True))
            return [reward(ids) for ids in completion_ids]

        trainer = trl.GRPOTrainer(
            model=language_model(),
            reward_funcs=rewards,
            args=arguments(
                trl.GRPOConfig, max_steps=1, max_completion_length=6, beta=0.1, **options
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=byte_tokenizer(),
        )
        trainer.train()
        return trainer, seen

    return run


def greedy(model, prompt, tokens):
    """Continue by the likeliest tokens, without a cache and without padding."""
    ids = byte_tokenizer()(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + tokens and ids[-1] != byte_tokenizer().eos_token_id:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[start:]


def test_grpo_completes_by_the_policy(grpo, language_model):
    """At a temperature of almost nothing completions are the likeliest tokens."""
    _, seen = grpo(len, temperature=1e-6, num_generations=2)
    assert len({prompt for prompt, _ in seen}) == 2
    for prompt, completion in seen:
        assert list(completion) == greedy(language_model().eval(), prompt, 6)


def test_grpo_makes_what_is_rewarded_likelier(grpo, language_model):
    trainer, seen = grpo(
        lambda ids: sum(i < 128 for i in ids), learning_rate=1e-2, num_generations=4
    )
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)  # of the first step
    rewards = torch.tensor([float(sum(i < 128 for i in ids)) for _, ids in seen])
    assert rewards.std() > 0
    before, after = (
        torch.stack([log_prob_of(model.eval(), *pair) for pair in seen])
        for model in (language_model(), trainer.model)
    )
    assert ((rewards - rewards.mean()) * (after - before)).sum() > 0
