"""lm-eval's flags by its names: each has the effect that it has in lm-eval itself."""

import json
import logging
import sys
import types

import pytest
import yaml
from conftest import byte_tokenizer
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_file_datetime, get_file_task_name, make_table
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task
from transformers import AutoModelForCausalLM

from evaluate import trackers
from evaluate.arguments import EvaluationArguments
from evaluate.evaluate import main
from evaluate.harness import Harness
from evaluate.result import read_results
from evaluate.tasks import load_tasks

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "rolling", [{"text": text * 9} for text in TEXTS], **ROLLING)
    write_task(folder, "choice", QUESTIONS, fewshot_split="test", **CHOICE)
    write_task(folder, "generation", QUESTIONS, **GENERATION, metric_list=EXACT)
    write_task(folder, "choice_2", QUESTIONS[:3], **CHOICE)
    return folder


@pytest.fixture(autouse=True)
def without_environment(monkeypatch):
    """lm-eval's evaluation describes its environment, for which it asks pip, for seconds."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda *_: None)


@pytest.fixture(scope="module")
def chat_pair(pair_folders):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for folder in pair_folders:
        tokenizer.save_pretrained(folder)
    yield pair_folders
    for folder in pair_folders:
        byte_tokenizer().save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def numbers_of(results: dict) -> dict[tuple[str, str], float]:
    return {
        (task, key): value
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, float)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (["--gen_kwargs", "max_gen_toks=9", "until=['x']"],
         {"gen_kwargs": "max_gen_toks=9,until=['x']"}),
        (["--apply_chat_template", "--num_fewshot", "2"],
         {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True}),
        (["--apply_chat_template", "--fewshot_as_multiturn", "false", "--num_fewshot", "2",
          "--system_instruction", "Answer."],
         {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False,
          "system_instruction": "Answer."}),
        (["--system_instruction", "Be brief."],
         {"system_instruction": "Be brief.", "fewshot_as_multiturn": False}),
        (["--seed", "3", "--num_fewshot", "3"],
         {"random_seed": 3, "numpy_random_seed": 3, "torch_random_seed": 3,
          "fewshot_random_seed": 3, "num_fewshot": 3}),
        (["--samples", '{"choice": [1, 4], "rolling": [0], "generation": [2, 3, 5]}'],
         {"samples": {"choice": [1, 4], "rolling": [0], "generation": [2, 3, 5]}}),
        (["--max_length", "60"], {"max_length": 60}),
        (["--bootstrap_iters", "0"], {"bootstrap_iters": 0}),
    ],
)  # fmt: skip
def test_scores_and_prompts_are_those_of_lm_eval(chat_pair, tasks, tmp_path, given, settings):
    names = ["choice", "rolling", "generation"]
    main(
        [
            *flags(chat_pair, tmp_path, num_layers_to_patch=2, include_path=tasks),
            *("--tasks", ",".join(names), "--log_samples", *given),
        ]
    )
    (result,) = read_results(tmp_path).values()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(chat_pair[0]).eval(),
        tokenizer=tokenizer, batch_size=1, max_length=settings.pop("max_length", None),
    )  # fmt: skip
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = evaluator.simple_evaluate(lm, tasks=names, task_manager=manager, **settings)
    found = numbers_of(result.results)
    assert found == pytest.approx(numbers_of(expected["results"]), rel=1e-5)
    assert len(found) >= 3
    assert result.n_shot == expected["n-shot"]
    for name in names:
        path = tmp_path / "samples" / "family_k2" / f"samples_{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for ours, theirs in zip(lines, expected["samples"][name], strict=True):
            assert ours["prompt_hash"] == theirs["prompt_hash"]
            assert ours["doc_id"] == theirs["doc_id"]
            if name == "generation":
                assert ours["resps"] == theirs["resps"]


def test_prompts_are_built_once_and_members_do_not_see_each_others_answers(tasks, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    built = []
    original = ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        ConfigurableTask,
        "fewshot_context",
        lambda self, doc, *a, **kw: built.append(1) or original(self, doc, *a, **kw),
    )
    loaded = load_tasks(["choice"], str(tasks)).by_name["choice"]
    harness = Harness(num_fewshot=2)
    sources = harness.sources(loaded)

    class Constant(HFLM):
        def __init__(self, best: int) -> None:
            self.best, self._rank, self._world_size = best, 0, 1

        def loglikelihood(self, requests, disable_tqdm=False):
            return [(-float(request.idx != self.best), False) for request in requests]

    found = [harness.score(Constant(best), loaded) for best in (0, 1, 0)]
    assert len(built) == len(QUESTIONS)
    assert [f["results"]["choice"]["acc,none"] for f in found] == [0.5, 0.5, 0.5]
    assert [[s["acc"] for s in f["samples"]["choice"]] for f in found] == [
        [float(i % 2 == best) for i in range(6)] for best in (0, 1, 0)
    ]
    assert all(len(s["resps"][0]) == 1 for f in found for s in f["samples"]["choice"])
    assert harness.sources(loaded) == sources


def test_answers_without_metrics(pair_folders, tasks, tmp_path):
    main([*flags(pair_folders, tmp_path, tasks="generation", include_path=tasks), "--predict_only"])
    (result,) = read_results(tmp_path).values()
    assert "exact_match,none" not in result.results["generation"]
    path = tmp_path / "samples" / "family_k1" / "samples_generation.jsonl"
    assert len(path.read_text().splitlines()) == len(QUESTIONS)
    assert "999" not in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_lm_evals_own_files(pair_folders, tasks, tmp_path, monkeypatch, caplog):
    """Its table maker reads them, and only models with new scores get further ones."""
    logged = []

    class Recorder:
        run = types.SimpleNamespace(finish=lambda: None)
        finish, log_eval_result = (lambda self: None), (lambda self: None)

        def __init__(self, values):
            logged.append(values)

        def post_init(self, found):
            logged[-1] |= {"acc": found["results"]["choice"]["acc,none"]}

        def log_eval_samples(self, samples):
            # lm-eval's loggers take the most likely choice from these.
            best = [
                max(range(2), key=lambda i: sample["filtered_resps"][i][0])
                for sample in samples["choice"]
            ]
            assert {*samples} == {"choice", "rolling"}
            logged[-1] |= {"best": best, "first": samples["choice"][0]["arguments"][0][0]}
            raise ConnectionError("the service is gone")

    for name in ("WandbLogger", "TrackioLogger"):
        monkeypatch.setattr(trackers, name, Recorder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    settings = {"tasks": "choice,rolling", "include_path": tasks}
    more = ["--log_samples", "--wandb_args", "project=p,group=g", "--trackio_args", "project=q"]
    main([*flags(pair_folders, tmp_path, num_layers_to_patch="0-1", **settings), *more])
    results = read_results(tmp_path)
    for name, result in results.items():
        folder = tmp_path / "lm_eval" / name
        (path,) = folder.glob("results_*.json")
        found = json.loads(path.read_text())
        table = make_table(json.loads(path.read_text()))
        for task in ("choice", "rolling"):
            assert f"|{task}" in table
            (samples,) = folder.glob(f"samples_{task}_*.jsonl")
            assert get_file_task_name(samples.name) == task
            assert get_file_datetime(samples.stem) == get_file_datetime(path.stem)
        assert found["results"] == result.results
        assert found["config"]["model_args"] == f"pretrained={name}"
        acc = result.results["choice"]["acc,none"]
        lines = (tmp_path / "samples" / name / "samples_choice.jsonl").read_text().splitlines()
        found = [json.loads(line)["filtered_resps"] for line in lines]
        best = [int(float(choices[1][0]) > float(choices[0][0])) for choices in found]
        same = {"name": name, "acc": acc, "best": best, "first": TEXTS[0]}
        assert same | {"project": "p", "group": "g"} in logged
        assert same | {"project": "q"} in logged
    assert caplog.text.count("logging to wandb failed") == len(results) == 2
    main(flags(pair_folders, tmp_path, num_layers_to_patch="0-2", **settings))
    counts = [len([*(tmp_path / "lm_eval" / f"family_k{k}").iterdir()]) for k in range(3)]
    assert counts == [3, 3, 1]


def test_the_first_prompt_is_shown(pair_folders, tasks, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        main([*flags(pair_folders, tmp_path, tasks="choice", include_path=tasks), "--write_out"])
    assert f"choice, first prompt:\n{TEXTS[0]}" in caplog.text


def test_patterns_and_task_files(tasks, tmp_path):
    assert list(load_tasks(["choice*"], str(tasks)).by_name) == ["choice", "choice_2"]
    config = yaml.safe_load((tasks / "choice.yaml").read_text()) | {"task": "from_a_file"}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(config))
    loaded = load_tasks([str(tmp_path / "some.yaml"), "rolling"], str(tasks)).by_name
    assert list(loaded) == ["from_a_file", "rolling"]
    assert list(loaded["from_a_file"]["tasks"]) == ["from_a_file"]
    assert list(load_tasks([str(tmp_path / "*.yaml")], str(tasks)).by_name) == ["from_a_file"]
    with pytest.raises(ValueError, match="no_such.yaml: lm-eval has no such task"):
        load_tasks([str(tmp_path / "no_such.yaml")], str(tasks))


def test_metadata_reaches_tasks(tasks):
    loaded = load_tasks(["choice"], str(tasks), metadata={"lengths": [4096]}).by_name
    (task,) = loaded["choice"]["tasks"].values()
    assert task.config.metadata["lengths"] == [4096]


def test_unsafe_code_runs_only_when_confirmed(tasks):
    loaded = load_tasks(["choice"], str(tasks)).by_name["choice"]
    (task,) = loaded["tasks"].values()
    task.UNSAFE_CODE = True
    with pytest.raises(ValueError, match="choice runs code .* --confirm_run_unsafe_code"):
        Harness().sources(loaded)
    Harness(confirm_run_unsafe_code=True).sources(loaded)


def test_prompts_are_kept_for_further_runs(tasks, tmp_path, monkeypatch):
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path))
    arguments = {"teacher_model_name_or_path": "t", "student_model_name_or_path": "s"}
    arguments |= {"save_directory": tmp_path}
    for value, num_files in (("true", 1), ("refresh", 1), ("delete", 0)):
        harness = Harness.of(EvaluationArguments(**arguments, cache_requests=value))
        loaded = load_tasks(["choice"], str(tasks)).by_name["choice"]
        harness.sources(loaded)
        assert len([p for p in tmp_path.iterdir() if "choice" in p.name]) == num_files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_kwargs": ["temperature"]}, "gen_kwargs=temperature: write key=value"),
        ({"metadata": ['{"a": ']}, "metadata={"),
        ({"samples": "{"}, "this is not JSON"),
        ({"samples": '{"a": 3}'}, "write a list of numbers for each task"),
        ({"samples": '{"a": [3]}', "limit": 3.0}, "--limit and --samples both choose"),
        ({"fewshot_as_multiturn": "true"}, "needs --apply_chat_template"),
        ({"fewshot_as_multiturn": "maybe"}, "fewshot_as_multiturn=maybe: true or false"),
        ({"seed": "1,x"}, "seed=1,x: choose one number or four"),
        ({"eval_batch_size": "auto:0"}, "eval_batch_size=auto:0: choose"),
        ({"max_length": 1}, "max_length=1: choose 2 or more"),
        ({"bootstrap_iters": -1}, "bootstrap_iters=-1: choose 0 or more"),
        ({"max_batch_size": 0}, "max_batch_size=0: choose 1 or more"),
        ({"generation_batch_size": 0}, "generation_batch_size=0: choose 1 or more"),
        ({"wandb_args": ["project=p"]}, "--wandb_args needs wandb, which is not installed"),
    ],
)
def test_bad_flags(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = {"teacher_model_name_or_path": "t", "student_model_name_or_path": "s"}
    with pytest.raises(ValueError, match="") as error:
        EvaluationArguments(**values | {"save_directory": tmp_path} | changes)
    assert message in str(error.value)
