"""The study of chat models: what it runs, what it goes on with, and what it says."""

import json

import pytest
from conftest import ROOT

from evaluate.result import Parameters, Result, update_result
from examples.stdlib.chat_data import NEW_SUMS, TASK_NAMES, write_chats, write_tasks
from examples.stdlib.corpus import Module
from examples.stdlib.tasks import TASK_FILES, write_task
from examples.studies.chats import students
from examples.studies.chats.__main__ import main
from examples.studies.chats.findings import (
    LABELS,
    SCORES,
    claims_of,
    claims_table,
    cosines_table,
    read_scores,
    scores_table,
)
from examples.studies.chats.students import SETTINGS, STUDENTS, SWEEPS, TEACHERS, TEXT_TASK

MODULES = [
    Module("a", "def dumps(obj, skip, indent):\n    pass\n"),
    Module("b", "class B:\n    def load(self, file):\n        pass\n"),
]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What the study would run. Its output folders appear, without models."""
    ran = []

    def run(module, *arguments):
        words = [*map(str, arguments)]
        out = tmp_path / words[words.index("--save_directory") + 1]
        ran.append((module, out.name, words))
        name = {
            "examples.stdlib.chat": "training.json" if words[0] == "teacher" else "made",
            "train.train": "config.json",
            "train.weight_delta": "weight_delta.json",
            "evaluate.evaluate": "summary.json",
        }[module]
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")

    monkeypatch.setattr(students, "run_here", run)
    return ran


def test_everything_is_made_once_and_in_order(commands, tmp_path):
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    (tmp_path / "data" / "tasks" / f"{TEXT_TASK}.yaml").touch()
    students.make(tmp_path, [3, 4], ["--max_steps", "7"], 5)
    names = [name for _, name, _ in commands]
    of_seed = [*STUDENTS, *(f"delta_to_{teacher}" for teacher in TEACHERS), *SWEEPS]
    assert names == [*TEACHERS, *of_seed, *of_seed]
    for module, name, words in commands:
        if module == "train.train":
            assert words[-4:-1] == ["--max_steps", "7", "--seed"] and words[-1] in "34"
            flag = "--teacher_model_name_or_path"
            teacher = str(tmp_path / "chat") if name != "base" else str(students.TEACHER)
            assert words[words.index(flag) + 1] == teacher
            assert ("--sft_dataset" in words) == (name in ("two_phases", "chats"))
        if module == "evaluate.evaluate":
            sweep = SWEEPS[name]
            models = [words[words.index(f"--{model}_model_name_or_path") + 1]
                      for model in ("teacher", "student")]  # fmt: skip
            assert [model.rpartition("/")[2] for model in models] == [sweep.teacher, sweep.student]

    commands.clear()  # what is finished is not done again
    students.make(tmp_path, [3, 4], ["--max_steps", "7"], 5)
    assert not commands
    (tmp_path / "seed_4/results/text/summary.json").unlink()
    (tmp_path / "seed_4/base/config.json").unlink()
    students.make(tmp_path, [3, 4], ["--max_steps", "7"], 5)
    assert [name for _, name, _ in commands] == ["base", "text"]


def store(folder, seed, sweep, depth, matches, bits):
    result = Result("family", depth - 7, depth, Parameters(1, 1))
    result.results = {task: {"exact_match,strip": matches} for task in (*TASK_NAMES, NEW_SUMS)}
    result.results[TEXT_TASK] = {"bits_per_byte,none": bits}
    result.generation_failures = {
        task: {"answers": 4, "cut": 1, "looping": 0, "failed": 1} for task in TASK_NAMES
    }
    path = folder / f"seed_{seed}" / "results" / sweep
    update_result(path, f"family_k{depth - 7}", lambda _: result)
    (path / "summary.json").write_text("{}")


def test_claims_say_which_students_are_better(tmp_path):
    for seed in (0, 1):
        for depth in (7, 8, 9):
            store(tmp_path, seed, "two_phases", depth, 0.6 + seed / 10, 1.0)
            store(tmp_path, seed, "text", depth, 0.2 * (depth - 6), 0.9)
            store(tmp_path, seed, "chats", depth, 0.7, 1.1 - seed / 5)
    store(tmp_path, 0, "base_in_chat", 8, 0.1, 1.0)  # the other seed has none yet
    scores = read_scores(tmp_path, [0, 1])
    assert scores["exact_match"]["two_phases"][8] == pytest.approx([0.6, 0.7])
    assert scores["failed_answers"]["text"][9] == [0.25, 0.25]
    on_chats, on_text = claims_of(scores)
    assert on_chats.gains == {8: pytest.approx([0.2, 0.3]), 9: pytest.approx([0.0, 0.1])}
    assert on_text.gains == {depth: pytest.approx([0.1, -0.1]) for depth in (8, 9)}
    assert (on_chats.verdict, on_text.verdict) == ("partly", "partly")
    assert LABELS.keys() == SWEEPS.keys()


def test_the_page_has_the_recorded_figures():
    recorded = json.loads((ROOT / "examples/studies/chats/chats.json").read_text())
    page = (ROOT / "docs/chats.md").read_text()
    scores = {
        name: {
            sweep: {int(depth): of for depth, of in line.items()}
            for sweep, line in recorded[name].items()
        }
        for name in SCORES
    }
    assert claims_table(claims_of(scores)) in page
    assert all(scores_table(lines) in page for lines in scores.values())
    assert cosines_table(recorded["cosines"]) in page
    assert recorded["settings"] == {"train.train": [], "documents": None}
    assert recorded["distillation"] == SETTINGS and recorded["teachers"].keys() == TEACHERS.keys()


def test_mistyped_flags_are_one_line_and_stay_nowhere(commands, tmp_path, capsys):
    for flags, message in (
        (["--max_stepz", "3"], "unrecognized arguments: --max_stepz 3"),
        (["--sft_share", "x"], "sft_share"),
        (["--seeds", "a"], "seeds=a: give different whole numbers"),
        (["--documents", "-2"], "documents=-2: choose 1 or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--folder", str(tmp_path / "new"), *flags])
        assert ended.value.code == 2 and not commands
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_study_runs(tmp_path, monkeypatch):
    """A few steps of everything, on few modules."""
    data = tmp_path / "data"
    (data / "corpus").mkdir(parents=True)
    write_chats(MODULES, data / "chats.jsonl", 200, 0)
    texts = [f"def f{i}(x):\n    return x * {i}\n" * 60 for i in range(20)]
    text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (data / "corpus" / "train.jsonl").write_text(text)
    write_tasks(MODULES, data / "tasks", 1, 3, "<|endoftext|>")
    documents = [{"module": "a", "text": texts[0][:200]}]
    write_task(data / "tasks", TEXT_TASK, documents, TASK_FILES[TEXT_TASK])
    few = ("--steps", 2, "--batch_size", 2)
    monkeypatch.setattr(students, "TEACHERS", {name: few for name in TEACHERS})
    (tmp_path / "settings.json").write_text("{}")  # the folder is the study's
    main(["--folder", str(tmp_path), "--seeds", "0", "--documents", "2", "--max_steps", "2"])
    found = json.loads((tmp_path / "chats.json").read_text())
    assert len(found["claims"]) == 4 and found["exact_match"].keys() == SWEEPS.keys()
    assert {*found["bits_per_byte"]["two_phases"]} == {"7", "8", "9", "10", "11", "12"}
    assert all(0.9 < cosine <= 1.01 for cosine in found["cosines"]["chat"].values())
    assert (tmp_path / "chats.png").is_file() and (tmp_path / "chats.md").is_file()
