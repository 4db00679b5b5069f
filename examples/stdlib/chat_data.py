"""Small chats with exact answers: sums, strings of letters, and questions about functions of the
standard library, in two to four turns.

The questions are easy and short on purpose, because a small model must learn them within minutes.
Numbers go up to 18, and strings are letters with spaces between them: each is one token of the
shipped teacher's tokenizer. What is asked about a function is in the question, so functions of
modules that no model has seen can be asked about. A later question may be about the answer before.

    stdlib_chat_sum, stdlib_chat_string, stdlib_chat_lookup   the first question of a chat
    stdlib_chat_follow_up                                      a later one, after the turns before
    stdlib_chat_new_sum                                        sums that are in no chat

All of them are lm-eval tasks for `--apply_chat_template`, scored by exact match. Strings and
functions of the first four are not in the chats, but their sums are, in other chats: models of this
size learn sums by heart.
"""

import ast
import json
import random
import string
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from examples.stdlib.corpus import Module
from examples.stdlib.tasks import write_task

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Q: {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}A: {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
"""Roles are plain text, because a new token would need a larger embedding than the teacher's. A
space begins each answer, so that a word is the same tokens there as in the question."""
SYSTEM = "return the result"
KINDS = ("sum", "string", "lookup")
TASK_NAMES = tuple(f"stdlib_chat_{kind}" for kind in (*KINDS, "follow_up"))
NEW_SUMS = "stdlib_chat_new_sum"
MAX_NEW_TOKENS = 24
LARGEST_NUMBER = 18
LETTERS = string.ascii_lowercase.replace("q", "")
"""Those that are one token after a space, also as capitals."""
PLACES = ("first", "second", "third")


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


def sum_question(draw: random.Random, is_new: bool = False) -> Question:
    """A fifth of all pairs of numbers is in no chat. These are asked about if `is_new`."""
    while True:
        a, b = draw.randint(1, LARGEST_NUMBER), draw.randint(1, 9)
        if ((7 * a + 3 * b) % 5 == 0) == is_new and a + b <= LARGEST_NUMBER:
            break
    if draw.random() < 0.5:
        return Question("sum", f"what is {a} + {b}?", str(a + b))
    return Question("sum", f"what is {a + b} - {b}?", str(a))


def string_question(draw: random.Random, is_test: bool) -> Question:
    """A tenth of all strings is only asked in tests: those whose letters sum up to a number that
    ends with 0.
    """
    while True:
        letters = draw.choices(LETTERS, k=draw.randint(4, 7))
        if (sum(map(ord, letters)) % 10 == 0) == is_test:
            break
    word = " ".join(letters)
    text, answer = draw.choice(
        [
            (f"upper case of {word}?", word.upper()),
            (f"reverse of {word}?", word[::-1]),
            (f"first letter of {word}?", word[0]),
        ]
    )
    return Question("string", text, answer)


def lookup_question(functions: list[tuple[str, list[str]]], draw: random.Random) -> Question:
    name, parameters = draw.choice(functions)
    listed = ", ".join(parameters)
    place = draw.randrange(min(len(PLACES), len(parameters)))
    asked, answer = draw.choice(
        [
            ("its name?", name),
            (f"its {PLACES[place]} parameter?", parameters[place]),
            ("its parameters?", listed),
        ]
    )
    return Question("lookup", f"{name} takes {listed}. {asked}", answer)


def follow_up(question: Question, draw: random.Random) -> Question:
    """A question about the answer to the question before."""
    answer = question.answer
    if answer.isdigit() and int(answer) < LARGEST_NUMBER:
        number = draw.randint(1, min(9, LARGEST_NUMBER - int(answer)))
        return Question("follow_up", f"add {number} to that", str(int(answer) + number))
    if question.kind == "string" and answer.islower():
        return Question("follow_up", "upper case of that?", answer.upper())
    return Question("follow_up", "repeat that", answer)


def functions_of(modules: Iterable[Module]) -> list[tuple[str, list[str]]]:
    """Names and parameters of some modules' public functions of two or three short parameters."""
    found = {}
    for module in modules:
        try:
            tree = ast.parse(module.text)
        except (SyntaxError, ValueError):  # tests of the library are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                parameters = [argument.arg for argument in node.args.args]
                longest = max(map(len, parameters), default=0)
                if 2 <= len(parameters) <= len(PLACES) and max(longest, len(node.name)) <= 16:
                    found[node.name, *parameters] = (node.name, parameters)
    return [found[key] for key in sorted(found)]


def chats(
    functions: list[tuple[str, list[str]]], seed: int, is_test: bool
) -> Iterator[list[Question]]:
    """Yield the questions of one chat after another, endlessly."""
    draw = random.Random(seed)
    while True:
        questions: list[Question] = []
        for _ in range(draw.randint(2, 4)):
            if questions and draw.random() < 0.5:
                questions.append(follow_up(questions[-1], draw))
                continue
            kind = draw.choice(KINDS)
            if kind == "lookup":
                questions.append(lookup_question(functions, draw))
            elif kind == "sum":
                questions.append(sum_question(draw))
            else:
                questions.append(string_question(draw, is_test))
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
    """Return questions and answers by task, `num_documents` different ones for each.

    The text of a follow-up holds the turns before it, as the template renders them: the template
    then puts the whole text into one turn of the user, which is the same text as that of all turns.

    Raises ValueError if the modules have too few functions for so many questions.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TASK_NAMES}
    made = chats(functions_of(modules), seed, is_test=True)
    for questions in islice(made, 100 * num_documents):
        before = ""
        for i, (kind, text, answer) in enumerate(questions):
            of_task = found[f"stdlib_chat_{kind}"]
            document = {"question": before + text, "answer": answer}
            is_asked = (i == 0 or kind == "follow_up") and document not in of_task
            if is_asked and len(of_task) < num_documents:
                of_task.append(document)
            before += f"{text}\nA: {answer}{end_of_turn}\nQ: "
        if all(len(of_task) == num_documents for of_task in found.values()):
            break
    else:
        raise ValueError(f"num_documents={num_documents}: the modules have too few functions")
    draw, new_sums = random.Random(seed), {}
    while len(new_sums) < num_documents:
        _, text, answer = sum_question(draw, is_new=True)
        new_sums[text] = {"question": text, "answer": answer}
    return found | {NEW_SUMS: [*new_sums.values()]}


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
        "filter_list": [
            {
                "name": "strip",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    for name, of_task in documents(modules, seed, num_documents, end_of_turn).items():
        write_task(folder, name, of_task, settings)
