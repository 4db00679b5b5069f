"""Long sweeps: what is stored, killed runs, failing tasks, baselines, samples, ranks."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, byte_tokenizer, run_module, save_pair, tiny_config, tiny_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evaluate import harness
from evaluate.evaluate import main
from evaluate.failures import read_failures
from evaluate.harness import write_samples
from evaluate.plan import compared_models
from evaluate.report import main as report
from evaluate.result import LM_EVAL_KEYS, Result, read_results
from evaluate.tasks import load_tasks
from patching.running.block_influence import block_influence, most_influential
from patching.running.calibration import Calibration
from patching.running.layer_collapse import collapse, collapsed_model, similarity_on

SLOW_SCORE = """
import time


def score(doc, results):
    time.sleep(0.04)
    return {"acc": float(results[0][0] > results[1][0])}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """One task of each kind, one that takes its time, one that breaks, one without data."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(folder, "choice", QUESTIONS, **CHOICE)
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write_task(folder, "generation", QUESTIONS, **GENERATION, metric_list=[metric])
    (folder / "slow_score.py").write_text(SLOW_SCORE)
    (folder / "breaking_score.py").write_text(
        "def score(doc, results):\n    raise KeyError('no such field')\n"
    )
    for name in ("slow", "breaking"):
        write_task(folder, name, QUESTIONS, **CHOICE, process_results=f"FUNCTION {name}_score")
        path = folder / f"{name}.yaml"
        path.write_text(
            path.read_text().replace(f"FUNCTION {name}_score", f"!function {name}_score.score")
        )
    write_task(folder, "no_data", QUESTIONS, **CHOICE)
    (folder / "no_data.jsonl").unlink()
    return folder


def scores(folder: Path) -> dict[str, dict]:
    return {name: result.results for name, result in read_results(folder).items()}


def finished(folder: Path) -> dict[tuple[str, str], float]:
    """The parts that are stored, and the seconds each took, which change if one is run again."""
    return {
        (name, task): of_task.seconds
        for name, result in read_results(folder).items()
        for task, of_task in result.tasks.items()
    }


@pytest.mark.slow
def test_a_killed_sweep_continues_where_it_stopped(pair_folders, tasks, tmp_path, monkeypatch):
    settings = {"num_layers_to_patch": "all", "baselines": "naive", "include_path": tasks}
    settings |= {"tasks": "choice,slow,generation"}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "evaluate.evaluate", *flags(pair_folders, killed, **settings)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and ("family_k1", "slow") not in (
        finished(killed) if killed.is_dir() else {}
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = finished(killed)
    assert ("family_k0", "slow") in before and ("naive_k1", "slow") not in before

    main(flags(pair_folders, killed, **settings))
    after = finished(killed)
    assert len(after) == 3 * 5
    assert {part: after[part] for part in before} == before
    main(flags(pair_folders, tmp_path / "whole", **settings))
    assert scores(killed) == scores(tmp_path / "whole")

    def nothing_left(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", nothing_left)
    main(flags(pair_folders, killed, **settings))
    assert finished(killed) == after


@pytest.mark.slow
def test_failing_tasks_do_not_lose_the_others(pair_folders, tasks, tmp_path, capsys):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(folder)))
    out = tmp_path / "out"
    command = flags(
        pair_folders, out, num_layers_to_patch="0-1", include_path=folder,
        tasks="no_data,breaking,choice,rolling",
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    reported = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")
    ]
    assert [line.split(": ")[1] for line in reported] == ["no_data", "breaking"]
    assert "KeyError: 'no such field'" in reported[1]
    assert all(values.keys() == {"choice", "rolling"} for values in scores(out).values())
    assert "- breaking: KeyError" in (out / "summary.md").read_text()
    report([str(out), "--save_directory", str(tmp_path / "report")])
    for name in ("summary.md", "summary.csv"):
        assert (tmp_path / "report" / name).read_text() == (out / name).read_text()

    before = finished(out)
    shutil.copy(folder / "choice.jsonl", folder / "no_data.jsonl")
    (folder / "breaking_score.py").write_text(SLOW_SCORE)
    main(command)
    assert "Not evaluated" not in (out / "summary.md").read_text()
    assert read_failures(out) == {}
    after = finished(out)
    assert len(after) == 2 * 4 and {part: after[part] for part in before} == before
    for values in scores(out).values():
        assert values["no_data"]["acc,none"] == values["choice"]["acc,none"]


def test_no_weights_load_if_no_task_can_be_loaded(
    pair_folders, tasks, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(SystemExit) as ended:
        main(flags(pair_folders, tmp_path / "out", tasks="no_data", include_path=tasks))
    assert ended.value.code == 1
    assert "failed: no_data: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 2}, "limit=None and 2.0 is asked for now"),
        ({"dtype": "bfloat16"}, "dtype=float32 and bfloat16"),
        ({"order": "first"}, "order=last and first"),
        ({"num_fewshot": 1}, "num_fewshot=None and 1"),
        ({"seed": 7}, "seed=[0, 1234, 1234, 1234] and [7, 7, 7, 7]"),
    ],
)
def test_results_with_other_settings_are_rejected(
    pair_folders, tasks, tmp_path, capsys, changes, message
):
    settings = {"tasks": "choice", "include_path": tasks}
    (tmp_path / "family_k0.json").write_text(json.dumps(stored_of(pair_folders, tasks).to_dict()))
    with pytest.raises(SystemExit) as ended:
        main(flags(pair_folders, tmp_path, **settings | changes))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line and "choose another --save_directory" in line


def stored_of(pair_folders, tasks) -> Result:
    """The student's stored scores, computed once."""
    out = tasks.parent / "stored"
    if not out.is_dir():
        main(flags(pair_folders, out, num_layers_to_patch=0, tasks="choice", include_path=tasks))
    return read_results(out)["family_k0"]


