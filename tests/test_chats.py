"""Training on chats: their rows, the loss on responses alone, and the two phases of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from chat_runs import TEMPLATE, chat_tokenizer, command, save_chat_teacher, write_chats
from conftest import ROOT, byte_tokenizer, run_module
from safetensors.torch import load_file
from torch.nn import functional
from training_runs import LAYER_MAP, teacher_of, trainer_for
from transformers import AutoModelForCausalLM

from patching.running.hidden_states import hidden_states_at
from train import stream as stream_module
from train.batches import collate, in_turns
from train.chats.arguments import ChatArguments
from train.chats.masks import Refused
from train.chats.phases import Phases, num_targets
from train.chats.rows import (
    TOO_LONG,
    ChatStream,
    chat_of,
    fill,
    load_rows_of_chats,
    rows_of_chats,
)
from train.checkpoints.find import find_checkpoint
from train.data import load_phases
from train.data_args import DataArguments
from train.loss import CONTEXT, IGNORED_LABEL, NO_TARGET, count
from train.train import main

TOKENIZER = chat_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_chat_teacher(tmp_path_factory.mktemp("teacher"))


def reply(question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def cut(examples: list[dict], max_length: int = 32, packing: str = "documents"):
    return rows_of_chats(examples, TOKENIZER, max_length, packing, CONTEXT)


def learned(row_ids: list[int], labels: list[int]) -> str:
    assert all(label in (token, CONTEXT) for token, label in zip(row_ids, labels))
    return TOKENIZER.decode([label for label in labels if label >= 0])


# Rows


def test_only_replies_have_labels():
    (row,), (labels,) = (cut([reply("Hi", "Yo")]).columns[name] for name in ("input_ids", "labels"))
    assert TOKENIZER.decode(row) == "u: Hi\na: Yo<eos>\n"
    assert learned(row, labels) == "Yo<eos>"


def test_chats_are_packed_whole_and_cut_only_if_they_are_longer_than_a_row():
    examples = [reply("Hi", "Yo"), reply("Hi", "x" * 40), reply("Hm", "no")]
    columns = cut(examples).columns
    texts = [TOKENIZER.decode(row) for row in columns["input_ids"]]
    assert texts == ["u: Hi\na: Yo<eos>\nu: Hm\na: no<eos>\n", "u: Hi\na: " + "x" * 23]
    assert columns["document_lengths"] == [[13, 13], [32]]
    for packing, num_rows in (("cross", 2), ("False", 3)):
        columns = cut(examples, packing=packing).columns
        assert "document_lengths" not in columns
        assert len(columns["input_ids"]) == len(columns["labels"]) == num_rows


def test_chats_fill_the_row_that_they_leave_fullest():
    assert fill([6, 5, 3, 4, 2, 1], 10) == [[0, 2, 5], [1, 3], [4]]


def test_chats_that_cannot_be_learned_from_are_counted():
    found = cut([reply("Hi", "Yo"), reply("x" * 40, "no"), {"messages": []}, reply("Hi", "Yo")])
    assert found.num_chats == 4
    assert found.refused == {TOO_LONG: 1, "it holds no messages": 1}
    assert len(found.columns["input_ids"]) == 1


def test_prompts_and_completions_are_chats():
    chat = chat_of({"prompt": "Hi", "completion": "Yo", "other": 1})
    assert chat == ([*reply("Hi", "Yo")["messages"]], None, 1)
    first, second = reply("Hi", "Yo")["messages"], reply("Hm", "no")["messages"]
    chat = chat_of({"prompt": [*first, second[0]], "completion": [second[1]]})
    assert (chat.messages, chat.first_response) == ([*first, *second], 3)
    columns = cut([{"prompt": [*first, second[0]], "completion": [second[1]]}]).columns
    assert learned(columns["input_ids"][0], columns["labels"][0]) == "no<eos>"


def test_what_other_examples_have_is_left_out_and_tools_may_be_json():
    call = {"name": "f", "arguments": {"x": 1, "y": None}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    chat = chat_of({"messages": messages, "tools": '[{"name": "f"}]', "prompt": None})
    assert chat.tools == [{"name": "f"}]
    called = {"name": "f", "arguments": {"x": 1}}
    assert chat.messages == [{"role": "assistant", "tool_calls": [called]}]
    with pytest.raises(Refused, match="no JSON"):
        chat_of({"messages": messages, "tools": "f"})


def stream_of(path: Path, tokenizer=TOKENIZER, max_length: int = 48, **flags) -> ChatStream:
    arguments = ChatArguments(sft_dataset=str(path), sft_heldout_chats=0, **flags)
    data = DataArguments(max_length=max_length, shuffle_buffer=10)
    return load_rows_of_chats(arguments, data, tokenizer, seed=0)[0]


def test_too_many_refused_chats_are_an_error(tmp_path):
    path = tmp_path / "chats.jsonl"
    good, bad = json.dumps(reply("Hi", "Yo")) + "\n", json.dumps(reply("x" * 60, "no")) + "\n"
    path.write_text(good * 9 + bad)
    assert stream_of(path).check() == f"chats: 1 of the first 10 are left out: 1 ({TOO_LONG})"
    path.write_text(good * 8 + bad * 2)
    with pytest.raises(ValueError, match=r"2 of the first 10 are left out: 2 .*sft_max_refused"):
        stream_of(path).check()
    assert "2 of the first 10" in stream_of(path, sft_max_refused=0.2).check()
    path.write_text(bad)
    with pytest.raises(ValueError, match="there is no text in it to train on"):
        stream_of(path, sft_max_refused=1.0).check()


def test_what_holds_no_chats_is_refused(tmp_path, text_file, chats):
    with pytest.raises(ValueError, match="it has the columns text, and chats are in `messages`"):
        stream_of(text_file)
    plain = tmp_path / "plain.txt"
    plain.write_text("Hi")
    with pytest.raises(ValueError, match="chats are in `messages`"):
        stream_of(plain)
    with pytest.raises(ValueError, match="has no chat template"):
        stream_of(chats, byte_tokenizer())


def test_counts_of_refused_chats_go_on_after_a_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "DOCUMENTS_PER_CHUNK", 7)
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(reply("x" * (60 if i == 3 else i), "no")) + "\n" for i in range(20)]
    path.write_text("".join(lines))
    whole = stream_of(path)
    rows = list(islice(whole, 60))
    for stop in (1, 5, 17, 40):
        first, second = stream_of(path), stream_of(path)
        assert list(islice(first, stop)) == rows[:stop]
        second.resume(json.loads(json.dumps(first.position)))
        assert list(islice(second, 60 - stop)) == rows[stop:]
        assert second.position == whole.position
        assert second.position["num_chats"] > 20


def test_held_out_chats_are_not_trained_on(chats, tmp_path):
    data = DataArguments(dataset="x", max_length=96)
    lines = chats.read_text().splitlines(keepends=True)
    examples = [json.loads(line) for line in lines]

    def text_and_held_out(**flags):
        arguments = ChatArguments(sft_dataset=str(chats), **flags)
        stream, held_out = load_rows_of_chats(arguments, data, TOKENIZER, seed=0)
        return "".join(TOKENIZER.decode(row["input_ids"]) for row in islice(stream, 70)), held_out

    trained_on, held_out = text_and_held_out()
    assert held_out.to_dict() == cut(examples[:6], 96).columns  # a tenth
    numbers = range(0, 60, 3)
    assert [i for i in numbers if f"No, {i}." not in trained_on] == [0, 3]
    (tmp_path / "other.jsonl").write_text("".join(lines[7:11]))
    other = str(tmp_path / "other.jsonl")
    _, held_out = text_and_held_out(sft_eval_dataset=other, sft_heldout_chats=3)
    assert held_out.to_dict() == cut(examples[7:10], 96).columns
    (tmp_path / "other.jsonl").write_text(json.dumps(reply("x" * 99, "no")) + "\n")
    with pytest.raises(ValueError, match=f"1 held-out chats .{TOO_LONG}.*sft_heldout_chats 0"):
        text_and_held_out(sft_eval_dataset=other)
    with pytest.raises(ValueError, match="it is a single chat"):
        load_rows_of_chats(ChatArguments(sft_dataset=other), data, TOKENIZER, seed=0)


# The loss


def test_labels_of_a_batch():
    rows = [
        {"input_ids": [1, 2, 3, 4], "document_lengths": [3, 1], "labels": [CONTEXT, 2, CONTEXT, 4]},
        {"input_ids": [5, 6], "document_lengths": [2], "labels": [CONTEXT, 6]},
    ]
    batch = collate(rows)
    assert batch["few_targets"]
    assert batch["labels"].tolist() == [
        [CONTEXT, 2, CONTEXT, NO_TARGET],
        [CONTEXT, 6, IGNORED_LABEL, IGNORED_LABEL],
    ]
    assert [int(n) for n in count(batch["labels"])] == [2, 3]
    assert [num_targets(row) for row in rows] == [1, 1]
    assert num_targets({"input_ids": [1, 2, 3], "document_lengths": [2, 1]}) == 1
    assert num_targets({"input_ids": [1, 2, 3]}) == 2


@pytest.mark.parametrize("all_positions", [False, True])
@pytest.mark.parametrize("packing", ["documents", "False"])
def test_the_loss_is_that_of_responses(tmp_path, packing, all_positions):
    """Against a formula over each chat alone, in float64."""
    examples = [reply("Hi", "Yo"), reply("What?", "That."), reply("Hm", "x" * 9)]
    label = NO_TARGET if all_positions else CONTEXT
    columns = rows_of_chats(examples, TOKENIZER, 32, packing, label).columns
    batch = collate([dict(zip(columns, values)) for values in zip(*columns.values())])
    teacher = teacher_of("qwen3-tied")
    trainer = trainer_for(tmp_path, teacher, eval_strategy="no", cosine_loss_weight=10.0)
    student = trainer.model
    found = student(**batch, counts=count(batch["labels"]))

    sums, num_targets, num_compared = torch.zeros(3, dtype=torch.float64), 0, 0
    pairs = LAYER_MAP.alignment_pairs
    alone = rows_of_chats(examples, TOKENIZER, 32, "False", CONTEXT).columns
    for ids, labels in zip(alone["input_ids"], alone["labels"]):
        ids_1T, is_response = torch.tensor([ids]), torch.tensor(labels) >= 0
        s_states, t_states = (
            hidden_states_at(model, [pair[side] for pair in pairs], ids_1T)
            for side, model in enumerate((student, teacher))
        )
        is_compared = torch.ones_like(is_response) if all_positions else is_response
        for s_1TD, t_1TD in zip(s_states, t_states):
            cosine_T = functional.cosine_similarity(s_1TD[0].double(), t_1TD[0].double(), dim=-1)
            sums[2] += (1 - cosine_T)[is_compared].sum() / len(pairs)
        z_s, z_t = (
            (states[-1] @ model.get_output_embeddings().weight.T)[0].double().log_softmax(-1)
            for states, model in ((s_states, student), (t_states, teacher))
        )
        for t in range(1, len(ids)):
            if is_response[t]:
                sums[0] -= z_s[t - 1, ids[t]]
                sums[1] += (z_t[t - 1].exp() * (z_t[t - 1] - z_s[t - 1])).sum()
        num_targets += int(is_response.sum())
        num_compared += int(is_compared.sum())
    expected = sums / torch.tensor([num_targets, num_targets, num_compared])
    terms = torch.stack([found.cross_entropy, found.kl, found.cosine]).double()
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-6)
    whole = (expected * torch.tensor([1.0, 0.1, 10.0])).sum()
    torch.testing.assert_close(found.loss.double(), whole, rtol=1e-4, atol=1e-6)


# The phases


def phases_of(text: Path, chats: Path, num_steps: int = 8, **flags) -> Phases:
    arguments = ChatArguments(sft_dataset=str(chats), **flags)
    data = DataArguments(dataset=str(text), max_length=48, heldout_documents=2)
    return load_phases(data, arguments, TOKENIZER, seed=0, num_steps=num_steps).train


def test_steps_of_chats_have_as_many_loss_tokens_as_steps_of_text(text_file, chats):
    steps = list(islice(phases_of(text_file, chats, num_steps=40).steps(8), 40))
    tokens = [sum(map(num_targets, step)) for step in steps]
    text, of_chats = tokens[:20], tokens[20:]
    assert all("labels" not in row for step in steps[:20] for row in step)
    assert all("labels" in row for step in steps[20:] for row in step)
    assert {len(step) for step in steps[:20]} == {8}
    assert len(steps[25]) > 8
    assert sum(of_chats) == pytest.approx(sum(text), abs=48)
    assert all(abs(n - sum(text) / 20) < 48 for n in of_chats)
    alone = list(islice(phases_of(text_file, chats, sft_share=1.0).steps(8), 5))
    assert sum(num_targets(row) for step in alone for row in step) == pytest.approx(
        5 * 8 * 48, 0.02
    )


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 7])
def test_phases_resume_at_any_step(text_file, chats, stop):
    whole = list(islice(phases_of(text_file, chats).steps(4), 12))
    first, second = phases_of(text_file, chats), phases_of(text_file, chats)
    assert list(islice(first.steps(4), stop)) == whole[:stop]
    if stop:
        second.resume(json.loads(json.dumps(first.position)))
    assert list(islice(second.steps(4), 12 - stop)) == whole[stop:]


@pytest.mark.parametrize(("num_batches", "num_turns"), [(1, 1), (5, 1), (4, 4), (9, 4), (2, 4)])
def test_a_step_is_taken_in_as_many_turns_as_trainer_expects(num_batches, num_turns):
    turns = in_turns(list(range(num_batches)), num_turns)
    assert [batch for turn in turns for batch in turn] == list(range(num_batches))
    assert len(turns) == num_turns
    if num_turns > 1:
        assert len(turns[-1]) == 1
        sizes = [len(turn) for turn in turns[:-1]]
        assert max(sizes) - min(sizes) <= 1


def log_of(folder: Path) -> list[dict]:
    log = json.loads((folder / "run.json").read_text())["log"]
    return [line for line in log if "loss" in line]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, teacher, text_file, chats) -> Path:
    """Six steps, three of text and three of chats, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(command(teacher, folder, text_file, chats))
    return folder


