"""Which tokens of a chat are the assistant's: those that its template marks, or those by which a
rendering grows when the assistant's turn is added.

A template with `{% generation %}` marks says which tokens the assistant writes. For any other, a
turn begins where the rendering of all messages before it ends, generation prompt included. It ends
where the rendering of the chat up to this turn does, without what the template puts at the end of
every chat or prompt. Both must be prefixes of the whole chat. Some templates render a turn
differently once others follow it (Qwen3 removes its thinking), so that the second is no prefix.
Then the turn's end is where a marker in the turn shows it to be, if what follows the marker is the
same in both renderings.

Every condition is checked for every chat. A chat that does not meet one is refused, never guessed.
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKER = "\ue000"
"""A character for private use, which no text should have."""
RENDERING_ERRORS = (
    TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError,
)  # fmt: skip
"""What a template raises, on purpose or not, for a chat that it cannot render."""


class Chat(NamedTuple):
    """Messages, of which those from `first_response` on are to be learned from."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first_response: int = 0


class Refused(Exception):
    """A chat whose responses cannot be found. Its text is the reason, the same for all its kind."""


class MarkedChat(NamedTuple):
    input_ids: list[int]
    is_response: list[bool]
    """Whether each token is part of a response."""


def mark_responses(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, specials: Collection[int]
) -> MarkedChat:
    """Return a chat's tokens and which of them the assistant writes, the end of its turns included.
    `specials` are the tokenizer's `special_ids`.

    Whitespace that a template puts after the special token that ends a turn is not the
    assistant's, unless the template marks it. Raises Refused if the responses cannot be found. The
    tokenizer must be a fast one.
    """
    if not any(message.get("role") == "assistant" for message in chat.messages):
        raise Refused("it has no message of the assistant")
    template = _Template(tokenizer, chat.tools)
    text = template.render(chat.messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if template.marks_responses:
        is_response = template.marked_tokens(chat.messages, ids)
    else:
        is_response = [False] * len(ids)
        for turn in template.turns(chat.messages, text):
            first = _first_token(turn.start, offsets)
            before = tokenizer(text[: turn.start], add_special_tokens=False)["input_ids"]
            if before != ids[:first]:
                raise Refused("a token reaches over the beginning of a response")
            last = _end_of_turn(turn, first, ids, offsets, specials, tokenizer)
            is_response[first:last] = [True] * (last - first)
    if chat.first_response:
        prompt = template.render(chat.messages[: chat.first_response], is_prompt=True)
        if not text.startswith(prompt):
            raise Refused("the prompt is rendered differently once its completion follows")
        first = _first_token(len(prompt), offsets)
        is_response[:first] = [False] * first
    if not any(is_response):
        raise Refused("no token of it is a response")
    return MarkedChat(ids, is_response)


class _Turn(NamedTuple):
    """Where a turn of the assistant is in the rendered chat."""

    start: int
    stop: int
    is_exact: bool
    """Whether `stop` is its end. Otherwise the turn ends with the last special token before it."""


class _Template:
    """A tokenizer's chat template, for chats with the same tools."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list | None) -> None:
        self._tokenizer, self._tools = tokenizer, tools
        self.marks_responses = bool(GENERATION.search(tokenizer.get_chat_template(tools=tools)))

    def render(self, messages: Sequence[Message], is_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools,
                tokenize=False,
                add_generation_prompt=is_prompt,
            )
        except RENDERING_ERRORS as error:
            raise Refused(f"the chat template fails: {error}") from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused("it holds halves of characters") from error
        return text

    def marked_tokens(self, messages: list[Message], ids: list[int]) -> list[bool]:
        """Return the tokens in the template's marks. `ids` are those of the rendered chat."""
        try:
            marked = self._tokenizer.apply_chat_template(
                messages, tools=self._tools, return_dict=True, return_assistant_tokens_mask=True
            )
        except RENDERING_ERRORS as error:
            raise Refused(f"its marks cannot be read: {error}") from error
        if marked["input_ids"] != ids:
            raise Refused("the chat template does not render it twice the same way")
        return [bool(is_marked) for is_marked in marked["assistant_masks"]]

    def turns(self, messages: list[Message], text: str) -> list[_Turn]:
        """Return where each turn of the assistant is in the rendered chat."""
        turns = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], is_prompt=True)
            if not text.startswith(before):
                raise Refused("the template renders messages differently once others follow them")
            until, is_exact = self._until(messages[: i + 1])
            if text.startswith(until) and until.startswith(before):
                stop = len(until)
            else:
                stop, is_exact = self._end_by_marker(messages, i, text)
            if stop <= len(before):
                raise Refused("a turn of the assistant renders to nothing")
            turns.append(_Turn(len(before), stop, is_exact))
        return turns

    def _until(self, messages: list[Message]) -> tuple[str, bool]:
        """Return what a chat and a prompt with these messages have in common, and whether that is
        all of the chat.

        Where it is not, the template ends both with something else, whose beginnings may be alike.
        """
        chat = self.render(messages)
        common = commonprefix([chat, self.render(messages, is_prompt=True)])  # noqa: RUF071
        return common, common == chat

    def _end_by_marker(self, messages: list[Message], i: int, text: str) -> tuple[int, bool]:
        """Return where turn i ends, found by a marker at the end of what it says, and whether that
        is exact.
        """
        marked = [*messages[:i], with_marker(messages[i]), *messages[i + 1 :]]
        whole, (until, is_exact) = self.render(marked), self._until(marked[: i + 1])
        if whole.count(MARKER) != 1 or until.count(MARKER) != 1:
            raise Refused("the template does not render what the assistant says as it is")
        at, after = whole.index(MARKER), until[until.index(MARKER) + 1 :]
        if whole.replace(MARKER, "") != text or not text.startswith(after, at):
            raise Refused("the template ends a turn differently once others follow it")
        return at + len(after), is_exact


def with_marker(message: Message) -> Message:
    """Return a message with the marker after the name of its last tool call, or else after what it
    says but before whitespace at its end, which templates may strip.
    """
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise Refused("its tool calls are not a list of objects")
        *others, call = calls
        if isinstance(function := call.get("function"), dict):
            call = {**call, "function": {**function, "name": f"{function.get('name')}{MARKER}"}}
        else:
            call = {**call, "name": f"{call.get('name')}{MARKER}"}
        return {**message, "tool_calls": [*others, call]}
    content = message.get("content")
    if not isinstance(content, str):
        raise Refused("a response is not a text")
    stripped = content.rstrip()
    return {**message, "content": f"{stripped}{MARKER}{content[len(stripped) :]}"}


def _first_token(start: int, offsets: list[tuple[int, int]]) -> int:
    """Return the first token whose characters begin at `start` or later."""
    return bisect_left(offsets, start, key=lambda offset: offset[0])


def _end_of_turn(
    turn: _Turn,
    first: int,
    ids: list[int],
    offsets: list[tuple[int, int]],
    specials: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return the end of the tokens of a turn, whose first one is given: after its last special
    token if only whitespace follows that, else after its last token.
    """
    last = _first_token(turn.stop, offsets)
    if last > first and offsets[last - 1][1] > turn.stop:
        if turn.is_exact:
            raise Refused("a token reaches over the end of a response")
        last -= 1
    for i in reversed(range(first, last)):
        if ids[i] in specials:
            only_space = not tokenizer.decode(ids[i + 1 : last]).strip()
            return i + 1 if only_space or not turn.is_exact else last
    if not turn.is_exact:
        raise Refused("no special token ends a turn of the assistant")
    return last


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that are no text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}
