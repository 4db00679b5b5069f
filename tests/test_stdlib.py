"""The embedded default: what is held out, the local tasks, the shipped teacher."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples.stdlib.corpus import Module, is_held_out, iter_modules, write_corpus
from examples.stdlib.demo import TEACHER, complete
from examples.stdlib.tasks import (
    CONTEXT_LINES,
    TASK_NAMES,
    beginning,
    end_of_line_questions,
    next_line_questions,
    write_tasks,
)
from patching.assemble import count_parameters


def test_what_is_held_out_never_changes():
    """The shipped teacher was trained on the rest, so another hash or share would leak."""
    held_out = [
        name
        for name in ("json.decoder", "socket", "lzma", "asyncio.sslproto", "argparse", "codeop")
        if is_held_out(name)
    ]
    assert held_out == ["socket", "lzma", "asyncio.sslproto", "codeop"]


def test_modules_are_named_and_read(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (package / "latin.py").write_bytes("# coding: latin-1\ny = 'é'\r\n".encode("latin-1"))
    (package / "broken.py").write_bytes(b"\xff\xfe\xff")
    (package / "empty.py").write_text("\n")
    (package / "table.py").write_text('""" Python Codec generated from \'MAPPINGS/X\' """\n')
    (tmp_path / "_sysconfigdata_machine.py").write_text("z = 1\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n")
    assert list(iter_modules(tmp_path)) == [
        Module("package", "x = 1\n"),
        Module("package.latin", "# coding: latin-1\ny = 'é'\n"),
    ]


def test_the_running_pythons_library_is_a_corpus(tmp_path):
    sizes_bytes = write_corpus(tmp_path)
    assert sizes_bytes["train.jsonl"] > 8e6
    assert sizes_bytes["heldout.jsonl"] > 1e5
    names = {
        name: [json.loads(line)["module"] for line in (tmp_path / name).open()]
        for name in sizes_bytes
    }
    assert not any(map(is_held_out, names["train.jsonl"]))
    assert all(map(is_held_out, names["heldout.jsonl"]))


LINES = [f"    value_{i} = compute({i}, other)" for i in range(60)]
MODULE = Module("some.module", "\n".join(LINES) + "\n")


def test_questions_have_one_right_answer_and_a_full_context():
    for question in next_line_questions(MODULE):
        context = question["context"].splitlines()
        assert len(context) == CONTEXT_LINES
        right = question["choices"][question["answer"]]
        assert LINES.index(right) == LINES.index(context[-1]) + 1
        assert len(set(question["choices"])) == 4
    for question in end_of_line_questions(MODULE):
        *context, beginning = question["context"].split("\n")
        assert f"{beginning} {question['answer']}" == LINES[LINES.index(context[-1]) + 1]
    assert next_line_questions(MODULE) == next_line_questions(MODULE)
    assert next_line_questions(MODULE)
    assert end_of_line_questions(MODULE)


def test_beginnings_are_whole_lines():
    assert beginning(MODULE) == [{"module": "some.module", "text": MODULE.text}]
    (cut,) = beginning(Module("long", MODULE.text * 10))
    assert 3900 < len(cut["text"]) <= 4000
    assert cut["text"].endswith("\n")
    assert (MODULE.text * 10).startswith(cut["text"])


def test_tasks_are_files_lm_eval_takes(tmp_path):
    from evaluate.tasks import load_tasks

    modules = [Module(f"module_{i}", MODULE.text) for i in range(4)]
    write_tasks(modules, tmp_path)
    by_name, failures = load_tasks(TASK_NAMES, str(tmp_path))
    assert list(by_name) == list(TASK_NAMES) and not failures
    for name, loaded in by_name.items():
        (task,) = loaded["tasks"].values()
        assert task.task_name == name
        assert len(list(task.eval_docs))


def test_the_shipped_teacher_is_small_and_plain():
    weights = TEACHER / "model.safetensors"
    assert weights.stat().st_size <= 14e6
    config = AutoConfig.from_pretrained(TEACHER)
    assert (config.model_type, config.num_hidden_layers) == ("qwen3", 12)
    assert config.tie_word_embeddings
    assert 128 <= config.hidden_size <= 192
    assert count_parameters(config).stored * 2 < weights.stat().st_size
    card = (TEACHER / "README.md").read_text()
    training = json.loads((TEACHER / "training.json").read_text())
    assert f"{training['held_out_bits_per_byte']:.3f}" in card
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    assert len(tokenizer) == 4096
    text = "def f(x):\n\treturn 'é' + x  # ü\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@torch.no_grad()
def test_the_shipped_teacher_knows_the_library():
    """Far below the 8.3 nats of a guess, and the deeper half of its layers matters."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = next(module.text for module in iter_modules() if module.name == "socket")
    text = text[text.find("\n\nclass ") :]
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:512]])
    assert model(input_ids=ids, labels=ids).loss < 2.6
    model.model.layers = model.model.layers[:6]
    assert model(input_ids=ids, labels=ids).loss > 4.0


@pytest.mark.slow
def test_the_demo_shows_the_phenomenon(tmp_path):
    """`make demo` from end to end: each size beats the smaller ones, and naive pruning."""
    command = [sys.executable, "-m", "examples.stdlib.demo", "--save_directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]

    def bits(series: str, k: int) -> float:
        result = json.loads((tmp_path / "results" / f"{series}_k{k}.json").read_text())
        return result["results"]["stdlib_bits_per_byte"]["bits_per_byte,none"]

    family = [bits("family", k) for k in range(6)]
    assert all(larger < smaller for smaller, larger in itertools.pairwise(family)), family
    naive = [bits("naive", k) for k in range(5)]
    assert all(ours < theirs for ours, theirs in zip(family, naive)), (family, naive)
    assert (tmp_path / "results" / "summary.png").exists()
    assert complete(Path(tmp_path, "model_k3"), "import ").startswith("import ")
    assert "model_k3" in done.stdout
