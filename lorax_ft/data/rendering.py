"""Renders conversations with one tokenizer's template, and finds their texts in what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence

from lorax_ft.data.conversation import Conversation
from lorax_ft.data.marks import THOUGHT, Piece, mark
from lorax_ft.data.template import FORMS, PARTS, Form, Rendered, Tokenizer, render


@dataclasses.dataclass(frozen=True)
class Written:
    """A conversation as the template writes it."""

    rendered: Rendered
    form: Form
    """The form of the messages that the template took."""
    pieces: list[Piece] | None
    """Where the texts of the conversation stand; None if marks change what the template writes."""
    unwritten: list[str]
    """What the template does not write, such as "tool calls"."""


class Renderer:
    """Renders conversations in the form of messages that the template takes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The form that the last conversation needed: it is tried first.
        self._form = FORMS[0]

    def write(self, conversation: Conversation, *, prompt: bool, where: str) -> Written:
        """Renders in the first form in which the template writes all texts.

        Raises:
          ValueError: the template rejects the conversation in every form.
        """
        error: ValueError | None = None
        best: Written | None = None
        for form in _forms(conversation, first=self._form):
            try:
                written = self.write_in(form, conversation, prompt=prompt, where=where)
            except ValueError as problem:
                # Another form would take as long.
                if isinstance(problem.__cause__, TimeoutError):
                    raise
                error = error or problem
                continue
            if form.parts and PARTS in written.rendered.text:
                continue  # The template wrote the list itself.
            if best is None or len(written.unwritten) < len(best.unwritten):
                best = written
            if not written.unwritten:
                break
        if best is None:
            assert error is not None
            raise error
        self._form = best.form
        return best

    def write_in(
        self,
        form: Form,
        conversation: Conversation,
        *,
        prompt: bool,
        where: str,
    ) -> Written:
        """Renders in this form.

        Raises:
          ValueError: the template rejects the conversation.
        """
        rendered = self.render_in(form, conversation, prompt=prompt, where=where)
        # A template may look at the start of a user's text, and then write something else.
        for only_assistant in (False, True):
            pieces = self._pieces(conversation, rendered.text, form, prompt, only_assistant)
            if pieces is None:
                continue
            roles = {message["role"] for message in conversation.messages}
            if only_assistant:
                roles &= {"assistant"}
            unwritten = _unwritten(conversation, pieces, roles)
            return Written(rendered, form, pieces, unwritten)
        return Written(rendered, form, None, [])

    def render_in(
        self,
        form: Form,
        conversation: Conversation,
        *,
        prompt: bool,
        where: str,
    ) -> Rendered:
        """Renders in this form, without looking for the texts.

        Raises:
          ValueError: the template rejects the conversation.
        """
        return render(conversation, self._tokenizer, form=form, prompt=prompt, where=where)

    def _pieces(
        self,
        conversation: Conversation,
        text: str,
        form: Form,
        prompt: bool,
        only_assistant: bool,
    ) -> list[Piece] | None:
        """Where the texts stand in `text`, or None if marks change what the template writes."""
        marked = mark(conversation, only_assistant=only_assistant)
        if marked is None:
            return None
        with_marks, marks = marked
        try:
            rendered = render(with_marks, self._tokenizer, form=form, prompt=prompt)
        except ValueError:
            return None
        clean, pieces = marks.find(rendered.text)
        if clean != text:
            return None
        return pieces


def _forms(conversation: Conversation, *, first: Form) -> Iterator[Form]:
    """The forms in which this conversation differs, `first` first."""
    calls = any(message.get("tool_calls") for message in conversation.messages)
    seen = set()
    for form in (first, *FORMS):
        if not calls:
            form = Form(parts=form.parts)
        if form not in seen:
            seen.add(form)
            yield form


def _unwritten(
    conversation: Conversation,
    pieces: Sequence[Piece],
    roles: Container[str],
) -> list[str]:
    """The roles (of those given) and calls whose texts the template did not write."""
    written = {(piece.message, piece.part) for piece in pieces}
    missing = []
    for index, message in enumerate(conversation.messages):
        role = message["role"]
        if message.get("tool_calls") and (index, "tool_call") not in written:
            missing.append("tool calls")
        found = THOUGHT.fullmatch(message["content"]) if role == "assistant" else None
        answer = found.group("answer") if found else message["content"]
        if answer.strip() and role in roles and (index, "content") not in written:
            missing.append(f"messages of the role {role}")
    return missing