def check_ends_like(whole: Path, folder: Path, words: list[str]) -> None:
    """Resume a run from its last checkpoint and compare all of it with one that never stopped."""
    main([*words, "--resume_from_checkpoint", "last"])
    for key in ("loss", "learning_rate", "grad_norm", "tokens_seen", "loss_tokens_per_step"):
        assert [line[key] for line in log_of(folder)] == [line[key] for line in log_of(whole)], key
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(folder / "model.safetensors")[name], tensor), name


@pytest.mark.parametrize(
    "step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 4, 5, 6))]
)
def test_a_run_resumes_around_the_boundary(whole_run, tmp_path, teacher, text_file, chats, step):
    name = f"checkpoint-{step}"
    shutil.copytree(whole_run / "checkpoints" / name, tmp_path / "checkpoints" / name)
    check_ends_like(whole_run, tmp_path, command(teacher, tmp_path, text_file, chats))


KILLED = """
import os, signal, sys
from train.train import main
from train.trainer import DistillationTrainer

name, step, *words = sys.argv[1:]
method = getattr(DistillationTrainer, name)

def killed(self, *args, **kwargs):
    if self.state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return method(self, *args, **kwargs)

setattr(DistillationTrainer, name, killed)
main(words)
"""
"""Runs train.train, and kills the process the first time that a method is called after `step`
steps."""