def test_a_student_trained_again_is_not_mixed_with_the_old_one(
    pair_folders, tasks, tmp_path, capsys
):
    student = tmp_path / "student"
    shutil.copytree(pair_folders[1], student)
    pair = (pair_folders[0], student)
    settings = {"tasks": "choice", "include_path": tasks, "num_layers_to_patch": 0}
    main(flags(pair, tmp_path / "out", **settings))
    weights = load_file(student / "model.safetensors")
    weights = {name: tensor * 1.001 for name, tensor in weights.items()}
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main(flags(pair, tmp_path / "out", **settings))
    assert ended.value.code == 2
    assert "student=student " in capsys.readouterr().err


def test_samples_are_written_as_lm_eval_does(pair_folders, tasks, tmp_path, monkeypatch):
    found = []
    score = harness.evaluate

    def remember(*args, **kwargs):
        found.append(score(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(harness, "evaluate", remember)
    settings = {"tasks": "choice,rolling,generation", "include_path": tasks, "limit": 3}
    settings["num_layers_to_patch"] = "0"
    main(flags(pair_folders, tmp_path / "out", **settings))
    assert not (tmp_path / "out" / "samples").exists()
    plain = scores(tmp_path / "out")
    main([*flags(pair_folders, tmp_path / "out", **settings), "--log_samples"])
    assert scores(tmp_path / "out") == plain
    num_scored = len(found)
    main([*flags(pair_folders, tmp_path / "out", **settings), "--log_samples"])
    assert len(found) == num_scored == 2 * 3  # not a third time

    tracker = EvaluationTracker(output_path=str(tmp_path / "lm_eval"))
    tracker.date_id = "now"
    for of_task in found[3:]:
        ((task, samples),) = of_task["samples"].items()
        write_samples(tmp_path / "again", {task: samples})
        tracker.save_results_samples(task, samples)
        (reference,) = (tmp_path / "lm_eval").rglob(f"samples_{task}_*.jsonl")
        expected = [json.loads(line) for line in reference.read_text().splitlines()]
        for folder in (tmp_path / "out" / "samples" / "family_k0", tmp_path / "again"):
            lines = (folder / f"samples_{task}.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == expected
        assert len(expected) == 3


def test_a_task_in_a_group_and_asked_for_by_name_runs_once(
    pair_folders, tasks, tmp_path, monkeypatch
):
    shutil.copytree(tasks, tmp_path / "tasks")
    group = {"group": "both", "task": ["choice", "generation"], "metadata": {"version": 1.0}}
    group["aggregate_metric_list"] = [{"metric": "acc"}]
    (tmp_path / "tasks" / "both.yaml").write_text(json.dumps(group))
    ran = []
    score = harness.evaluate

    def remember(*args, **kwargs):
        ran.append(sorted(kwargs["task_dict"]["tasks"]))
        return score(*args, **kwargs)

    monkeypatch.setattr(harness, "evaluate", remember)
    settings = {"tasks": "choice,rolling,both", "include_path": tmp_path / "tasks"}
    command = flags(pair_folders, tmp_path / "out", num_layers_to_patch=0, **settings)
    main(command)
    assert sorted(ran) == [["choice", "generation"], ["rolling"]]
    result = read_results(tmp_path / "out")["family_k0"]
    assert result.tasks.keys() == {"choice", "rolling", "both"}
    assert result.tasks["both"].contains == ["choice", "generation", "both"]
    assert result.tasks["both"].sources != result.tasks["choice"].sources
    report = (tmp_path / "out" / "summary.md").read_text()
    for task in ("choice", "both"):
        assert f"\n| {task} | acc ↑ |" in report
    main(command)
    assert len(ran) == 2


def test_a_task_with_other_settings_in_a_group_is_refused(tasks, tmp_path):
    shutil.copytree(tasks, tmp_path / "tasks")
    group = {"group": "both", "task": [{"task": "choice", "doc_to_text": "Q: {{question}}"}]}
    (tmp_path / "tasks" / "both.yaml").write_text(json.dumps(group))
    with pytest.raises(ValueError, match="choice has other settings in both than in choice"):
        load_tasks(["choice", "both"], str(tmp_path / "tasks"))


@pytest.mark.parametrize("num_fewshot", [None, 1])
def test_scores_are_those_of_simple_evaluate(pair_folders, tasks, tmp_path, num_fewshot):
    shutil.copytree(tasks, tmp_path / "tasks")
    group = {"group": "both", "task": ["choice", "generation"], "metadata": {"version": 1.0}}
    group["aggregate_metric_list"] = [{"metric": "acc"}]
    (tmp_path / "tasks" / "both.yaml").write_text(json.dumps(group))
    model = AutoModelForCausalLM.from_pretrained(pair_folders[0]).eval()
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=4)
    loaded = load_tasks(["both", "rolling"], str(tmp_path / "tasks")).by_name
    for name, of_name in loaded.items():
        found = harness.Harness(num_fewshot, limit=5).score(lm, of_name)
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        expected = simple_evaluate(
            lm, tasks=[name], task_manager=manager, num_fewshot=num_fewshot, limit=5,
            log_samples=False,
        )  # fmt: skip
        for key in LM_EVAL_KEYS.values():
            ours, theirs = harness.as_json(found.get(key)), harness.as_json(expected.get(key))
            assert ours == theirs, (name, key)
    assert found["results"]


@pytest.mark.slow
@torch.no_grad()
def test_everything_a_family_can_be_compared_with(pair_folders, tasks, tmp_path):
    """Both baselines, another student's family, and other models, one with another tokenizer."""
    text = tmp_path / "calibration.txt"
    text.write_text("\n\n".join(TEXTS))
    random_student = save_pair(tmp_path / "random")[1]
    weights = load_file(random_student / "model.safetensors")
    weights = {name: tensor.roll(1, 0) for name, tensor in weights.items()}
    save_file(weights, random_student / "model.safetensors", metadata={"format": "pt"})
    for name, kind in (("small", "gpt2"), ("smaller", "gpt_neox")):
        tiny_model(tiny_config(kind, 2)).save_pretrained(tmp_path / "models" / name)
        byte_tokenizer().save_pretrained(tmp_path / "models" / name)
    out = tmp_path / "out"
    main(
        [
            *flags(
                pair_folders, out, num_layers_to_patch="all", tasks="choice,rolling",
                include_path=tasks, baselines="naive,block_influence", calibration=text,
                random_student=random_student,
            ),
            *("--compare", str(tmp_path / "models"), "--compare", str(pair_folders[0])),
        ]
    )  # fmt: skip
    results = read_results(out)
    assert results.keys() == {
        *(f"family_k{k}" for k in (0, 1, 2)),
        *(f"{series}_k{k}" for series in ("naive", "block_influence", "random_student")
          for k in (0, 1)),
        "compare_small", "compare_smaller", "compare_teacher",
    }  # fmt: skip
    for name, result in results.items():
        assert result.results.keys() == {"choice", "rolling"}, name
    # The teacher compared as a single model has the family's numbers at k = max.
    for task, values in results["family_k2"].results.items():
        for key, value in values.items():
            if isinstance(value, float):
                compared = results["compare_teacher"].results[task][key]
                assert compared == pytest.approx(value, rel=1e-5), key
    bits = {name: result.results["rolling"] for name, result in results.items()}
    different = {round(values["bits_per_byte,none"], 4) for values in bits.values()}
    assert len(different) == len(bits) - 1

    texts = Calibration.read(str(text))
    teacher = AutoModelForCausalLM.from_pretrained(pair_folders[0]).eval()
    influences = block_influence(teacher, texts.batches(byte_tokenizer(), teacher.config))
    for k, depth in ((0, 4), (1, 5)):
        result = results[f"block_influence_k{k}"]
        assert result.recipe == most_influential(influences, depth).to_dict()
        assert result.depth == results[f"family_k{k}"].depth == depth
    similarities = [results[f"family_k{k}"].similarity.to_teacher for k in (0, 1, 2)]
    assert similarities[2] == pytest.approx(1, abs=1e-6)
    assert max(similarities[:2]) < 0.9999
    assert results["compare_small"].similarity is None
    assert results["compare_small"].parameters.stored > 0
    report = (out / "summary.md").read_text()
    for name in ("small", "teacher", "pruned by block influence, k = 0"):
        assert f"\n| {name} |" in report
    assert "tokens of the first 6 texts of calibration.txt" in report

    before = finished(out)  # a smaller sweep in the same folder keeps what is there
    main(flags(pair_folders, out, num_layers_to_patch=1, tasks="choice", include_path=tasks))
    assert finished(out) == before
    assert "\n| smaller |" in (out / "summary.md").read_text()


@torch.no_grad()
@pytest.mark.slow
def test_merged_teachers_are_evaluated_alongside_the_family(
    pair_folders, tasks, tmp_path, monkeypatch
):
    text, out = tmp_path / "calibration.txt", tmp_path / "out"
    text.write_text("\n\n".join(TEXTS))
    settings = {"num_layers_to_patch": "all", "tasks": "choice,rolling,generation"}
    settings |= {"baselines": "laco,naive", "calibration": text, "include_path": tasks}
    main(flags(pair_folders, out, **settings))
    results = read_results(out)
    assert {name for name in results if "laco" in name} == {"laco_k0", "laco_k1"}
    assert "\n| layers merged by LaCo, k = 0 | 4 |" in (out / "summary.md").read_text()

    teacher = AutoModelForCausalLM.from_pretrained(pair_folders[0]).eval()
    tokenizer = byte_tokenizer()
    batches = Calibration.read(str(text)).batches(tokenizer, teacher.config)
    for k, depth in ((0, 4), (1, 5)):
        result = results[f"laco_k{k}"]
        expected = collapse(6, depth, similarity_on(teacher, batches))
        assert result.depth == results[f"naive_k{k}"].depth == depth
        assert result.parameters == results[f"naive_k{k}"].parameters
        assert result.recipe == expected.teacher.to_dict()
        model = collapsed_model(expected.teacher, teacher)
        ids = [torch.tensor([tokenizer(f"<eos>{text}")["input_ids"]]) for text in TEXTS]
        nats = sum(model(i, labels=i).loss.item() * (i.shape[1] - 1) for i in ids)
        bits = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
        assert result.results["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
        assert result.results["generation"] and result.similarity.to_teacher < 0.9999

    def nothing_left(*_, **__):
        raise AssertionError("weights were loaded")

    before = finished(out)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", nothing_left)
    main(flags(pair_folders, out, **settings))  # the merges are kept in the folder
    assert finished(out) == before


def test_compared_models_and_the_family_are_scored_by_one_arithmetic(pair_folders, tasks, tmp_path):
    """Also in bfloat16, where lm-eval itself rounds every log-probability."""
    settings = {"num_layers_to_patch": 2, "tasks": "choice,rolling", "include_path": tasks}
    settings |= {"dtype": "bfloat16", "compare": pair_folders[0]}
    main([*flags(pair_folders, tmp_path, **settings), "--log_samples"])
    for task in ("choice", "rolling"):
        answers = []
        for name in ("family_k2", "compare_teacher"):
            path = tmp_path / "samples" / name / f"samples_{task}.jsonl"
            answers.append([json.loads(line)["resps"] for line in path.read_text().splitlines()])
        assert answers[0] == answers[1]
        first = answers[0][0][0][0]
        log_p = float(first[0] if isinstance(first, list) else first)
        assert torch.tensor(log_p).bfloat16().item() != log_p


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": "block_influence"}, "name some with --calibration"),
        ({"baselines": "laco"}, "name some with --calibration"),
        ({"calibration": "/no/such/text"}, "/no/such/text"),
        ({"compare": "/no/such/model"}, "compare=/no/such/model: the model cannot be read"),
        ({"random_student": "/no/such/student"}, "/no/such/student"),
    ],
)
def test_what_is_missing_is_reported_before_weights_load(
    pair_folders, tasks, tmp_path, capsys, monkeypatch, changes, message
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    settings = {"tasks": "choice", "include_path": tasks} | changes
    with pytest.raises(SystemExit) as ended:
        main(flags(pair_folders, tmp_path / "out", **settings))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_prompt_has_as_many_examples_as_asked_for(pair_folders, tasks, tmp_path):
    """Also where a task's text has been read before, to compare the members on it."""
    settings = {"num_layers_to_patch": 0, "tasks": "choice", "include_path": tasks}
    main([*flags(pair_folders, tmp_path, num_fewshot=2, **settings), "--log_samples"])
    assert read_results(tmp_path)["family_k0"].n_shot == {"choice": 2}
    lines = (tmp_path / "samples" / "family_k0" / "samples_choice.jsonl").read_text().splitlines()
    prompt = json.loads(lines[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.endswith(f"\n\n{TEXTS[0]}") and prompt.count(" text of ") == 3


@pytest.mark.slow
def test_two_ranks_give_one_ranks_numbers(pair_folders, tasks, tmp_path):
    """Also with examples drawn at random, and where tasks fail."""
    compare = ("--compare", str(pair_folders[0]), "--log_samples")
    settings = {"num_layers_to_patch": "0-1", "include_path": tasks, "device": "cpu"}
    settings |= {"tasks": "no_data,breaking,choice,rolling,generation", "baselines": "naive"}
    settings |= {"num_fewshot": 2}
    with pytest.raises(SystemExit):
        main([*flags(pair_folders, tmp_path / "one", **settings), *compare])
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "evaluate.evaluate", *flags(pair_folders, tmp_path / "two", **settings), *compare),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 1, done.stderr  # because of the task without data
    assert done.stderr.count("failed: no_data") == 1
    assert done.stderr.count("failed: breaking: KeyError") == 1
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 5
    for name, result in one.items():
        assert result.n_samples == two[name].n_samples
        assert result.tasks.keys() == {"choice", "rolling", "generation"}
        for task, of_task in result.tasks.items():
            assert of_task.sources == two[name].tasks[task].sources
        for task, values in result.results.items():
            for key, value in values.items():
                if isinstance(value, float):
                    assert two[name].results[task][key] == pytest.approx(value, rel=1e-5)
        for task in result.results:
            path = Path("samples", name, f"samples_{task}.jsonl")
            lines = [(tmp_path / run / path).read_text().splitlines() for run in ("one", "two")]
            prompts = [[json.loads(line)["prompt_hash"] for line in of_run] for of_run in lines]
            assert prompts[0] == prompts[1] and len(prompts[0]) == len(TEXTS)
    assert os.listdir(tmp_path / "two").count("summary.md") == 1
    before = finished(tmp_path / "two")
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "evaluate.evaluate", *flags(pair_folders, tmp_path / "two", **settings), *compare),
        OMP_NUM_THREADS="1",
    )
    assert finished(tmp_path / "two") == before  # the failing tasks were tried again, no other


@pytest.mark.slow
def test_two_commands_write_into_one_folder(pair_folders, tasks, tmp_path):
    settings = {"tasks": "choice,slow", "include_path": tasks}
    words = [
        flags(pair_folders, tmp_path, num_layers_to_patch=sizes, **settings)
        for sizes in ("0-1", "1-2")
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "evaluate.evaluate", *of_command],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for of_command in words
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert finished(tmp_path).keys() == {
        (f"family_k{k}", task) for k in (0, 1, 2) for task in ("choice", "slow")
    }


@pytest.mark.slow
def test_one_document_is_enough_for_two_ranks(pair_folders, tasks, tmp_path):
    settings = {"num_layers_to_patch": 1, "include_path": tasks, "tasks": "choice,generation"}
    words = flags(pair_folders, tmp_path, **settings, limit=1, device="cpu")
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "evaluate.evaluate", *words),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert read_results(tmp_path)["family_k1"].n_samples["choice"]["effective"] == 1


