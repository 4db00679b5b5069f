"""Chats of saved sizes in llama.cpp, which has a stand-in except where its environment is made."""

import json
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer, save_pair
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from examples.engines import __main__ as command
from examples.engines import chat as chatting
from examples.engines import check
from examples.engines.chat import Answer, Reference, compare
from examples.engines.environments import FOLDER
from examples.smollm2.chat import inputs_of
from examples.stdlib.training import save_tokenizer
from patching.family import Family

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PROMPTS = ("Where is it?", "Why?")


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, with a merge in place of one that no text has: llama.cpp insists on
    merges.
    """
    tokenizer = byte_tokenizer()
    vocab = tokenizer.get_vocab()
    vocab["he"] = vocab.pop("ÿ")
    tokenizer.backend_tokenizer.model = BPE(vocab=vocab, merges=[("h", "e")])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What `examples.smollm2` leaves, made of a tiny llama that chats in ASCII: llama.cpp's binding
    does not stop within a character.
    """
    folder, tokenizer = tmp_path_factory.mktemp("chat"), chat_tokenizer()
    others = [i for token, i in tokenizer.get_vocab().items() if not token.isascii()]
    for path in save_pair(folder, "llama-tied"):
        model = AutoModelForCausalLM.from_pretrained(path)
        model.get_input_embeddings().weight.data[others] = 0
        model.save_pretrained(path)
        save_tokenizer(tokenizer, path)
    order = folder / "results" / "search" / "order.json"
    order.parent.mkdir(parents=True)
    order.write_text("[1, 0]")
    return folder


@pytest.fixture
def family(folder, tmp_path, monkeypatch) -> Family:
    """The family, whose sizes are saved in a folder of the test."""
    monkeypatch.setattr(check, "FOLDER", tmp_path)
    monkeypatch.setattr(chatting, "PROMPTS", PROMPTS)
    monkeypatch.setattr(chatting, "NEW_TOKENS", 8)
    monkeypatch.setattr(check, "NEW_TOKENS", 8)
    return chatting.open_family(folder)


def test_our_answers_are_those_of_generate(family):
    """Up to the end of the text, for which a token is taken that comes in the first answer."""
    (member,) = check.save_sizes("chat", family, [1])
    model = AutoModelForCausalLM.from_pretrained(member.folder)
    tokenizer = AutoTokenizer.from_pretrained(member.folder)

    def generated(prompt: str) -> tuple[list[int], list[int]]:
        inputs = inputs_of(tokenizer, prompt)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
        length = inputs["input_ids"].shape[1]
        return tokens[:length], tokens[length:]

    whole = [generated(prompt) for prompt in PROMPTS]
    end = whole[0][1][4]
    settings = GenerationConfig(eos_token_id=[end, 256], pad_token_id=256)
    settings.save_pretrained(member.folder)
    model.generation_config = settings
    ours = chatting.our_answers(member)
    assert [(o.answer.conversation, o.answer.tokens) for o in ours] == [*map(generated, PROMPTS)]
    assert ours[0].answer.tokens[-1] == end and len(ours[0].answer.tokens) <= 5
    assert tokenizer.decode(ours[0].answer.conversation) == "user: Where is it?\nassistant:"
    assert all(o.num_clear <= len(o.answer.tokens) for o in ours)


@pytest.mark.parametrize(
    "theirs, num_clear, difference",
    [
        (Answer([1, 2], [5, 6, 0], "a"), 3, None),
        (Answer([1, 2], [5, 9, 0], "b"), 3, "here: a"),
        (Answer([1, 2], [5, 9, 0], "b"), 1, None),  # at a near-tie
        (Answer([1, 2], [9, 6, 0], "b"), 1, "here: a"),
        (Answer([1, 2], [5, 6, 0, 7], "a and more"), 3, "it goes on after 3 tokens"),
        (Answer([1, 2], [5, 6, 7, 7], "b"), 2, None),
        (Answer([1, 3], [5, 6, 0], "a"), 3, "another conversation"),
    ],
)
def test_answers_must_be_the_same_up_to_the_first_near_tie(theirs, num_clear, difference):
    ours = Reference(Answer([1, 2], [5, 6, 0], "a"), num_clear)
    exchange = compare(ours, theirs)
    assert exchange.difference == difference
    assert exchange.compared == num_clear