@pytest.mark.slow
def test_a_run_killed_again_and_again_around_the_boundary_ends_as_if_never_killed(
    whole_run, tmp_path, teacher, text_file, chats
):
    """Steps 1 to 3 are of text. Each process goes on from what the one before it left."""
    words = command(teacher, tmp_path, text_file, chats)
    for method, step, saved in (
        ("compute_loss", 2, 2),  # in the last step of text
        ("add_to_checkpoint", 3, 2),  # while the checkpoint after it is written
        ("compute_loss", 3, 3),  # in the first step of chats
        ("add_to_checkpoint", 4, 3),
        ("compute_loss", 4, 4),
    ):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, method, str(step), *words,
             "--resume_from_checkpoint", "last"],
            cwd=ROOT,
            # As many threads as this process: sums over other numbers of them round differently.
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            timeout=300,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        last = find_checkpoint("last", str(tmp_path / "checkpoints"))
        assert Path(last).name == f"checkpoint-{saved}"
        assert not (tmp_path / "config.json").exists()
    check_ends_like(whole_run, tmp_path, words)


def test_the_log_and_the_plot_show_both_phases(whole_run, monkeypatch, tmp_path):
    lines = log_of(whole_run)
    assert [line["phase"] for line in lines] == [1, 1, 1, 2, 2, 2]
    tokens = [line["tokens_seen"] for line in lines]
    assert [line.get("chat_tokens_seen") for line in lines[3:]] == [
        n - tokens[2] for n in tokens[3:]
    ]
    per_step = [line["loss_tokens_per_step"] for line in lines]
    assert sum(per_step[3:]) == pytest.approx(sum(per_step[:3]), abs=48)
    rates = [line["learning_rate"] for line in lines]
    assert rates[1:] == sorted(set(rates[1:]), reverse=True)  # one schedule, after its warm-up
    titles = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "suptitle", lambda _, text, **__: titles.append(text)
    )
    from train.plot import plot_terms

    plot_terms(json.loads((whole_run / "run.json").read_text())["log"], tmp_path / "loss.png")
    assert titles == [
        f"text: steps 1-3, {tokens[2]:,} tokens; chats: steps 4-6, {tokens[5] - tokens[2]:,} tokens"
    ]
    run = json.loads((whole_run / "run.json").read_text())
    assert run["arguments"]["cosine_loss_weight"] == 10
    assert (
        "| chats | local files, the last 50% of the steps |"
        in (whole_run / "README.md").read_text()
    )


