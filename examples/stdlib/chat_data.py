"""Small chats with exact answers: sums, strings, and questions about functions of the standard
library, in one to three turns.

A later question may be about the answer before it. Questions about functions show a line of a
module, so they can be answered for modules that no model has seen.

    stdlib_chat_sum, stdlib_chat_string, stdlib_chat_lookup   the first question of a chat
    stdlib_chat_follow_up                                      a later one, after the turns before

All four are lm-eval tasks for `--apply_chat_template`, scored by exact match.
"""

import ast
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.stdlib.corpus import Module
from examples.stdlib.tasks import write_task

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""Roles are plain text, because a new token would need a larger embedding than the teacher's."""
SYSTEM = "Answer with the result alone."
KINDS = ("sum", "string", "lookup")
TASK_NAMES = tuple(f"stdlib_chat_{kind}" for kind in (*KINDS, "follow_up"))
MAX_NEW_TOKENS = 16
WORDS = [
    "class", "module", "import", "string", "number", "object", "return", "value", "index",
    "method", "buffer", "header", "parser", "thread", "socket", "format", "closed", "length",
    "source", "target", "system", "record", "window", "signal", "default", "encode", "server",
]  # fmt: skip
NUM_TEST_WORDS = 7


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


def sum_question(draw: random.Random, is_test: bool) -> Question:
    """A tenth of all pairs of numbers is only asked in tests."""
    while True:
        a, b = draw.randint(2, 60), draw.randint(2, 39)
        if ((7 * a + 3 * b) % 10 == 0) == is_test:
            break
    if draw.random() < 0.5:
        return Question("sum", f"What is {a} + {b}?", str(a + b))
    return Question("sum", f"What is {a + b} - {b}?", str(a))


def string_question(draw: random.Random, is_test: bool) -> Question:
    """The last words are only asked in tests."""
    word = draw.choice(WORDS[-NUM_TEST_WORDS:] if is_test else WORDS[:-NUM_TEST_WORDS])
    text, answer = draw.choice(
        [
            (f"Write {word} in capitals.", word.upper()),
            (f"What is the first letter of {word}?", word[0]),
            (f"What is the last letter of {word}?", word[-1]),
            (f"How many letters has {word}?", str(len(word))),
        ]
    )
    return Question("string", text, answer)


def lookup_question(functions: list[tuple[str, list[str]]], draw: random.Random) -> Question:
    name, parameters = draw.choice(functions)
    line = f"def {name}({', '.join(parameters)}):"
    place = draw.randrange(min(3, len(parameters)))
    text, answer = draw.choice(
        [
            (f"{line}\nWhat is the name of this function?", name),
            (f"{line}\nWhat is parameter {place + 1} of this function?", parameters[place]),
            (f"{line}\nHow many parameters has this function?", str(len(parameters))),
        ]
    )
    return Question("lookup", text, answer)


def follow_up(question: Question, draw: random.Random) -> Question:
    """A question about the answer to the question before."""
    if question.answer.isdigit():
        number = draw.randint(1, 9)
        return Question("follow_up", f"Add {number} to that.", str(int(question.answer) + number))
    text, answer = draw.choice(
        [
            ("Write that in capitals.", question.answer.upper()),
            ("What is the first letter of that?", question.answer[0]),
        ]
    )
    return Question("follow_up", text, answer)


def functions_of(modules: Iterable[Module]) -> list[tuple[str, list[str]]]:
    """Names and parameters of the functions of some modules that have one to five parameters."""
    found = {}
    for module in modules:
        try:
            tree = ast.parse(module.text)
        except (SyntaxError, ValueError):  # tests of the library are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                parameters = [argument.arg for argument in node.args.args]
                if 1 <= len(parameters) <= 5 and len(node.name) <= 24:
                    found[node.name, *parameters] = (node.name, parameters)
    return [found[key] for key in sorted(found)]


def chats(
    functions: list[tuple[str, list[str]]], seed: int, is_test: bool
) -> Iterator[list[Question]]:
    """Yield the questions of one chat after another, endlessly."""
    draw = random.Random(seed)
    while True:
        questions: list[Question] = []
        for _ in range(draw.randint(1, 3)):
            if questions and draw.random() < 0.5:
                questions.append(follow_up(questions[-1], draw))
                continue
            kind = draw.choice(KINDS)
            if kind == "lookup":
                questions.append(lookup_question(functions, draw))
            else:
                make = sum_question if kind == "sum" else string_question
                questions.append(make(draw, is_test))
        yield questions


def messages_of(questions: list[Question]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM}]
    for question in questions:
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def write_chats(modules: Iterable[Module], path: Path, num_chats: int, seed: int) -> None:
    """Write chats as `messages`, one per line."""
    made = chats(functions_of(modules), seed, is_test=False)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_chats):
            file.write(json.dumps({"messages": messages_of(next(made))}) + "\n")


def documents(
    modules: Iterable[Module], seed: int, num_documents: int, end_of_turn: str
) -> dict[str, list[dict[str, Any]]]:
    """Return questions and answers by task, `num_documents` for each.

    The text of a follow-up holds the turns before it, as the template renders them: the template
    then puts the whole text into one turn of the user, which is the same text as that of all turns.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TASK_NAMES}
    for questions in chats(functions_of(modules), seed, is_test=True):
        before = ""
        for i, (kind, text, answer) in enumerate(questions):
            of_task = found[f"stdlib_chat_{kind}"]
            if (i == 0 or kind == "follow_up") and len(of_task) < num_documents:
                of_task.append({"question": before + text, "answer": answer})
            before += f"{text}\nassistant:\n{answer}{end_of_turn}\nuser:\n"
        if all(len(of_task) == num_documents for of_task in found.values()):
            return found


def write_tasks(
    modules: Iterable[Module], folder: Path, seed: int, num_documents: int, end_of_turn: str
) -> None:
    """Write each task's documents and task file to `folder`, which `--include_path` then names."""
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["\n"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    for name, of_task in documents(modules, seed, num_documents, end_of_turn).items():
        write_task(folder, name, of_task, settings)
