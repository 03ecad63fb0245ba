"""Prompts in the chat template of an instruct model, with an answer prefix as in RULER.

``chat=True`` is the tokenizer's own template. RULER has a fixed one for each family of models that
it was published with (NVIDIA/RULER, scripts/data/template.py): ``chat="meta-llama3"`` and so on
make a figure comparable with those.
"""

from dataclasses import replace
from typing import Any

from ..errors import nearest
from .sample import TextSample

# additional tokens at the boundaries of a prompt and a template
_SPARE = 4
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_RWKV = (
    "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in full "
    "details. Please feel free to ask any question and I will always answer it"
)
_COMMAND_R = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
# RULER's templates by RULER's names: text before and after the prompt
TEMPLATES: dict[str, tuple[str, str]] = {
    "base": ("", ""),
    "meta-chat": ("[INST] ", " [/INST]"),
    "vicuna-chat": (f"{_VICUNA} USER: ", " ASSISTANT:"),
    "lwm-chat": ("You are a helpful assistant. USER: ", " ASSISTANT: "),
    "command-r-chat": (
        f"<BOS_TOKEN>{_COMMAND_R[0]}<|USER_TOKEN|>",
        f"{_COMMAND_R[1]}{_COMMAND_R[0]}<|CHATBOT_TOKEN|>",
    ),
    "chatglm-chat": ("[gMASK]sop<|user|> \n ", "<|assistant|> \n "),
    "RWKV": (f"{_RWKV}\n\nUser: ", "\n\nAssistant:"),
    "Phi3": ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    "meta-llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "jamba": (
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> ",
        "<|eom|><|bom|><|assistant|>",
    ),
    "nemotron5-instruct": (
        "<SPECIAL_10>System\n\n<SPECIAL_11>User\n",
        "\n<SPECIAL_11>Assistant\n",
    ),
}


def check_template(chat: bool | str) -> None:
    """Refuse an unknown name of a template of RULER.

    Raises:
        ValueError: the message has the nearest name.
    """
    if isinstance(chat, str) and chat not in TEMPLATES:
        raise ValueError(f"template: unknown name {chat!r}{nearest(chat, TEMPLATES)}")


def chat_text(tokenizer: Any, prompt: str, begun: str = "", chat: bool | str = True) -> str:
    """Return a prompt as the user's turn, and the beginning of the answer.

    Args:
        tokenizer: the model's.
        prompt: of the user.
        begun: how the answer begins.
        chat: True is the tokenizer's template, a name one of :data:``TEMPLATES``.

    Raises:
        ValueError: the tokenizer has no chat template, or there is none of that name.
    """
    check_template(chat)
    if isinstance(chat, str):
        before, behind = TEMPLATES[chat]
        # RULER begins the answer with a space in every template
        return f"{before}{prompt}{behind}" + (f" {begun}" if begun else "")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"chat: the tokenizer ({type(tokenizer).__name__}) has no chat template; leave --chat "
            "out, name a tokenizer that has one (--tokenizer PATH), or one of RULER's templates "
            "(--template NAME)"
        )
    turn = [{"role": "user", "content": prompt}]
    opened = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return f"{opened}{begun}"


def needs_special(tokenizer: Any, chat: bool | str) -> bool:
    """Return whether the tokenizer's special tokens must be added before a text in this template.

    The tokenizer's template has them; of RULER's, those that begin with the token itself have.
    """
    if not isinstance(chat, str):
        return False
    first = getattr(tokenizer, "bos_token", None)
    return not (first and TEMPLATES[chat][0].startswith(first))


def text_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the ids of a text, with the tokenizer's special tokens in front or without."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def template_tokens(tokenizer: Any, chat: bool | str = True) -> int:
    """Return the number of tokens to reserve for the template."""
    plain = len(tokenizer("a b", verbose=False)["input_ids"])
    text = chat_text(tokenizer, "a", "b", chat)
    ids = text_ids(tokenizer, text, special=needs_special(tokenizer, chat))
    return max(0, len(ids) - plain) + _SPARE


def in_chat(sample: TextSample, tokenizer: Any, length: int, chat: bool | str = True) -> TextSample:
    """Return a sample as the user's turn of a chat.

    Token positions of the plain prompt are no longer valid and are omitted.

    Args:
        sample: made for ``length`` less the tokens of the template.
        tokenizer: the model's.
        length: tokens that the sample may take.
        chat: as of :func:``chat_text``.

    Raises:
        ValueError: no chat template, or one that takes more tokens in this prompt than in another.
    """
    text = chat_text(tokenizer, sample.prompt, sample.answer_prefix, chat)
    special = needs_special(tokenizer, chat)
    tokens = len(text_ids(tokenizer, text, special=special))
    slack = length - sample.max_new_tokens - tokens
    if slack < 0:
        raise ValueError(
            f"{sample.task}: the chat template takes {-slack} tokens more in one prompt than in "
            "another; ask for a plain prompt"
        )
    return replace(
        sample,
        chat=text,
        template=chat if isinstance(chat, str) else "chat",
        special=special,
        length=length,
        prompt_tokens=tokens,
        slack=slack,
        needle_positions=(),
    )
