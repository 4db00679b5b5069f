"""Stored scores are used again only where nothing that they come from has changed, and two runs may
write into one folder.
"""

import json
import random
import shutil
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pytest
from conftest import save_pair
from lm_eval import evaluator
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager
from local_tasks import CHOICE, GENERATION, QUESTIONS, flags, write_task

from evaluate import documents, sources
from evaluate.documents import add_documents, read_documents
from evaluate.evaluate import main
from evaluate.result import Parameters, Result, Run, read_results, update_result
from evaluate.seeds import DEFAULT_SEEDS, Seeds
from evaluate.series import sources_of
from evaluate.stored import FinishedTask, Store, missing_tasks, with_facts
from evaluate.tasks import load_tasks


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A pair, a task of each of two kinds, and the folder of a finished sweep."""
    folder = tmp_path_factory.mktemp("swept")
    save_pair(folder)
    (folder / "tasks").mkdir()
    write_task(folder / "tasks", "choice", QUESTIONS, **CHOICE)
    write_task(folder / "tasks", "generation", QUESTIONS, **GENERATION)
    main(command(folder))
    return folder


def command(folder: Path, out: str = "out", **changes) -> list[str]:
    pair = (folder / "teacher", folder / "student")
    settings = {"tasks": "choice", "include_path": folder / "tasks", "num_layers_to_patch": 0}
    return flags(pair, folder / out, **settings | changes)


def change_prompt(folder, monkeypatch):
    path = folder / "tasks" / "choice.yaml"
    path.write_text(path.read_text().replace("{{question}}", "Q: {{question}}"))


def change_answers(folder, monkeypatch):
    """Prompts stay what they are, and so do the requests."""
    path = folder / "tasks" / "choice.jsonl"
    path.write_text(path.read_text().replace('"answer": 1', '"answer": 0'))


def change_metric(folder, monkeypatch):
    path = folder / "tasks" / "choice.yaml"
    path.write_text(path.read_text().replace("aggregation: mean", "aggregation: median"))


def change_tokenizer(folder, monkeypatch):
    path = folder / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_prefix_space": True}))


def change_generation_config(folder, monkeypatch):
    path = folder / "student" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.3}))


def change_version(folder, monkeypatch):
    find = sources.version
    monkeypatch.setattr(
        sources, "version", lambda name: "0.0.1" if name == "transformers" else find(name)
    )


@pytest.fixture
def changeable(swept, tmp_path):
    """The same, put back as it was when a test is over."""
    shutil.copytree(swept, tmp_path / "backup")
    yield swept
    shutil.rmtree(swept)
    shutil.copytree(tmp_path / "backup", swept)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_prompt, ["prompts", "task config"]),
        (change_answers, ["documents"]),
        (change_metric, ["task config"]),
        (change_tokenizer, ["tokenizer"]),
        (change_generation_config, ["generation_config"]),
        (change_version, ["transformers"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_score_is_computed_again_when_what_it_comes_from_changes(
    changeable, monkeypatch, caplog, change, named
):
    (before,) = read_results(changeable / "out")["family_k0"].tasks.values()
    change(changeable, monkeypatch)
    main(command(changeable))
    (after,) = read_results(changeable / "out")["family_k0"].tasks.values()
    assert after.seconds != before.seconds
    differing = [name for name in after.sources if after.sources[name] != before.sources[name]]
    assert sorted(differing) == named
    (line,) = [r.getMessage() for r in caplog.records if "computed again" in r.getMessage()]
    assert line.startswith("choice: 1 stored scores are computed again because of ")
    assert all(f"{name}: " in line for name in named)


def as_of_an_earlier_version(path: Path) -> str:
    """Store a result in the way of versions that did not store sources. Return the text."""
    values = json.loads(path.read_text())
    (run,) = values.pop("runs").values()
    task = values["tasks"]["choice"]
    values["tasks"]["choice"] = {"seconds": task["seconds"], "has_samples": False}
    del run["settings"]["seed"]
    settings = run["settings"] | {"teacher": "teacher 0123456789abcdef"}
    text = json.dumps(values | run | {"settings": settings})
    path.write_text(text)
    return text


def test_scores_of_earlier_versions_are_unverified_and_computed_again(changeable, caplog):
    path = changeable / "out" / "family_k0.json"
    as_of_an_earlier_version(path)
    old = read_results(path.parent)["family_k0"]
    assert old.is_unverified("choice") and old.settings_of("choice")["dtype"] == "float32"
    main(command(changeable))
    new = read_results(path.parent)["family_k0"]
    assert not new.is_unverified("choice") and list(new.runs) == [new.tasks["choice"].run]
    assert "an earlier version, which did not store" in caplog.text


def test_scores_of_earlier_versions_with_another_limit_are_not_replaced(changeable, capsys):
    path = changeable / "out" / "family_k0.json"
    old = as_of_an_earlier_version(path)
    with pytest.raises(SystemExit) as ended:
        main(command(changeable, limit=2))
    assert ended.value.code == 2
    assert "limit=None and 2.0 is asked for now" in capsys.readouterr().err
    assert path.read_text() == old


def result(k: int = 0, **changes) -> Result:
    return Result("family", k, 4, Parameters(1, 1), recipe={"layers": [f"student {k}"]}, **changes)


RUN = Run({"teacher": "t 1", "limit": None}, {}, {"torch": "2"})


@pytest.mark.parametrize("same", [True, False])
def test_unverified_scores_of_another_recipe_are_dropped(same):
    names = ("series", "num_layers_to_patch", "depth", "parameters", "recipe")
    facts = {name: getattr(result(), name) for name in names}
    old = result(0 if same else 1)
    old.add_scores({"choice": FinishedTask(1.0, False)}, RUN, {"results": {"choice": {}}})
    new = with_facts(old, facts)
    assert new.recipe == {"layers": ["student 0"]}
    assert bool(new.tasks) == bool(new.results) == same


def test_two_runs_into_one_folder_lose_nothing(tmp_path):
    def add(number: int) -> None:
        for i in range(10):
            name = f"task_{number}_{i}"

            def change(stored, name=name):
                stored = stored or result()
                found = {"results": {name: {"acc,none": 0.5}}}
                stored.add_scores({name: FinishedTask(1.0, False, {})}, RUN, found)
                return stored

            update_result(tmp_path, "family_k0", change)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = read_results(tmp_path)["family_k0"]
    assert len(stored.tasks) == len(stored.results) == 30
    assert list(stored.runs) == [RUN.name]


def test_what_generates_is_a_source_of_tasks_that_generate_alone():
    for backend, expected in (("transformers", {}), ("vllm", {"generation_backend": "vllm"})):
        plan = SimpleNamespace(arguments=SimpleNamespace(generation_backend=backend))
        series = SimpleNamespace(plan=plan, sources={"tokenizer": "a"})
        for request_type, more in (("loglikelihood", {}), ("generate_until", expected)):
            task = SimpleNamespace(instances=[SimpleNamespace(request_type=request_type)])
            assert sources_of(series, {"tasks": {"task": task}}) == {"tokenizer": "a"} | more


def test_missing_tasks_are_those_without_these_sources():
    stored = result(
        tasks={
            "same": FinishedTask(1.0, False, {"prompts": "1"}),
            "other": FinishedTask(1.0, True, {"prompts": "2"}),
        }
    )
    wanted = {name: {"prompts": "1"} for name in ("same", "other", "new")}
    assert missing_tasks(None, wanted) == ["same", "other", "new"]
    assert missing_tasks(stored, wanted) == ["other", "new"]
    assert missing_tasks(stored, wanted, with_samples=True) == ["same", "other", "new"]


SHUFFLES = """
import random