@pytest.mark.slow
def test_what_is_missing_on_one_rank_is_one_line(pair_folders, tasks, tmp_path):
    """As on several nodes without a shared folder."""
    words = flags(pair_folders, tmp_path / "out", tasks="choice", include_path=tasks, device="cpu")
    words[words.index(str(pair_folders[1]))] = "/no/such/student"
    code = (
        "import os, runpy, sys\n"
        f"student = {str(pair_folders[1])!r} if os.environ['RANK'] == '0' else '/no/such/student'\n"
        f"sys.argv = ['evaluate', *{words!r}]\n"
        "sys.argv[sys.argv.index('/no/such/student')] = student\n"
        "runpy.run_module('evaluate.evaluate', run_name='__main__')\n"
    )
    (tmp_path / "start.py").write_text(code)
    done = run_module(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "start.py"),
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1: student_model_name_or_path=/no/such/student")


def test_compared_models_with_the_same_tokenizer_files_share_one_in_memory(tmp_path):
    for name in ("one", "two", "other"):
        tiny_model(tiny_config("llama", 2)).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    settings = tmp_path / "other" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 99}))
    arguments = SimpleNamespace(compare=[str(tmp_path)], trust_remote_code=False, dataset=None)
    found = compared_models(arguments, family=None)
    one, two, other = (found[f"compare_{name}"].tokenizer for name in ("one", "two", "other"))
    assert one is two is not other
    assert other.model_max_length == 99 and other.padding_side == "left"
