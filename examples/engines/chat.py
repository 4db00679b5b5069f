"""Sizes of SmolLM2 answer chat prompts in llama.cpp, compared with their answers here.

The family is what `examples.smollm2` makes. llama.cpp reads each size converted to GGUF in fp32, so
what is compared is the whole way of a chat: template, tokenizer, predictions, end of text.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.engines.agreement import before_near_tie, top_two_gap
from examples.engines.check import (
    NEW_TOKENS,
    SavedMember,
    convert_to_gguf,
    greedy_steps,
    save_sizes,
)
from examples.engines.engines import ENGINES, RUNNERS
from examples.engines.environments import python_of, variables_of
from examples.engines.table import markdown
from examples.smollm2.chat import PROMPTS, answering_sizes, inputs_of
from patching.family import Family

NAME = "smollm2"
ENGINE = ENGINES["llama_cpp"]
PRE_TOKENIZER = "smollm"
"""llama.cpp's name of the way in which the teacher's tokenizer splits text."""


class Answer(NamedTuple):
    """The answer to one prompt, as one program gives it."""

    conversation: list[int]
    """Token ids of the prompt, through the chat template."""
    tokens: list[int]
    """Token ids of the answer, the end of text included if it comes."""
    text: str


class Reference(NamedTuple):
    answer: Answer
    num_clear: int
    """Tokens of the answer before the first near-tie."""


class Exchange(NamedTuple):
    """llama.cpp's answer to one prompt, and what we have to say to it."""

    answer: Answer
    compared: int
    """Tokens of the answer that are compared: those before the first near-tie."""
    difference: str | None
    """How it differs from ours, None if it does not."""


Chats = Mapping[SavedMember, Sequence[Exchange]]


def open_family(folder: Path) -> Family:
    """Open the family in the folder of `examples.smollm2`, in the order it was evaluated in.

    Raises OSError or ValueError if something is missing there.
    """
    order = folder / "results" / "search" / "order.json"
    return Family.from_pretrained(
        folder / "teacher", folder / "student", order=order, dtype="float32"
    )


def chat(family: Family) -> dict[SavedMember, list[Exchange]]:
    """Save some sizes and let each answer the prompts in llama.cpp and here.

    Raises Unavailable if llama.cpp cannot be built, and RuntimeError if it does not take a size.
    """
    members = save_sizes(NAME, family, answering_sizes(family))
    theirs = answers_of_llama_cpp(members)
    return {
        member: [compare(*both) for both in zip(our_answers(member), theirs[member], strict=True)]
        for member in members
    }


def answers_of_llama_cpp(members: Sequence[SavedMember]) -> dict[SavedMember, list[Answer]]:
    """Let members answer in llama.cpp, through what their GGUF files hold."""
    python = python_of(ENGINE.environment)
    if refusals := convert_to_gguf(members, ENGINE.gguf):
        raise RuntimeError(refusals.popitem()[1])
    folder = members[0].folder.parent
    prompts, log = folder / "prompts.json", folder / "engine.log"
    prompts.write_text(json.dumps(PROMPTS))
    outputs = {member: member.folder / "answers.json" for member in members}
    command = [
        *(python, RUNNERS / "chat_llama_cpp.py", "--prompts", prompts),
        *("--new_tokens", str(NEW_TOKENS)),
        *(f"{member.folder / ENGINE.gguf}.gguf={output}" for member, output in outputs.items()),
    ]
    with log.open("w") as file:
        done = subprocess.run(
            command, env=variables_of(ENGINE.environment), stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}, see {log}")
    answers = {}
    for member, output in outputs.items():
        found = json.loads(output.read_text())
        if found["pre_tokenizer"] != PRE_TOKENIZER:
            raise RuntimeError(
                f"the converter takes the tokenizer for {found['pre_tokenizer']} and not for "
                f"{PRE_TOKENIZER}"
            )
        answers[member] = [Answer(**answer) for answer in found["answers"]]
    return answers


@torch.inference_mode()
def our_answers(member: SavedMember) -> list[Reference]:
    """Let a member answer here, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(member.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(member.folder)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    references = []
    for prompt in PROMPTS:
        conversation_1T = inputs_of(tokenizer, prompt)["input_ids"]
        logits_NV = torch.cat([*greedy_steps(model, conversation_1T)]).numpy()
        tokens = up_to_end(logits_NV.argmax(-1).tolist(), ends)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answer = Answer(conversation_1T[0].tolist(), tokens, text)
        references.append(Reference(answer, before_near_tie(top_two_gap(logits_NV[: len(tokens)]))))
    return references


def up_to_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Cut after the first token that ends a text."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def compare(ours: Reference, theirs: Answer) -> Exchange:
    difference, num_clear = None, ours.num_clear
    if theirs.conversation != ours.answer.conversation:
        difference = "another conversation"
    elif theirs.tokens[:num_clear] != ours.answer.tokens[:num_clear]:
        difference = f"here: {ours.answer.text}"
    elif num_clear == len(ours.answer.tokens) != len(theirs.tokens):
        difference = f"it goes on after {num_clear} tokens"
    return Exchange(theirs, num_clear, difference)


def chat_tables(chats: Chats) -> str:
    """One table per prompt, one row per size."""
    tables = []
    for i, prompt in enumerate(PROMPTS):
        rows = [
            [
                str(member.num_layers_to_patch),
                str(member.depth),
                " ".join(exchanges[i].answer.text.split()),
                exchanges[i].difference or f"{exchanges[i].compared} tokens, the same",
            ]
            for member, exchanges in chats.items()
        ]
        tables += [f"**{prompt}**", markdown(["k", "layers", "answer", "transformers 5"], rows)]
    return "\n\n".join(tables)


def chat_failures(chats: Chats) -> list[str]:
    """What differs, as lines."""
    return [
        f"llama.cpp, k = {member.num_layers_to_patch}, {prompt} {exchange.difference}"
        for member, exchanges in chats.items()
        for prompt, exchange in zip(PROMPTS, exchanges)
        if exchange.difference
    ]