def process_docs(dataset):
    def shuffle(document):
        choices = [" yes", " no", " maybe", " never"]
        random.shuffle(choices)
        return document | {"choices": choices}

    return dataset.map(shuffle)
"""


def test_tasks_that_shuffle_as_they_load_are_the_same_in_each_run(tmp_path, monkeypatch):
    """As GPQA does. Each task is loaded as if it were the only one."""
    (tmp_path / "shuffles.py").write_text(SHUFFLES)
    function = "!function shuffles.process_docs"
    for name in ("one", "two"):
        write_task(tmp_path, name, QUESTIONS, **CHOICE, process_docs=function)
        path = tmp_path / f"{name}.yaml"
        path.write_text(path.read_text().replace(f"'{function}'", function))
    runs = count()

    def choices(names: list[str], seeds=DEFAULT_SEEDS):
        # `datasets` keeps what it has mapped, so each run has a cache of its own.
        monkeypatch.setattr(
            datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache {next(runs)}")
        )
        loaded = load_tasks(names, str(tmp_path), seeds=seeds).by_name
        return [[d["choices"] for d in loaded[n]["tasks"][n].eval_docs] for n in names]

    def of_lm_eval(seed: int) -> list[list[str]]:
        monkeypatch.setattr(
            datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache {next(runs)}")
        )
        monkeypatch.setattr(evaluator, "add_env_info", lambda *_: None)  # it asks pip, for seconds
        found = evaluator.simple_evaluate(
            DummyLM(),
            tasks=["one"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            random_seed=seed,
        )
        return [sample["doc"]["choices"] for sample in found["samples"]["one"]]

    (expected,) = choices(["one"])
    assert expected == of_lm_eval(Seeds().python)
    assert choices(["one"], Seeds(7, 7, 7, 7)) == [of_lm_eval(7)]
    random.seed(99)
    assert choices(["two", "one"]) == [expected, expected]


def test_only_the_files_of_a_series_are_read_again(tmp_path):
    """A folder may hold hundreds of compared models, each a series of its own."""
    sizes = Parameters(1, 1)
    first, other = (Result("family", k, 2, sizes) for k in (0, 1))
    for result in (first, other):
        update_result(tmp_path, f"family_k{result.num_layers_to_patch}", lambda _, r=result: r)
    store = Store(tmp_path, {})
    store.read()
    assert store.results == {"family_k0": first, "family_k1": other}
    update_result(tmp_path, "family_k0", lambda stored: Result("family", 0, 3, sizes))
    (tmp_path / "family_k1.json").write_text("{")
    store.read([SimpleNamespace(name="family_k0")])
    assert [result.depth for result in store.results.values()] == [2, 3]
    (tmp_path / "family_k0.json").unlink()
    store.read([SimpleNamespace(name="family_k0")])
    assert store.results == {"family_k1": other}


def test_an_archive_that_unpacks_to_more_than_scores_take_is_refused(tmp_path, monkeypatch):
    add_documents(tmp_path, "family_k0", {"choice/acc,none": numpy.zeros(100)})
    assert read_documents(tmp_path, "family_k0")["choice/acc,none"].shape == (100,)
    monkeypatch.setattr(documents, "LARGEST_BYTES", 800)
    with pytest.raises(ValueError, match="damaged .its arrays take 928 bytes.: remove it"):
        read_documents(tmp_path, "family_k0")
