"""The demo's chat task: its answers are right, and its tests are not in its chats."""

import re
from itertools import islice

import pytest
from transformers import AutoTokenizer

from examples.stdlib.chat_data import (
    LARGEST_NUMBER,
    LETTERS,
    NEW_SUMS,
    TASK_NAMES,
    TEMPLATE,
    Question,
    chats,
    documents,
    functions_of,
    messages_of,
)
from examples.stdlib.corpus import Module
from examples.stdlib.demo import TEACHER
from train.chats.masks import Chat, mark_responses, special_ids

MODULES = [
    Module("a", "def dumps(obj, skip, indent):\n    pass\n\ndef _hidden(x):\n    pass\n"),
    Module("b", "class B:\n    def load(self, file):\n        pass\n\ndef none():\n    pass\n"),
    Module("broken", "def ("),
]
FUNCTIONS = functions_of(MODULES)
MANY_MODULES = [Module(f"m{i}", f"def f{i}(a, b{i}):\n    pass\n") for i in range(20)]


def is_right(question: Question, before: str | None) -> bool:
    """Whether an answer is right, worked out from the text of the question alone."""
    text, answer = question.text, question.answer
    if found := re.fullmatch(r"what is (\d+) ([+-]) (\d+)\?", text):
        a, sign, b = found.groups()
        return int(answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    if found := re.fullmatch(r"add (\d+) to that", text):
        return int(answer) == int(before) + int(found[1])
    if found := re.fullmatch(r"(\w+) takes (.*)\. its (.*)\?", text):
        name, parameters, asked = found[1], found[2].split(", "), found[3]
        wanted = {"name": name, "parameters": found[2]}
        places = ("first", "second", "third")
        wanted |= {f"{place} parameter": of for place, of in zip(places, parameters)}
        return answer == wanted[asked]
    if text == "repeat that":
        return answer == before
    found = re.fullmatch(r"(upper case|reverse|first letter) of (.*)\?", text)
    letters = (before if found[2] == "that" else found[2]).split(" ")
    wanted = {
        "upper case": [letter.upper() for letter in letters],
        "reverse": letters[::-1],
        "first letter": letters[:1],
    }
    return answer.split(" ") == wanted[found[1]]


@pytest.mark.parametrize("is_test", [False, True])
def test_answers_are_right(is_test):
    kinds = set()
    for questions in islice(chats(FUNCTIONS, 3, is_test), 500):
        before = None
        for question in questions:
            assert is_right(question, before), question
            before = question.answer
            kinds.add(question.kind)
    assert kinds == {"sum", "string", "lookup", "follow_up"}
    assert {name for name, _ in FUNCTIONS} == {"dumps", "load"}


def test_strings_of_tests_and_new_sums_are_not_in_the_chats():
    asked = {}
    for is_test in (False, True):
        made = [q for chat in islice(chats(FUNCTIONS, 5, is_test), 3000) for q in chat]
        asked[is_test] = {q.text for q in made if q.kind == "string"}
    assert len(asked[True]) > 500 and not asked[True] & asked[False]
    sums = {q.text for q in made if q.kind == "sum"}
    new_sums = {of["question"] for of in documents(MANY_MODULES, 1, 40, "<eos>")[NEW_SUMS]}
    assert len(sums) > 150 and len(new_sums) == 40 and not sums & new_sums


def test_letters_and_numbers_are_tokens_as_they_are_asked_and_answered():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for word in [*LETTERS, *LETTERS.upper(), *map(str, range(1, LARGEST_NUMBER + 1))]:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_follow_ups_are_asked_as_the_template_renders_all_turns():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = TEMPLATE
    found = documents(MANY_MODULES, 1, 20, tokenizer.eos_token)
    assert [len(found[name]) for name in (*TASK_NAMES, NEW_SUMS)] == [20] * 5
    with pytest.raises(ValueError, match="num_documents=20: the modules have too few functions"):
        documents(MODULES, 1, 20, tokenizer.eos_token)
    made = chats(functions_of(MANY_MODULES), 1, is_test=True)
    rendered = set()
    for questions in islice(made, 2000):
        messages = messages_of(questions)
        for i in range(1, len(messages), 2):
            rendered.add(
                tokenizer.apply_chat_template(
                    messages[: i + 1], tokenize=False, add_generation_prompt=True
                )
            )
    for document in found["stdlib_chat_follow_up"]:
        messages = [messages_of([])[0], {"role": "user", "content": document["question"]}]
        assert (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            in rendered
        )


def test_every_reply_can_be_learned():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = TEMPLATE
    specials = special_ids(tokenizer)
    for questions in islice(chats(FUNCTIONS, 0, is_test=False), 100):
        ids, is_response = mark_responses(Chat(messages_of(questions)), tokenizer, specials)
        learned = tokenizer.decode([token for token, of in zip(ids, is_response) if of])
        assert learned == "".join(f" {q.answer}{tokenizer.eos_token}" for q in questions)
