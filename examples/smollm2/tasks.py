"""The tasks that the family is measured on, as files for lm-eval.

    heldout_bits_per_byte   the beginning of each document of the held-out text
    wikitext_2              the beginnings of WikiText-2's test articles, bits per byte
    blimp_paradigms         BLiMP's paradigms, 8 of them: the acceptable sentence of each pair
    stdlib_...              the demo's three tasks on Python's standard library

WikiText-2 and BLiMP come from the folder in the environment variable BOOMERANG_DATA and are left
out without it. The numbers of documents suit a CPU: every one is read by 43 models.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from examples.smollm2.text import Text, data_folder
from examples.stdlib.corpus import is_held_out, iter_modules
from examples.stdlib.tasks import MAKERS, TASK_FILES, write_task
from patching.files.outputs import write_text
from patching.files.texts import load_documents

PASSAGE_CHARACTERS = 1000
"""Length of the held-out passages that training evaluates on."""
TASK_CHARACTERS = 600
"""Length of the texts in the tasks, which every model reads."""
NUM_ARTICLES = 16
PAIRS_PER_PARADIGM = 16
NUM_DOCUMENTS = {
    "stdlib_bits_per_byte": 12,
    "stdlib_next_line": 12,
    "stdlib_end_of_line": 12,
}
TASK_NAMES = ("heldout_bits_per_byte", "wikitext_2", *MAKERS)
"""All tasks besides those of BLiMP, whose names begin with `blimp_`."""
ARTICLE = re.compile(r"(?=^ = [^=].*[^=] = $)", re.MULTILINE)
BITS_PER_BYTE = TASK_FILES["stdlib_bits_per_byte"]
BLIMP_PAIR = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_all_tasks(text: Text, folder: Path) -> list[str]:
    """Write the tasks to `folder`, in place of those of an earlier run, and return their names."""
    for path in folder.glob("*"):
        if path.stem in TASK_NAMES or path.stem.startswith("blimp_"):
            path.unlink()
    names = []
    if text.held_out is not None:
        documents = [{"text": text} for text in passages(text.held_out, TASK_CHARACTERS)]
        names.append("heldout_bits_per_byte")
        write_task(folder, names[-1], documents, BITS_PER_BYTE)
    data = data_folder()
    if data is not None and (data / "wikitext-2" / "test.txt").is_file():
        articles = ARTICLE.split((data / "wikitext-2" / "test.txt").read_text(encoding="utf-8"))
        beginnings = [beginning(a, TASK_CHARACTERS) for a in articles if a.strip()]
        documents = [{"text": text} for text in beginnings[:NUM_ARTICLES]]
        names.append("wikitext_2")
        write_task(folder, names[-1], documents, BITS_PER_BYTE)
    if data is not None and (data / "blimp").is_dir():
        names.append("blimp_paradigms")
        write_blimp(data / "blimp", folder)
    return names + write_stdlib_tasks(folder)


def passages(held_out: str, num_characters: int) -> Iterator[str]:
    """The beginning of each document of a text."""
    for document in load_documents(held_out):
        if document["text"] and document["text"].strip():
            yield beginning(document["text"], num_characters)


def write_passages(held_out: str, path: Path) -> Path:
    """Write the passages of a text to a .jsonl file and return it: few enough to measure often."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": passage}) + "\n" for passage in passages(held_out, PASSAGE_CHARACTERS)
    ]
    write_text(path, "".join(lines))
    return path


def beginning(text: str, num_characters: int) -> str:
    """At most `num_characters` from the start of a text, up to the end of a word."""
    text = text.strip()
    cut = text[:num_characters]
    if len(cut) < len(text) and " " in cut:
        cut = cut[: cut.rindex(" ")]
    return cut


def write_blimp(data: Path, folder: Path) -> None:
    """Write each paradigm as a task, and all of them as a group."""
    names = []
    for path in sorted(data.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        chosen = random.Random(0).sample(lines, min(PAIRS_PER_PARADIGM, len(lines)))
        pairs = [json.loads(line) for line in chosen]
        kept = [{key: pair[key] for key in ("sentence_good", "sentence_bad")} for pair in pairs]
        names.append(f"blimp_{path.stem}")
        write_task(folder, names[-1], kept, BLIMP_PAIR)
    group = {
        "group": "blimp_paradigms",
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
        "metadata": {"version": 1.0},
    }
    (folder / "blimp_paradigms.yaml").write_text(json.dumps(group, indent=1) + "\n")  # JSON is YAML


def write_stdlib_tasks(folder: Path) -> list[str]:
    """Write the demo's tasks on held-out modules, with shorter beginnings, and return their
    names.
    """
    modules = [module for module in iter_modules() if is_held_out(module.name)]
    for name, make in MAKERS.items():
        documents = [document for module in modules for document in make(module)]
        if name == "stdlib_bits_per_byte":
            documents = [{"text": beginning(module.text, TASK_CHARACTERS)} for module in modules]
        chosen = random.Random(0).sample(documents, min(NUM_DOCUMENTS[name], len(documents)))
        write_task(folder, name, chosen, TASK_FILES[name])
    return list(MAKERS)
