"""The chat templates of real models, as TRL ships them, with every kind of conversation.

TRL's training forms of the templates mark what the assistant generates, which is one reference; the
texts of the conversations are the other. docs/CHAT_TEMPLATES.md is written by this test:
`LORAX_FT_WRITE_DOCS=1 python -m pytest tests/parity/test_chat_templates.py`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lorax_ft.data.chat import describe_row, encode
from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.data.located import Located
from lorax_ft.data.masks import TurnFinder
from lorax_ft.data.template import render
from lorax_ft.interop.chat_template import use_template

DOCS = Path(__file__).parents[2] / "docs" / "CHAT_TEMPLATES.md"
SPECIAL = re.compile(
    r"<\|[^|<>\s{}]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_(?:turn|utterance)>|<turn\|>|<\|turn>"
    r"|<\|?tool(?:_call|_response)?\|?>|<\|channel>|<channel\|>|\[gMASK\]|<sop>"
)
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# What ends an earlier and the last turn of the assistant, and what the model generates before an
# answer, by the start of the template's name. The defaults are ChatML's.
ENDS = {
    "cohere2": ["<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>"],
    "gemma4": ["<turn|>"],
    "gemma": ["<end_of_turn>"],
    "glm4moe": [""],  # the next role's token ends a turn, and the template writes it for that role
    "gptoss": ["<|end|>", "<|return|>"],
    "idefics3": ["<end_of_utterance>"],
    "llama3": ["<|eot_id|>"],
    "llava": ["</s>"],
    "muse": ["<|eot|>"],
    "phi3": ["<|end|>", "<|end|>\n<|endoftext|>"],
    "smolvlm": ["<end_of_utterance>"],
}
LEADS = {
    "gptoss": "<|channel|>final<|message|>",
    "idefics3": " ",
    "llava": " ",
    "muse": " to=user<|message|>",
    "smolvlm": " ",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "sunny"}


def user(number: int) -> Message:
    return {"role": "user", "content": f"question {number}?"}


def answer(number: int, **more: Any) -> Message:
    return {"role": "assistant", "content": f"answer {number}", **more}


def thought(number: int) -> str:
    return f"<think>\nreason {number}\n</think>\n\nanswer {number}"


TWO = [user(1), answer(1), user(2), answer(2)]
KINDS = {
    "one turn": Conversation(messages=TWO[:2]),
    "two turns": Conversation(messages=TWO),
    "three turns": Conversation(messages=[*TWO, user(3), answer(3)]),
    "system": Conversation(messages=[{"role": "system", "content": "a system text"}, *TWO]),
    "assistant first": Conversation(messages=[answer(0), *TWO]),
    "reasoning": Conversation(
        messages=[
            user(1),
            answer(1, reasoning_content="reason 1"),
            user(2),
            answer(2, reasoning_content="reason 2"),
        ]
    ),
    "thoughts in content": Conversation(
        messages=[
            user(1),
            {"role": "assistant", "content": thought(1)},
            user(2),
            {"role": "assistant", "content": thought(2)},
        ]
    ),
    "tools": Conversation(
        messages=[
            user(1),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            RESULT,
            answer(1),
            user(2),
            answer(2),
        ],
        tools=TOOLS,
    ),
}


def templates() -> dict[str, str]:
    """All chat templates in TRL's wheel, by name; TRL itself is not imported."""
    try:
        files = importlib.metadata.files("trl") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for file in files:
        if file.suffix == ".jinja":
            found[file.stem] = Path(str(file.locate())).read_text(encoding="utf-8")
    return dict(sorted(found.items()))


TEMPLATES = templates()
pytestmark = pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")


def by_name(table: dict[str, Any], name: str, default: Any) -> Any:
    longest_first = sorted(table, key=len, reverse=True)
    return next((table[start] for start in longest_first if name.startswith(start)), default)