def test_the_loss_of_held_out_chats_is_that_of_their_responses(whole_run, chats):
    held_out = json.loads((whole_run / "run.json").read_text())["held_out"]
    student = AutoModelForCausalLM.from_pretrained(whole_run, dtype=torch.float32).double()
    nats, num_targets = 0.0, 0
    for line in chats.read_text().splitlines()[:6]:
        columns = rows_of_chats([json.loads(line)], TOKENIZER, 48, "False", CONTEXT).columns
        ids, labels = (torch.tensor(columns[name]) for name in ("input_ids", "labels"))
        labels = labels[:, 1:].where(labels[:, 1:] >= 0, -100)
        logits = student(input_ids=ids).logits[0, :-1]
        nats += functional.cross_entropy(logits, labels[0], reduction="sum").item()
        num_targets += int((labels >= 0).sum())
    assert held_out["eval_chat_cross_entropy"] == pytest.approx(nats / num_targets, rel=1e-3)
    assert held_out["eval_cross_entropy"] != held_out["eval_chat_cross_entropy"]
    assert "| chat_loss, held out |" in (whole_run / "README.md").read_text()


def test_the_end_of_text_ends_a_line_of_the_log(tmp_path, teacher, text_file, chats):
    main(command(teacher, tmp_path, text_file, chats, logging_steps=4))
    assert [(line["step"], line["phase"]) for line in log_of(tmp_path)] == [(3, 1), (4, 2)]


