"""Chats to rows of tokens, each with the labels of its responses.

A chat is never divided: the rest of a response means nothing without its prompt. Chats are packed
whole, and one that is longer than a row is cut at its end.
"""

import json
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from patching.files.columns import UnusableText
from patching.files.texts import open_dataset
from train.chats.arguments import ChatArguments
from train.chats.masks import Chat, MarkedChat, Refused, mark_responses, special_ids
from train.data_args import DEFAULT_SHUFFLE_BUFFER, DataArguments, Packing
from train.loss import CONTEXT, NO_TARGET
from train.stream import Columns, Documents, Position, TextStream, Workers

TOO_LONG = "no response begins within --max_length"


class CutChats(NamedTuple):
    """Rows of some chats, and how many of the chats are in none of them, by reason."""

    columns: Columns
    num_chats: int
    refused: dict[str, int]


def load_rows_of_chats(
    arguments: ChatArguments, data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple["ChatStream", Dataset | None]:
    """Return the rows of the chats that the flags name, and those of the held-out chats if any are.

    Raises ValueError if there are none, or if the tokenizer has no chat template or cannot say
    where its tokens are in the text.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"sft_dataset: the tokenizer of {name} has no chat template; name a teacher that has "
            "one, or add it as chat_template.jinja"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"sft_dataset: {name} needs a fast tokenizer (tokenizer.json)")
    chats, columns, held_out = split_chats(arguments)
    cut = partial(
        rows_of_chats,
        tokenizer=tokenizer,
        max_length=data.max_length,
        packing=data.packing,
        context_label=NO_TARGET if arguments.sft_all_positions else CONTEXT,
    )
    stream = ChatStream(
        arguments.sft_dataset,
        chats.map(_in_one_column, remove_columns=columns),
        Workers(cut, data.tokenizer_processes),
        data.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER,
        seed,
        max_refused=arguments.sft_max_refused,
    )
    if not held_out:
        return stream, None
    rows = cut(held_out)
    if not rows.columns["labels"]:
        reasons = ", ".join(rows.refused)
        raise ValueError(
            f"no response is in the {len(held_out)} held-out chats ({reasons}): name others as "
            "--sft_eval_dataset, or add --sft_heldout_chats 0"
        )
    return stream, Dataset.from_dict(rows.columns)


def split_chats(
    arguments: ChatArguments,
) -> tuple[IterableDataset, list[str], list[dict[str, Any]]]:
    """Return chats to train on, their columns, and held-out chats. Raises ValueError if no columns
    hold any, or if there is a single chat and it would be held out.
    """
    chats, columns = load_chats(arguments, "sft_dataset")
    num_held_out = arguments.sft_heldout_chats
    if num_held_out == 0:
        return chats, columns, []
    if arguments.sft_eval_dataset is not None:
        held_out, _ = load_chats(arguments, "sft_eval_dataset")
        return chats, columns, list(held_out.take(num_held_out))
    first = list(chats.take(10 * num_held_out))
    if len(first) < 2:
        raise ValueError(
            f"sft_dataset={arguments.sft_dataset}: it is a single chat, so none can be held out: "
            "give --sft_eval_dataset or --sft_heldout_chats 0"
        )
    num_held_out = min(num_held_out, max(1, len(first) // 10))
    return chats.skip(num_held_out), columns, first[:num_held_out]


def load_chats(arguments: ChatArguments, flag: str) -> tuple[IterableDataset, list[str]]:
    """Return the chats that a flag names, as a stream, and their columns. Raises ValueError if no
    columns hold any.
    """
    name = getattr(arguments, flag)
    chats, builder, columns, _ = open_dataset(
        name, arguments.sft_config, arguments.sft_split, streaming=True, flag=flag
    )
    if builder == "text" or not ("messages" in columns or {"prompt", "completion"} <= {*columns}):
        raise ValueError(
            f"{flag}={name}: it has the columns {', '.join(columns)}, and chats are in "
            "`messages`, or in `prompt` and `completion`"
        )
    return chats, columns


def _in_one_column(example: dict[str, Any]) -> dict[str, Any]:
    return {"text": example}


def chat_of(example: dict[str, Any]) -> Chat:
    """Return the chat in an example's columns. A prompt and a completion that are plain text are a
    turn of the user and one of the assistant. Raises Refused if they hold no messages.
    """
    example = _without_none(example)
    tools = example.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise Refused("its tools are no JSON") from error
    if "messages" in example:
        messages, first_response = example["messages"], 0
    else:
        prompt = _turns(example.get("prompt"), "user")
        messages = prompt + _turns(example.get("completion"), "assistant")
        first_response = len(prompt)
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict) and "role" in message for message in messages
    )
    if not messages or not is_chat:
        raise Refused("it holds no messages")
    return Chat(messages, tools, first_response)


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | None):
        raise Refused("it holds no messages")
    return value or []


def _without_none(value: Any) -> Any:
    """Return a value without the keys that other examples have and that `datasets` fills in."""
    if isinstance(value, dict):
        return {
            name: _without_none(of_name) for name, of_name in value.items() if of_name is not None
        }
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def rows_of_chats(
    examples: Documents,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: Packing,
    context_label: int,
) -> CutChats:
    """Return rows of whole chats with `labels`: the tokens of responses, and `context_label` at all
    others.
    """
    specials, refused = special_ids(tokenizer), Counter()
    chats: list[MarkedChat] = []
    for example in examples:
        try:
            ids, is_response = mark_responses(chat_of(example), tokenizer, specials)
            if not any(is_response[1:max_length]):
                raise Refused(TOO_LONG)
            chats.append(MarkedChat(ids[:max_length], is_response[:max_length]))
        except Refused as reason:
            refused[str(reason)] += 1
    lengths = [len(chat.input_ids) for chat in chats]
    rows = [[i] for i in range(len(chats))] if packing == "False" else fill(lengths, max_length)
    columns: Columns = {"input_ids": [[t for i in row for t in chats[i].input_ids] for row in rows]}
    if packing == "documents":
        columns["document_lengths"] = [[lengths[i] for i in row] for row in rows]
    columns["labels"] = [
        [
            token if is_response else context_label
            for i in row
            for token, is_response in zip(*chats[i])
        ]
        for row in rows
    ]
    return CutChats(columns, len(examples), dict(refused))


def fill(lengths: list[int], max_length: int) -> list[list[int]]:
    """Return rows of numbers of chats. Each chat, in order, goes where it leaves least space."""
    rows: list[list[int]] = []
    spaces: list[int] = []
    for i, length in enumerate(lengths):
        fitting = [row for row, space in enumerate(spaces) if space >= length]
        if fitting:
            best = min(fitting, key=spaces.__getitem__)
        else:
            best = len(rows)
            rows.append([])
            spaces.append(max_length)
        rows[best].append(i)
        spaces[best] -= length
    return rows


class ChatStream(TextStream):
    """The rows of chats, pass after pass, and a count of those that were refused.

    Raises UnusableText, when it is read, if more than `max_refused` of the chats so far were.
    Counts are part of a position, so a resumed stream goes on counting.
    """

    def __init__(self, *arguments: Any, max_refused: float) -> None:
        super().__init__(*arguments)
        self._max_refused = max_refused
        self.num_chats, self.refused = 0, Counter()

    def resume(self, position: Position) -> None:
        super().resume(position)
        self.num_chats, self.refused = position["num_chats"], Counter(position["refused"])

    def check(self) -> str | None:
        """Return a line about the chats that were refused so far, if any were."""
        super().check()
        summary = f"chats: {self.summary()}" if self.refused else None
        self.num_chats, self.refused = 0, Counter()
        return summary

    def summary(self) -> str:
        reasons = ", ".join(f"{count:,} ({reason})" for reason, count in self.refused.most_common())
        return f"{self.refused.total():,} of the first {self.num_chats:,} are left out: {reasons}"

    def columns_of(self, cut: CutChats, is_new: bool) -> Columns:
        if is_new:
            self.num_chats += cut.num_chats
            self.refused.update(cut.refused)
            if self.refused.total() > self._max_refused * self.num_chats:
                raise UnusableText(
                    f"sft_dataset={self.name}: {self.summary()}; correct the chats or their "
                    "template, or raise --sft_max_refused"
                )
        return cut.columns

    def position_at(self, at: Position, row: int) -> Position:
        counts = {"num_chats": self.num_chats, "refused": dict(self.refused)}
        return super().position_at(at, row) | counts
