"""Small lm-eval tasks on disk, and the flags that run them."""

import json

import yaml
from conftest import save_pair


def write_task(folder, name, documents, **settings):
    data_file = folder / f"{name}.jsonl"
    data_file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data_file)}},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "no",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}
TEXTS = [f"the {i}th text of {i * i}" for i in range(6)]
QUESTIONS = [
    {"question": text, "choices": [" yes", " no"], "answer": i % 2} for i, text in enumerate(TEXTS)
]


def flags(pair_folders, folder, **changes):
    values = {
        "teacher_model_name_or_path": pair_folders[0],
        "student_model_name_or_path": pair_folders[1],
        "save_directory": folder,
        "num_layers_to_patch": 1,
        "dtype": "float32",
    } | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def save_pair_and_tasks(folder):
    """Save what a command reads: a pair, text to train on, and two tasks."""
    save_pair(folder)
    lines = [json.dumps({"text": f"Text {i} about {'. ' * (i % 13)}"}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tasks").mkdir()
    write_task(folder / "tasks", "choice", QUESTIONS * 3, **CHOICE)
    write_task(folder / "tasks", "generation", QUESTIONS, **GENERATION)