def make_tokenizer(name: str) -> Any:
    """A byte-level tokenizer with the special tokens that the template writes."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = by_name(ENDS, name, ["<|im_end|>"])[-1].split("\n")[-1] or "<|endoftext|>"
    special = sorted({*SPECIAL.findall(TEMPLATES[name]), end, "<bos>"} - {*ADDED})
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ADDED])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token="<bos>",
        chat_template=TEMPLATES[name],
        additional_special_tokens=special,
    )


def labels(located: Located, conversation: Conversation, reasoning: Any = "data") -> list[str]:
    spans = located.label_spans(conversation, loss_on="assistant", reasoning=reasoning)
    return [located.text[start:end] for start, end in spans]


def locate(name: str, kind: str) -> Located:
    return TurnFinder(make_tokenizer(name)).locate(KINDS[kind], where="the row")


def outcome(name: str, kind: str) -> str:
    """An empty text, or why the conversation is refused."""
    try:
        locate(name, kind)
    except ValueError as error:
        return str(error).removeprefix("the row").lstrip(":, ")
    return ""


PAIRS = list(itertools.product(TEMPLATES, KINDS))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_masks(name: str, kind: str) -> None:
    """What counts is the assistant's text and its end-of-turn token, or what TRL's marks say."""
    refused = outcome(name, kind)
    if refused:
        # The template raises, or does not write the calls; nothing else is refused.
        assert re.match(
            r"the chat template rejects this conversation|turn 2: the chat template does not write "
            r"the tool calls",
            refused,
        )
        return
    conversation = KINDS[kind]
    located = locate(name, kind)
    got = labels(located, conversation)
    if "{% generation %}" in TEMPLATES[name] or "{%- generation" in TEMPLATES[name]:
        tokenizer = make_tokenizer(name)
        rendered = render(conversation, tokenizer, form=located.form)
        marked = "".join(rendered.text[start:end] for start, end in rendered.generated)
        assert "".join(labels(located, conversation, reasoning="all")) == marked
    else:
        check_contents(name, kind, got)
    joined = "".join(got)
    for text in ("question", "system text", "sunny"):
        assert text not in joined
    for message in conversation.messages:
        if message["role"] == "assistant":
            assert message["content"].split("\n")[-1] in joined


def check_contents(name: str, kind: str, got: list[str]) -> None:
    ends = by_name(ENDS, name, ["<|im_end|>"])
    lead = by_name(LEADS, name, "")
    if kind == "tools":
        called, *got = got
        assert "get_weather" in called
        assert "Paris" in called
        assert got == [f"{lead}answer 1{ends[0]}", f"{lead}answer 2{ends[-1]}"]
    elif kind in ("reasoning", "thoughts in content"):
        assert len(got) == 2
        assert got[0].endswith("answer 1" + ends[0])
        assert got[1].endswith("answer 2" + ends[-1])
        assert not re.search(r"<think>\s*</think>", "".join(got))
    else:
        first = 0 if kind == "assistant first" else 1
        last = first + len(got) - 1
        if first == 0 and not lead.strip():
            # The space before an opening answer may be the template's or the answer's.
            got[0] = lead + got[0].lstrip()
        assert got == [
            f"{lead}answer {number}{ends[-1] if number == last else ends[0]}"
            for number in range(first, last + 1)
        ]
        count = sum(message["role"] == "assistant" for message in KINDS[kind].messages)
        assert len(got) == count


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_that_count_are_those_of_the_spans(name: str) -> None:
    located = locate(name, "two turns")
    tokenizer = make_tokenizer(name)
    sample = encode(KINDS["two turns"], tokenizer, max_length=100_000)
    counted = [text for text, counts in describe_row(tokenizer, sample) if counts]
    assert "".join(counted) == "".join(labels(located, KINDS["two turns"]))


def test_the_table_in_docs() -> None:
    """The table of templates and kinds is what the code does today."""
    version = importlib.metadata.version("trl")
    reasons: dict[str, int] = {}
    rows = []
    works = 0
    for name in TEMPLATES:
        cells = []
        for kind in KINDS:
            refused = outcome(name, kind)
            if refused:
                number = reasons.setdefault(refused, len(reasons) + 1)
                cells.append(f"refused ({number})")
            else:
                cells.append("yes")
                works += 1
        rows.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    text = HEAD.format(
        version=version,
        templates=len(TEMPLATES),
        kinds=len(KINDS),
        conversations=len(PAIRS),
        works=works,
        refused=len(PAIRS) - works,
        columns=" | ".join(KINDS),
        rule=" | ".join(["---"] * (1 + len(KINDS))),
        rows="\n".join(rows),
        reasons="\n".join(f"{number}. {reason}" for reason, number in reasons.items()),
    )
    if os.environ.get("LORAX_FT_WRITE_DOCS"):
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text


HEAD = """# Chat templates

Which conversations can be trained on with which chat template. The templates are those of TRL
{version}, as its models have them; those ending in `_training` are its own variants, which mark
what the assistant generates with `{{% generation %}}`. This table is written and checked by
`tests/parity/test_chat_templates.py`.

Of {conversations} pairs of {templates} templates and {kinds} kinds of conversation, {works} work,
and {refused} are refused, all because the template itself does not take or write them. "yes" means
that the loss counts the assistant's text and its end-of-turn token, and nothing of the other roles.

| template | {columns} |
| {rule} |
{rows}

Why conversations are refused:

{reasons}

The assistant's turns are found by rendering a conversation twice: as it is, and with marks around
its texts, which show where the template put them. `{{% generation %}}` marks in the template come
first. A thought that the template adds, such as Qwen3's empty `<think></think>`, does not count
unless `--data.reasoning_loss all` is given; `none` leaves out all reasoning.
"""


# LLaMA-Factory's name for a model's template, the model's own one, and how the two differ.
NAMED = (
    ("cohere", "cohere", ""),
    ("deepseek3", "deepseekv3", ""),
    ("deepseekr1", "deepseek_r1_distill", r"writes '.*<think>.* where"),
    ("gemma", "gemma", r"an error \(System role"),
    ("gemma3", "gemma3", ""),
    ("lfm2", "lfm2", r"writes '<\|im_start\|>system.* where that writes '<bos>"),
    ("llama3", "llama3", ""),
    ("llama3", "llama3_1", "user.* where that writes '.*system"),
    ("llama3", "llama3_2", "user.* where that writes '.*system"),
    ("phi", "phi3", r"where that writes '.*<\|endoftext\|>"),
    ("qwen", "qwen2_5", ""),
    ("qwen2_vl", "qwen2_5_vl", ""),
    ("qwen3", "qwen3", ""),
    ("qwen3_nothink", "qwen3_instruct_2507", ""),
)


@pytest.mark.parametrize(("theirs", "own", "difference"), NAMED)
def test_templates_of_llama_factory_beside_the_own_ones(
    theirs: str, own: str, difference: str
) -> None:
    """What docs/OTHER_CONFIGS.md says of them."""
    tokenizer = make_tokenizer(own)
    if not difference:
        use_template(tokenizer, theirs)
        assert tokenizer.chat_template == TEMPLATES[own]
        return
    with pytest.warns(UserWarning, match=difference):
        use_template(tokenizer, theirs)
    assert tokenizer.chat_template != TEMPLATES[own]
