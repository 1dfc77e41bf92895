"""Chat templates by the names that LLaMA-Factory has for them, written as Jinja.

A format is what stands around a system message, a question and an answer; the names of tokens are
in braces. The formats are facts about models; the names are those of LLaMA-Factory's `template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Format(NamedTuple):
    """How conversations are written: {content}, and the tokenizer's tokens {bos} and {eos}."""

    user: str
    """A question, up to where the answer starts."""
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    prefix: str = ""
    """The start of a conversation."""
    default_system: str = ""
    """The system message of a conversation that has none."""
    system_in_question: bool = False
    """Whether the system message is part of the first question's content."""
    ends: str = ""
    """What follows the last answer."""
    thinks: bool = False
    """Whether answers without thoughts start with an empty one."""


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def _chatml(**others: Any) -> Format:
    """ChatML, with some parts changed."""
    return Format(
        "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        "{content}<|im_end|>\n",
        "<|im_start|>system\n{content}<|im_end|>\n",
    )._replace(**others)


_GEMMA = Format(
    "<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
    "{content}<end_of_turn>\n",
    "{content}\n\n",
    prefix="{bos}",
    system_in_question=True,
)
_LLAMA_3 = Format(
    "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "{content}<|eot_id|>",
    "<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    prefix="{bos}",
)
_MISTRAL = Format(
    "[INST] {content}[/INST]",
    " {content}{eos}",
    "{content}\n\n",
    prefix="{bos}",
    system_in_question=True,
)
_DEEPSEEK = Format("<｜User｜>{content}<｜Assistant｜>", prefix="{bos}")
_GRANITE = Format(
    "<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "{content}<|end_of_text|>\n",
    "<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
)

FORMATS: Mapping[str, Format] = {
    "alpaca": Format(
        "### Instruction:\n{content}\n\n### Response:\n",
        "{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n",
    ),
    "chatml": _chatml(),
    "cohere": Format(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
        prefix="{bos}",
    ),
    "deepseek": Format("User: {content}\n\nAssistant:", system="{content}\n\n", prefix="{bos}"),
    "deepseek3": _DEEPSEEK,
    "deepseekr1": _DEEPSEEK._replace(thinks=True),
    "default": Format(
        "Human: {content}{eos}\nAssistant:", "{content}{eos}\n", "System: {content}{eos}\n"
    ),
    "empty": Format("{content}", "{content}"),
    "exaone": Format(
        "[|user|]{content}\n[|assistant|]", "{content}{eos}\n", "[|system|]{content}[|endofturn|]\n"
    ),
    "falcon": Format("User: {content}\nFalcon:", "{content}\n", ends="{eos}"),
    "falcon_h1": _chatml(prefix="{bos}"),
    "fewshot": Format("{content}", "{content}\n\n", ends="{eos}"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA._replace(ends="{eos}"),
    "gemma3": _GEMMA,
    "glm4": Format(
        "<|user|>\n{content}<|assistant|>",
        "\n{content}",
        "<|system|>\n{content}",
        prefix="[gMASK]<sop>",
        ends="{eos}",
    ),
    "granite3": _GRANITE,
    "granite4": _GRANITE._replace(
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant."
    ),
    "lfm2": _chatml(default_system="You are a helpful AI assistant."),
    "llama2": Format(
        "{bos}[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_question=True,
    ),
    "llama3": _LLAMA_3,
    "llama4": Format(
        "<|header_start|>user<|header_end|>\n\n{content}<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
        "{content}<|eot|>",
        "<|header_start|>system<|header_end|>\n\n{content}<|eot|>",
        prefix="{bos}",
    ),
    "ministral": _MISTRAL._replace(user="[INST]{content}[/INST]", assistant="{content}{eos}"),
    "mistral": _MISTRAL,
    "mistral_small": Format(
        "[INST]{content}[/INST]",
        system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
        prefix="{bos}",
    ),
    "olmo": Format("<|user|>\n{content}<|assistant|>\n", prefix="{eos}"),
    "openchat": Format("GPT4 Correct User: {content}{eos}GPT4 Correct Assistant:", prefix="{bos}"),
    "phi": Format(
        "<|user|>\n{content}<|end|>\n<|assistant|>\n",
        "{content}<|end|>\n",
        "<|system|>\n{content}<|end|>\n",
    ),
    "phi4": Format(
        "<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        "{content}<|im_end|>",
        "<|im_start|>system<|im_sep|>{content}<|im_end|>",
    ),
    "phi4_mini": Format(
        "<|user|>{content}<|end|><|assistant|>", "{content}<|end|>", "<|system|>{content}<|end|>"
    ),
    "qwen": _chatml(
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "qwen2_vl": _chatml(default_system="You are a helpful assistant."),
    "qwen3": _chatml(thinks=True),
    "qwen3_nothink": _chatml(),
    "smollm": _chatml(),
    "smollm2": _chatml(
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    ),
    "solar": Format(
        "### User:\n{content}\n\n### Assistant:\n",
        "{content}",
        "### System:\n{content}\n\n",
        ends="{eos}",
    ),
    "starchat": Format(
        "<|user|>\n{content}<|end|>\n<|assistant|>",
        "{content}<|end|>\n",
        "<|system|>\n{content}<|end|>\n",
    ),
    "vicuna": Format(
        "USER: {content} ASSISTANT:",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _chatml(),
    "zephyr": Format(
        "<|user|>\n{content}{eos}<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}


def jinja(form: Format) -> str:
    """A format as a chat template. It takes system messages, questions and answers, and no tools.

    The start of an answer belongs to the question, so it is there with and without
    `add_generation_prompt`.
    """
    system = _written(form.system, "system")
    answer = _written(form.assistant, "content")
    if form.thinks:
        thought = json.dumps(EMPTY_THOUGHT)
        answer = f"{{% if '<think>' not in content %}}{{{{ {thought} }}}}{{% endif %}}" + answer
    parts = [
        _written(form.prefix),
        "{% set turns = messages %}",
        f"{{% set system = {json.dumps(form.default_system, ensure_ascii=False)} %}}",
        "{% if messages[0]['role'] == 'system' %}",
        "{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}",
        "{% endif %}",
    ]
    if not form.system_in_question:
        parts.append(f"{{% if system %}}{system}{{% endif %}}")
    parts += [
        "{% for message in turns %}{% set content = message['content'] %}",
        "{% if message['role'] == 'user' %}",
    ]
    if form.system_in_question:
        before, _, after = form.user.partition("{content}")
        first = f"{{% if loop.first and system %}}{system}{{% endif %}}"
        parts += [_written(before), first, _written("{content}" + after, "content")]
    else:
        parts.append(_written(form.user, "content"))
    parts += [
        "{% elif message['role'] == 'assistant' and not message.tool_calls %}",
        answer,
        f"{{% if loop.last %}}{_written(form.ends)}{{% endif %}}",
        "{% else %}{{ raise_exception('this chat template takes a system message, questions and "
        "answers; for tools, give another one as model.chat_template') }}{% endif %}",
        "{% endfor %}",
    ]
    return "".join(parts)


def _written(text: str, content: str = "") -> str:
    """A text of a format in Jinja, where `content` is the variable of {content}.

    Texts are literals in braces: Jinja would drop a line's end behind a block.
    """
    variables = {"{content}": content, "{bos}": "bos_token", "{eos}": "eos_token"}
    pieces = re.split(r"(\{\w+\})", text)
    shown = [
        variables.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces if piece
    ]
    return "".join(f"{{{{ {piece} }}}}" for piece in shown)
