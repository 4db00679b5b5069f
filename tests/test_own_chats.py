"""Chats that the SmolLM2 example's teacher writes itself, and the answers it compares."""

import json

import pytest
from chat_runs import chat_tokenizer, save_chat_teacher
from conftest import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from examples.smollm2 import answers, distill, own_chats
from examples.smollm2.own_chats import continuations, write_own_chats
from train import train
from train.chats.rows import rows_of_chats
from train.loss import CONTEXT

TEXTS = ["u: Hi\na: ", "u: What is a name?\na: ", "u: "]


def test_texts_are_continued_up_to_their_end_however_many_there_are():
    model, tokenizer = tiny_model(tiny_config("llama", 3)), chat_tokenizer()
    tokenizer.padding_side = "left"
    alone = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        alone.append(tokens[0, ids.shape[1] :].tolist())
    end = alone[0][3]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    model.generation_config.eos_token_id = end
    expected = [
        tokenizer.decode(row[: row.index(end)]).strip() if end in row else None for row in alone
    ]
    assert expected[0] is not None
    assert continuations(model, tokenizer, TEXTS, 8, do_sample=False) == expected
    assert continuations(model, tokenizer, TEXTS[:1], 3, do_sample=False) == [None]


def test_chats_are_those_that_ended(tmp_path, monkeypatch):
    save_chat_teacher(tmp_path)
    asked = []

    def scripted(model, tokenizer, texts, num_tokens, **sampling):
        asked.append((texts, sampling["do_sample"]))
        if sampling["do_sample"]:
            return ["One?", None, "One?", "Two?", "", f"More {len(asked)}?"]
        return [None if "Two" in text else f"re: {text}" for text in texts]

    monkeypatch.setattr(own_chats, "continuations", scripted)
    path = write_own_chats(tmp_path, 3)
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [[message["content"] for message in chat] for chat in chats] == [
        [prompt, f"re: u: {prompt}\na: "] for prompt in ("One?", "More 1?", "More 3?")
    ]
    assert {*asked[0][0]} == {"u: "}  # the beginning of a user's turn
    examples = [{"messages": chat} for chat in chats]
    assert not rows_of_chats(examples, chat_tokenizer(), 128, "documents", CONTEXT).refused
    before = path.read_bytes()
    write_own_chats(tmp_path, 5)
    assert path.read_bytes() == before

    path.unlink()
    monkeypatch.setattr(own_chats, "continuations", lambda _, __, texts, *_a, **_b: [None, "x"])
    monkeypatch.setattr(own_chats, "replies", lambda *_: [None])
    with pytest.raises(ValueError, match="num_chats=2: only 0 of 48 chats ended in time"):
        write_own_chats(tmp_path, 2)
    assert not path.exists()


@pytest.mark.slow
def test_a_student_is_distilled_on_text_and_then_on_the_teachers_own_chats(tmp_path, monkeypatch):
    save_chat_teacher(tmp_path)
    numbers = iter(range(1000))

    def scripted(model, tokenizer, texts, num_tokens, **sampling):
        return [f"Count to {next(numbers)}." if text == "u: " else "One, two." for text in texts]

    monkeypatch.setattr(own_chats, "continuations", scripted)
    in_this_process = {"train.train": train.main}
    monkeypatch.setattr(
        distill, "run", lambda module, *words: in_this_process[module]([*map(str, words)])
    )
    (tmp_path / "smollm2.json").write_text('{"made": {}}')  # the folder is the example's
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} and so on. " * 9}) + "\n" for i in range(40)))
    distill.main(
        [
            *("--save_directory", str(tmp_path), "--dataset", str(text), "--own_chats", "20"),
            *("--max_steps", "4", "--max_length", "48", "--logging_steps", "1", "--bf16", "False"),
            *("--heldout_documents", "2", "--torch_compile", "False"),
        ]
    )
    assert len((tmp_path / "own_chats.jsonl").read_text().splitlines()) == 20
    student = tmp_path / "student_chats"
    AutoModelForCausalLM.from_pretrained(student)
    log = json.loads((student / "run.json").read_text())["log"]
    lines = [line for line in log if "loss" in line]
    assert [line["phase"] for line in lines] == [1, 1, 2, 2]
    assert lines[-1]["chat_tokens_seen"] > 0


@pytest.mark.slow
def test_a_member_answers_alike_in_transformers_and_both_harnesses(tmp_path, monkeypatch):
    teacher = save_chat_teacher(tmp_path)
    chat_tokenizer().save_pretrained(teacher.with_name("student"))
    shares = answers.compare(tmp_path, 1)
    assert shares == {"evaluate.evaluate": 1.0, "lm-eval": 1.0}
    assert "- **What is Python?** " in (tmp_path / "results" / "answers.md").read_text()
    # A member whose answers differ is noticed.
    monkeypatch.setattr(answers, "answer", lambda *_: "something else")
    with pytest.raises(SystemExit):
        answers.main(["--save_directory", str(tmp_path), "--num_layers_to_patch", "1"])