def test_a_run_on_chats_alone_needs_no_text(tmp_path, teacher, chats):
    words = command(teacher, tmp_path, "missing.jsonl", chats, sft_share=1, max_steps=1)
    main([*words, "--sft_all_positions", "True"])
    (line,) = log_of(tmp_path)
    assert line["phase"] == 2
    assert line["chat_tokens_seen"] == line["tokens_seen"]
    held_out = json.loads((tmp_path / "run.json").read_text())["held_out"]
    assert held_out["eval_loss"] > 0 and "eval_chat_loss" not in held_out


def test_the_plan_names_both_phases(tmp_path, teacher, text_file, chats, capsys):
    words = command(teacher, tmp_path / "out", text_file, chats, sft_share=0.25, max_steps=8)
    main([*words, "--dry_run"])
    plan = capsys.readouterr().out
    assert "  text:  steps 1-6, 1,152 tokens" in plan
    assert "  chats: steps 7-8, about 384 loss tokens" in plan


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sft_share": 0}, "sft_share=0: choose a share above 0, up to 1"),
        ({"sft_heldout_chats": -1}, "sft_heldout_chats=-1: choose 0 or more"),
        ({"sft_max_refused": 2}, "sft_max_refused=2: choose a share from 0 to 1"),
        ({"max_steps": -1}, "text and chats share a number of steps, give --max_steps"),
        ({"sft_dataset": None}, "--sft_share only applies with --sft_dataset"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    tmp_path, teacher, text_file, chats, capsys, flags, message
):
    words = command(teacher, tmp_path, text_file, chats, **{"sft_share": 0.3} | flags)
    if flags.get("sft_dataset", "") is None:
        i = words.index("--sft_dataset")
        del words[i : i + 2]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_another_template_is_another_run(whole_run, tmp_path, teacher, text_file, chats, capsys):
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    (other / "chat_template.jinja").write_text(TEMPLATE.replace("a: ", "b: "))
    shutil.copytree(whole_run / "checkpoints/checkpoint-2", tmp_path / "checkpoints/checkpoint-2")
    words = command(other, tmp_path, text_file, chats)
    with pytest.raises(SystemExit):
        main([*words, "--resume_from_checkpoint", "last"])
    assert "chat_template was" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_train_on_the_same_chats_as_one_process(tmp_path, teacher, text_file, chats):
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    for name, launcher, accumulation in (("one", [], 2), ("two", two, 1)):
        words = command(
            teacher, tmp_path / name, text_file, chats, gradient_accumulation_steps=accumulation
        )
        done = run_module(*launcher, "train.train", *words, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    one, of_two = (
        tmp_path / name / "checkpoints/checkpoint-6/stream.json" for name in ("one", "two")
    )
    assert one.read_text() == of_two.read_text()
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
