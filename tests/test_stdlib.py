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

from examples.stdlib import demo
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


@pytest.fixture
def commands(monkeypatch):
    """What the demo would run. Its output folders appear, with a record that names the teacher."""
    ran = []

    def run(module, *arguments):
        words = [*map(str, arguments)]
        out = Path(words[words.index("--save_directory") + 1])
        ran.append((module, out.name))
        out.mkdir(exist_ok=True)
        name = {"train.train": "run.json", "patching.patch": "provenance.json"}.get(module)
        (out / (name or "family_k0.json")).write_text(f'{{"teacher": "{TEACHER}"}}')

    def write(folder):
        folder.mkdir()
        (folder / "train.jsonl").touch()
        (folder / "heldout.jsonl").write_text('{"module": "a", "text": "b"}\n')
        return {}

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "write_corpus", write)
    monkeypatch.setattr(demo, "iter_modules", lambda: [Module("socket", MODULE.text)])
    monkeypatch.setattr(demo, "complete", lambda *_: "")
    return ran


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_another_run_of_the_demo_starts_from_the_beginning(commands, tmp_path):
    flags = ["--save_directory", str(tmp_path / "new")]
    demo.main([*flags, "--variants"])
    assert len(commands) == 8 and commands[-1] == ("evaluate.report", "orders")
    everything = sorted([*demo.NAMES, *demo.OF_VARIANTS, demo.MARK])
    assert names_in(tmp_path / "new") == everything
    of_variants = tmp_path / "new" / "results_last" / "family_k0.json"
    before = of_variants.stat().st_mtime_ns
    commands.clear()
    demo.main(flags)
    assert [name for _, name in commands] == ["student", "results", "model_k3"]
    assert names_in(tmp_path / "new") == everything and of_variants.stat().st_mtime_ns == before
    demo.main([*flags, "--variants"])
    assert of_variants.stat().st_mtime_ns > before


def test_a_stopped_demo_starts_from_the_beginning(commands, tmp_path, monkeypatch):
    def stopped(module, *arguments):
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(demo, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.main(["--save_directory", str(tmp_path)])
    demo.main(["--save_directory", str(tmp_path)])
    assert names_in(tmp_path / "student") == ["run.json"] and (tmp_path / "results").is_dir()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("results/scores.csv", "is not empty: name another folder"),
        ("notes.txt", "is not empty: name another folder"),
        ("demo.json", "is damaged ("),
    ],
)
def test_a_folder_of_somebody_else_is_refused(path, message, commands, tmp_path, capsys):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("5")
    with pytest.raises(SystemExit) as ended:
        demo.main(["--save_directory", str(tmp_path)])
    assert ended.value.code == 2 and not commands
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (tmp_path / path).read_text() == "5"
    assert names_in(tmp_path) == [Path(path).parts[0]]


def test_what_was_put_into_the_demos_folders_is_not_removed(commands, tmp_path, capsys):
    flags = ["--save_directory", str(tmp_path)]
    demo.main(flags)
    for path in ("results/deep/notes.txt", "orders/order.json"):  # orders is made with --variants
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
        student = (tmp_path / "student" / "run.json").stat().st_mtime_ns
        with pytest.raises(SystemExit) as ended:
            demo.main([*flags, "--variants"])
        assert ended.value.code == 2
        other = tmp_path / (path if path.startswith("results") else "orders")
        assert f"{other} was not made here by this example: move it" in capsys.readouterr().err
        assert (tmp_path / path).exists() and (tmp_path / "corpus" / "train.jsonl").exists()
        assert (tmp_path / "student" / "run.json").stat().st_mtime_ns == student
        (tmp_path / path).unlink()
    (tmp_path / "orders").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tasks").rename(tmp_path / "elsewhere" / "tasks")
    (tmp_path / "tasks").symlink_to(tmp_path / "elsewhere" / "tasks")
    with pytest.raises(SystemExit):
        demo.main(flags)
    assert (tmp_path / "elsewhere" / "tasks" / "stdlib_next_line.yaml").exists()


def test_a_folder_of_an_earlier_version_is_known_by_what_it_holds(commands, tmp_path, capsys):
    flags = ["--save_directory", str(tmp_path)]
    demo.main(flags)
    (tmp_path / demo.MARK).unlink()
    demo.main(flags)
    assert len(commands) == 6
    (tmp_path / demo.MARK).unlink()
    (tmp_path / "results" / "family_k0.json").write_text('{"teacher": "Qwen/Qwen3-4B-Base"}')
    with pytest.raises(SystemExit) as ended:
        demo.main(flags)
    assert ended.value.code == 2 and len(commands) == 6
    assert "is not empty: name another folder, or remove this one" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_shows_the_phenomenon(tmp_path):
    """`make demo` from end to end: each size beats the smaller ones, and naive pruning."""
    command = [sys.executable, "-m", "examples.stdlib.demo", "--save_directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2700)
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
