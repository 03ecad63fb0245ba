"""Prompts in the chat template of an instruct model, the answer begun for it as RULER does."""

from dataclasses import replace
from typing import Any

from .sample import TextSample

# what joining a prompt and the words of a template may add
_SPARE = 4


def chat_text(tokenizer: Any, prompt: str, begun: str = "") -> str:
    """Return a prompt as the user's turn, and the beginning of the answer.

    Args:
        tokenizer: the model's.
        prompt: of the user.
        begun: how the answer begins.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"chat: the tokenizer ({type(tokenizer).__name__}) has no chat template; leave --chat "
            "out, or name a tokenizer that has one (--tokenizer PATH)"
        )
    turn = [{"role": "user", "content": prompt}]
    opened = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return f"{opened}{begun}"


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def template_tokens(tokenizer: Any) -> int:
    """Return the tokens to keep free for the template."""
    plain = len(tokenizer("a b", verbose=False)["input_ids"])
    return max(0, len(chat_ids(tokenizer, chat_text(tokenizer, "a", "b"))) - plain) + _SPARE


def in_chat(sample: TextSample, tokenizer: Any, length: int) -> TextSample:
    """Return a sample as the user's turn of a chat.

    Token positions in the plain prompt do not hold any more and are left out.

    Args:
        sample: made for ``length`` less the tokens of the template.
        tokenizer: the model's.
        length: tokens that the sample may take.

    Raises:
        ValueError: no chat template, or one that takes more tokens in this prompt than in another.
    """
    text = chat_text(tokenizer, sample.prompt, sample.answer_prefix)
    tokens = len(chat_ids(tokenizer, text))
    slack = length - sample.max_new_tokens - tokens
    if slack < 0:
        raise ValueError(
            f"{sample.task}: the chat template takes {-slack} tokens more in one prompt than in "
            "another; ask for a plain prompt"
        )
    return replace(
        sample, chat=text, length=length, prompt_tokens=tokens, slack=slack, needle_positions=()
    )
