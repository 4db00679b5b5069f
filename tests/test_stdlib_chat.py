"""The demo's chat task: its answers are right, and its tests are not in its chats."""

import json
import re
from itertools import islice

import pytest
from conftest import run_module
from transformers import AutoTokenizer

from examples.stdlib import chat
from examples.stdlib.chat_data import (
    NUM_TEST_WORDS,
    TASK_NAMES,
    TEMPLATE,
    WORDS,
    Question,
    chats,
    documents,
    functions_of,
    messages_of,
    write_chats,
    write_tasks,
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


def is_right(question: Question, before: str | None) -> bool:
    """Whether an answer is right, worked out from the text of the question alone."""
    text, answer = question.text, question.answer
    if found := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", text):
        a, sign, b = found.groups()
        return int(answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    if found := re.fullmatch(r"Add (\d+) to that\.", text):
        return int(answer) == int(before) + int(found[1])
    if found := re.search(r"def (\w+)\((.*)\):\n(.*)", text):
        name, parameters, asked = found[1], found[2].split(", "), found[3]
        place = re.search(r"parameter (\d)", asked)
        if place:
            return answer == parameters[int(place[1]) - 1]
        return answer == (name if "name" in asked else str(len(parameters)))
    word = before if "that" in text else re.search(r"(?:Write|of|has) (\w+)", text)[1]
    if "capitals" in text:
        return answer == word.upper()
    if "many" in text:
        return answer == str(len(word))
    return answer == word[0 if "first" in text else -1]


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


def test_words_and_numbers_of_tests_are_not_in_the_chats():
    asked = {}
    for is_test in (False, True):
        made = [q for chat in islice(chats(FUNCTIONS, 5, is_test), 3000) for q in chat]
        asked[is_test] = {q.text for q in made if q.kind in ("sum", "string")}
    assert asked[True] and not asked[True] & asked[False]
    assert any(WORDS[-NUM_TEST_WORDS] in text for text in asked[True])


def test_follow_ups_are_asked_as_the_template_renders_all_turns():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = TEMPLATE
    found = documents(MODULES, 1, 20, tokenizer.eos_token)
    assert [len(found[name]) for name in TASK_NAMES] == [20] * 4
    made = chats(FUNCTIONS, 1, is_test=True)
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
        assert learned == "".join(f"{q.answer}{tokenizer.eos_token}" for q in questions)


@pytest.mark.slow
def test_a_chat_teacher_is_trained_distilled_and_evaluated(tmp_path):
    """A few steps of everything, on few modules."""
    data = tmp_path / "data"
    (data / "corpus").mkdir(parents=True)
    write_chats(MODULES, data / "chats.jsonl", 200, 0)
    texts = [f"def f{i}(x):\n    return x * {i}\n" * 60 for i in range(20)]
    text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (data / "corpus" / "train.jsonl").write_text(text)
    write_tasks(MODULES, data / "tasks", 1, 4, "<|endoftext|>")
    chat.main(
        ["teacher", "--data", str(data), "--save_directory", str(tmp_path / "teacher"),
         "--steps", "2", "--batch_size", "2"]
    )  # fmt: skip
    student = chat.distilled(
        tmp_path / "student", tmp_path / "teacher", data, steps=2, seed=0, sft_share=0.5
    )
    done = run_module(
        *("evaluate.evaluate", "--teacher_model_name_or_path", tmp_path / "teacher"),
        *("--student_model_name_or_path", student, "--save_directory", tmp_path / "results"),
        *("--num_layers_to_patch", "0", "--include_path", data / "tasks"),
        *("--tasks", ",".join(TASK_NAMES), "--apply_chat_template"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "family_k0.json").read_text())
    assert {*result["generation_failures"]} == {*TASK_NAMES}
