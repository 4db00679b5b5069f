"""Local lm-eval tasks over the held-out modules of the standard library.

    stdlib_bits_per_byte  rolling log-likelihood of each module's beginning
    stdlib_next_line      choose which of four lines of the module comes next
    stdlib_end_of_line    generate the last word of a line (exact match)

The questions depend only on the modules' names and text.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.stdlib.corpus import Module

BEGINNING_CHARACTERS = 4000
CONTEXT_LINES = 10
NUM_DOCUMENTS = {
    "stdlib_bits_per_byte": 100,
    "stdlib_next_line": 150,
    "stdlib_end_of_line": 150,
}
TASK_NAMES = tuple(NUM_DOCUMENTS)


def beginning(module: Module) -> list[dict[str, Any]]:
    """The module's first lines, about BEGINNING_CHARACTERS in all.

    Scoring puts an end-of-text token first. In training, that token only precedes the first line of
    a module, so the text must be a beginning.
    """
    text = module.text[:BEGINNING_CHARACTERS]
    if len(text) < len(module.text):
        text = text[: text.rfind("\n") + 1]
    return [{"module": module.name, "text": text}]


def next_line_questions(module: Module) -> list[dict[str, Any]]:
    """For some lines: the context before, and the line itself among three others of the module."""
    lines = module.text.splitlines()
    candidates = sorted({line for line in lines if 10 <= len(line.strip()) <= 60})
    draw = random.Random(module.name)
    questions = []
    for i in _asked_lines(lines, draw):
        if lines[i] not in candidates or len(candidates) < 8:
            continue
        others = draw.sample([line for line in candidates if line != lines[i]], 3)
        answer = draw.randrange(4)
        choices = [*others[:answer], lines[i], *others[answer:]]
        questions.append({"context": _context(lines, i), "choices": choices, "answer": answer})
    return questions


def end_of_line_questions(module: Module) -> list[dict[str, Any]]:
    """For some lines: the context and the line without its last word, and that word."""
    lines = module.text.splitlines()
    draw = random.Random(module.name)
    questions = []
    for i in _asked_lines(lines, draw):
        beginning, _, last_word = lines[i].rpartition(" ")
        if beginning.strip() and 3 <= len(last_word) <= 16:
            questions.append({"context": _context(lines, i) + beginning, "answer": last_word})
    return questions


def _asked_lines(lines: list[str], draw: random.Random) -> list[int]:
    """Up to eight increasing line indices, each with a full context before it."""
    possible = range(CONTEXT_LINES, len(lines))
    return sorted(draw.sample(possible, min(8, len(possible))))


def _context(lines: list[str], i: int) -> str:
    return "".join(f"{line}\n" for line in lines[i - CONTEXT_LINES : i])


MAKERS = {
    "stdlib_bits_per_byte": beginning,
    "stdlib_next_line": next_line_questions,
    "stdlib_end_of_line": end_of_line_questions,
}

TASK_FILES: dict[str, dict[str, Any]] = {
    "stdlib_bits_per_byte": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    },
    "stdlib_next_line": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "stdlib_end_of_line": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [
            {
                "name": "strip",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(modules: Iterable[Module], folder: Path) -> None:
    """Write each task's documents and task file to `folder`, which `--include_path` then names."""
    modules = list(modules)
    for name, make in MAKERS.items():
        documents = [document for module in modules for document in make(module)]
        chosen = random.Random(0).sample(documents, min(NUM_DOCUMENTS[name], len(documents)))
        write_task(folder, name, chosen, TASK_FILES[name])


def write_task(
    folder: Path, name: str, documents: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    """Write one task's documents, and a task file with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    data_file = (folder / f"{name}.jsonl").resolve()
    data_file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data_file)}},
        "test_split": "test",
        **settings,
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
