"""lm-evaluation-harness itself on a saved model, against `evaluate.evaluate` in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from patching_models import family_pair, save_models

from evaluate.evaluate import main as evaluate
from patching.patch import main as patch

TEXTS = [f"the {i}th text of {i * i}" for i in range(12)]
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ROLLING = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}
GENERATION = {
    "task": "generation",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = [
        {"question": text, "choices": [" yes", " no", " none"], "answer": i % 3}
        for i, text in enumerate(TEXTS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
    }
    for task in (CHOICE, ROLLING, GENERATION):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | data))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_lm_eval_itself_finds_the_same_numbers(model_type, tasks, tmp_path):
    names = save_models(tmp_path / "pair", *family_pair(model_type, tied=True))
    parents = [
        *("--teacher_model_name_or_path", names[0], "--student_model_name_or_path", names[1]),
        *("--num_layers_to_patch", "1", "--dtype", "float32"),
    ]
    patch([*parents, "--save_directory", str(tmp_path / "saved")])
    what = ["--tasks", "choice,rolling,generation", "--include_path", str(tasks)]
    evaluate([*parents, *what, "--save_directory", str(tmp_path / "ours"), "--device", "cpu"])
    ours = json.loads((tmp_path / "ours" / "family_k1.json").read_text())["results"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"),
            *("--model_args", f"pretrained={tmp_path / 'saved'},dtype=float32"),
            *("--batch_size", "4", "--output_path", str(tmp_path / "theirs"), *what),
        ],
        cwd=tmp_path,  # where no folder hides Hugging Face's package `evaluate`
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    for task in ("choice", "rolling", "generation"):
        numbers = {key: value for key, value in ours[task].items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            if "stderr" not in key:  # drawn again by bootstrapping
                # lm-eval adds up log-likelihoods in fp32.
                assert theirs[task][key] == pytest.approx(value, rel=1e-6), (task, key)
