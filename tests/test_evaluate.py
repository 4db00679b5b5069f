"""`evaluate.evaluate` as a user runs it: sizes, baselines, local tasks, and tasks that import
Hugging Face's `evaluate`.
"""

import csv
import json
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import ROOT, VOCAB_SIZE, byte_tokenizer, run_module
from local_tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, TEXTS, flags, write_task
from transformers import AutoModelForCausalLM

from evaluate.arguments import PAPER_SUITE, EvaluationArguments
from evaluate.evaluate import main
from evaluate.result import read_results
from evaluate.tasks import load_tasks
from patching.cli.command_line import CommandLineParser
from patching.patch import build_intermediate_model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A rolling, a multiple-choice and a generative task, and two that need Hugging Face's
    evaluate.
    """
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "rolling", [{"text": text} for text in TEXTS], **ROLLING)
    write_task(folder, "choice", QUESTIONS, **CHOICE)

    (folder / "imports_evaluate.py").write_text(
        "import evaluate\n"
        "from evaluate import load\n\n\n"
        "def length(predictions, references):\n"
        "    assert evaluate.Metric and evaluate.__version__ and load\n"
        "    return float(len(predictions[0]))\n"
    )
    metric = {
        "metric": "!function imports_evaluate.length",
        "aggregation": "mean",
        "higher_is_better": True,
    }
    write_task(folder, "with_import", QUESTIONS, **GENERATION, metric_list=[metric])
    path = folder / "with_import.yaml"
    path.write_text(
        path.read_text().replace(
            "'!function imports_evaluate.length'", "!function imports_evaluate.length"
        )
    )

    local = folder / "always_half"
    local.mkdir()
    (local / "always_half.py").write_text(
        "import datasets\nimport evaluate\n\n\n"
        "class AlwaysHalf(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        text = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': text, 'references': text})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'always_half': 0.5}\n"
    )
    metric = {
        "metric": str(local),
        "hf_evaluate": True,
        "aggregation": "mean",
        "higher_is_better": True,
    }
    write_task(folder, "with_local_metric", QUESTIONS, **GENERATION, metric_list=[metric])

    downloaded = tmp_path_factory.mktemp("downloaded")
    metric = {"metric": "some_hub_metric", "aggregation": "mean", "higher_is_better": True}
    write_task(downloaded, "with_hub_metric", QUESTIONS, **GENERATION, metric_list=[metric])
    return folder, downloaded


def test_the_documented_command_line_parses():
    (arguments,) = CommandLineParser(EvaluationArguments).parse_args_into_dataclasses(
        [
            "--teacher_model_name_or_path",
            "T",
            "--student_model_name_or_path",
            "S",
            "--save_directory",
            "DIR",
            "--num_layers_to_patch",
            "4",
        ]
    )
    assert arguments.task_names == list(PAPER_SUITE)
    assert arguments.batch_size == 4
    assert arguments.dtype == "bfloat16"
    assert arguments.num_layers_to_patch == "4"
    assert not arguments.trust_remote_code


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_help_and_bad_flags_need_neither_torch_nor_lm_eval(command):
    code = (
        f"import sys\nfrom evaluate.{command} import main\n"
        "for words in (['--help'], ['--no_such_flag']):\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "assert not {'torch', 'lm_eval', 'matplotlib', 'datasets'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: evaluate.{command}" in done.stdout


def test_a_whole_sweep(pair_folders, tasks, tmp_path):
    out = tmp_path / "results"
    done = run_module(
        "evaluate.evaluate",
        *flags(pair_folders, out, num_layers_to_patch="all", baselines="naive"),
        *("--tasks", "rolling,choice,with_import,with_local_metric"),
        *("--include_path", tasks[0]),
        *("--limit", "5"),
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        ".lock", "documents", "lm_eval",
        *(f"family_k{k}.json" for k in (0, 1, 2)), "naive_k0.json", "naive_k1.json",
        *(f"summary.{suffix}" for suffix in ("md", "csv", "json", "png", "svg")),
    }  # fmt: skip
    results = read_results(out)
    for name, result in results.items():
        scores = result.results
        assert scores["with_local_metric"]["always_half,none"] == 0.5, name
        assert scores["with_import"]["length,none"] >= 0
        assert 0 <= scores["choice"]["acc,none"] <= 1
        assert result.n_samples["choice"]["effective"] == 5
        (run,) = result.runs.values()
        assert run.environment["lm_eval"] and run.arguments["limit"] == 5
        assert {task.run for task in result.tasks.values()} == {run.name}
        assert numpy.load(out / "documents" / f"{name}.npz")["choice/acc,none"].shape == (5,)
    assert [results[f"family_k{k}"].depth for k in (0, 1, 2)] == [4, 5, 6]
    assert results["naive_k1"].recipe["layers"][0] == "teacher 0"
    parameters = [results[f"family_k{k}"].parameters for k in (0, 1, 2)]
    assert parameters[0].both_counted < parameters[1].both_counted < parameters[2].both_counted
    assert parameters[1].stored == parameters[1].both_counted > parameters[2].stored

    assert json.loads((out / "family_k0.json").read_text()).keys() == {
        *("series", "num_layers_to_patch", "max_layers_to_patch", "order", "depth", "parameters"),
        *("recipe", "cost", "similarity", "tasks", "runs"),
        *("results", "group_subtasks", "higher_is_better", "n-shot", "n-samples", "versions"),
        *("configs", "generation_failures"),
    }

    summary = json.loads((out / "summary.json").read_text())
    tested = [dip for dip in summary["dips"] if dip["task"] in ("rolling", "choice")]
    assert tested and all(dip["is_paired"] and dip["p"] is not None for dip in tested)
    assert all(model["conditions"]["choice"]["is_verified"] for model in summary["models"])

    report = (out / "summary.md").read_text()
    assert report in done.stdout
    assert "‡" not in report and "†" not in report
    table = report.partition("## Averages")[2].split("\n\n")[2].splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "student", "naively pruned, k = 0", "k = 1", "naively pruned, k = 1", "teacher",
    ]  # fmt: skip
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert {row["task"] for row in rows} == {
        "rolling",
        "choice",
        "with_import",
        "with_local_metric",
    }
    assert len(rows) == 5 * 4
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "summary.svg").read_text()


@torch.no_grad()
def test_bits_per_byte_are_the_models_own(pair_folders, tasks, tmp_path):
    main(
        flags(
            pair_folders,
            tmp_path,
            num_layers_to_patch="0-2",
            tasks="rolling",
            include_path=tasks[0],
        )
    )
    tokenizer = byte_tokenizer()
    for k in range(3):
        model, _ = build_intermediate_model(*map(str, pair_folders), k)
        nats = 0.0
        for text in TEXTS:
            ids = torch.tensor([[VOCAB_SIZE - 1, *tokenizer(text)["input_ids"]]])
            log_p = model(ids).logits.double().log_softmax(-1)
            nats -= log_p[0, torch.arange(len(text)), ids[0, 1:]].sum().item()
        expected = nats / sum(map(len, TEXTS)) / torch.log(torch.tensor(2.0)).item()
        result = json.loads((tmp_path / f"family_k{k}.json").read_text())["results"]["rolling"]
        assert result["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_a_second_sweep_gives_the_same_numbers(pair_folders, tasks, tmp_path):
    """The tasks are loaded once for all sizes; running them leaves them as they were."""
    for name in ("a", "b"):
        main(
            flags(
                pair_folders,
                tmp_path / name,
                num_layers_to_patch="2,0" if name == "a" else "0",
                tasks="choice,rolling",
                include_path=tasks[0],
            )  # fmt: skip
        )
    first, second = (
        json.loads((tmp_path / name / "family_k0.json").read_text())["results"]
        for name in ("a", "b")
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_layers_to_patch": "1-9"},
            "num_layers_to_patch=1-9: this student has 2 patchable layers",
        ),
        pytest.param(
            {"tasks": "rollin"},
            "tasks=rollin: lm-eval has no such task, did you mean",
            marks=pytest.mark.slow,  # looks through all tasks
        ),
        ({"tasks": ","}, "no tasks"),
        (
            {"include_path": "/no/such/folder"},
            "include_path=/no/such/folder: there is no such folder",
        ),
        ({"limit": "0"}, "limit=0.0: choose a number above 0"),
        ({"num_fewshot": "-1"}, "num_fewshot=-1: choose 0 or more"),
        ({"seed": "1,2"}, "seed=1,2: choose one number or four"),
        ({"eval_batch_size": "none"}, "eval_batch_size=none"),
        ({"baselines": "random"}, "baselines=random: choose from naive, block_influence"),
        ({"save_directory": "/proc/x"}, "/proc/x cannot be written to"),
        ({"student_model_name_or_path": "no/such"}, "student_model_name_or_path=no/such"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_bad_input_ends_in_one_line_before_weights_load(
    pair_folders, tasks, tmp_path, capsys, monkeypatch, changes, message
):
    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
    values = {"tasks": "rolling", "include_path": tasks[0]} | changes
    with pytest.raises(SystemExit) as ended:
        main(flags(pair_folders, tmp_path / "out", **values))
    error = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert ended.value.code == 2
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_a_metric_from_the_hub_runs_only_when_trusted(tasks):
    with pytest.raises(
        ValueError, match="metric some_hub_metric cannot be loaded.*--trust_remote_code"
    ):
        load_tasks(["with_hub_metric"], str(tasks[1]))


def test_a_task_that_computes_its_own_metrics_is_taken(tmp_path):
    (tmp_path / "own.py").write_text("def score(doc, results):\n    return {'own': 1.0}\n")
    write_task(
        tmp_path, "own_metrics", [{"question": "q"}], output_type="generate_until",
        doc_to_text="{{question}}", doc_to_target="", process_results="!function own.score",
        metric_list=[{"metric": "own", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    path = tmp_path / "own_metrics.yaml"
    path.write_text(path.read_text().replace("'!function own.score'", "!function own.score"))
    loaded = load_tasks(["own_metrics"], str(tmp_path)).by_name["own_metrics"]
    assert list(loaded["tasks"]) == ["own_metrics"]