STAND_IN = """
import argparse, json
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--prompts", type=Path)
parser.add_argument("--new_tokens", type=int)
parser.add_argument("files", nargs="+")
arguments = parser.parse_args()
assert arguments.new_tokens == 8 and len(json.loads(arguments.prompts.read_text())) == 2
for pair in arguments.files:
    file, output = map(Path, pair.split("=", 1))
    assert file.name == "f32.gguf"
    output.write_text((file.parent / "wanted.json").read_text())
"""


def test_sizes_chat_in_llama_cpp_and_here(family, tmp_path, monkeypatch):
    """With a stand-in that gives our own answers, but for one token."""
    (tmp_path / "chat_llama_cpp.py").write_text(STAND_IN)
    monkeypatch.setattr(chatting, "RUNNERS", tmp_path)
    monkeypatch.setattr(chatting, "python_of", lambda name: Path(sys.executable))
    pre_tokenizer = "smollm"

    def convert(members, number_type):
        answers = [
            [ours.answer._asdict() for ours in chatting.our_answers(member)] for member in members
        ]
        answers[1][0]["tokens"][0] += 1
        for member, of_member in zip(members, answers):
            found = {"pre_tokenizer": pre_tokenizer, "answers": of_member}
            (member.folder / "wanted.json").write_text(json.dumps(found))
        return {}

    monkeypatch.setattr(chatting, "convert_to_gguf", convert)
    chats = chatting.chat(family)
    assert [member.num_layers_to_patch for member in chats] == [0, 1, 2]
    assert [member.depth for member in chats] == [4, 5, 6]
    (failure,) = chatting.chat_failures(chats)
    assert failure.startswith("llama.cpp, k = 1, Where is it? here: ")
    table = chatting.chat_tables(chats)
    assert "**Where is it?**" in table and "| 2 | 6 |" in table and " tokens, the same |" in table
    pre_tokenizer = "gpt-2"
    with pytest.raises(RuntimeError, match="takes the tokenizer for gpt-2 and not for smollm"):
        chatting.answers_of_llama_cpp([*chats])
    (tmp_path / "chat_llama_cpp.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(chatting, "convert_to_gguf", lambda members, kind: {})
    with pytest.raises(RuntimeError, match="exit status 3, see .*engine.log"):
        chatting.answers_of_llama_cpp([*chats])
    monkeypatch.setattr(chatting, "convert_to_gguf", lambda members, kind: {members[0]: "no head"})
    with pytest.raises(RuntimeError, match="no head"):
        chatting.answers_of_llama_cpp([*chats])


def test_a_folder_without_an_evaluation_is_an_error_of_one_line(
    folder, tmp_path, monkeypatch, capsys
):
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.setattr(sys, "argv", ["examples.engines", "--chat", str(tmp_path)])
    with pytest.raises(SystemExit) as exited:
        command.main()
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "order.json" in error


@pytest.mark.slow
@pytest.mark.skipif(
    not (FOLDER / "llama_cpp" / "requirements.done").exists()
    or not (FOLDER / "transformers4" / "requirements.done").exists(),
    reason="the environments of make test-engines are not made",
)
def test_llama_cpp_reads_template_tokenizer_and_end_of_text(family, monkeypatch):
    """The real one. It does not know the tokenizer of bytes, and takes it for GPT-2's."""
    monkeypatch.setattr(chatting, "PRE_TOKENIZER", "gpt-2")
    chats = chatting.chat(family)
    assert chatting.chat_failures(chats) == []
    compared = [exchange.compared for of_size in chats.values() for exchange in of_size]
    assert sum(compared) > len(compared)
