"""The documents: what they link to and name exists, and commands published earlier still run."""

import contextlib
import functools
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import ROOT, byte_tokenizer, tiny_config, tiny_model
from local_tasks import CHOICE, QUESTIONS, write_task
from masked_models import encoder_config, texts_of, tiny_distilbert, word_tokenizer
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
]
COMMAND_LINES = (
    "train.train",
    "train.cache_teacher",
    "train.weight_delta",
    "evaluate.evaluate",
    "evaluate.report",
    "patching.patch",
    "patching.orders",
    "patching.similarity",
)
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")


class Command(NamedTuple):
    launcher: str
    """What comes before the module: `python -m`, or torchrun and its flags."""
    module: str
    rest: str


def run(module: str, *flags: object) -> str:
    """Run `python -m module flags` in this process and return what it prints."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, *map(str, flags)]),
        contextlib.redirect_stdout(printed),
    ):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exited:
            assert not exited.code, f"{module} ended with exit code {exited.code}"
    return printed.getvalue()


@functools.cache
def flags_of(module: str) -> set[str]:
    """The flags that `--help` lists."""
    options = [
        re.split(r"\s{2,}", line.strip())[0]
        for line in run(module, "--help").splitlines()
        if line.startswith("  -")
    ]
    return {flag for option in options for flag in FLAG.findall(option)}


def torchrun_flags() -> set[str]:
    return {name for action in get_args_parser()._actions for name in action.option_strings}


def code_in(text: str) -> list[str]:
    """Lines of code blocks, fenced or indented, with continuation lines joined, and inline code."""
    lines, is_fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            lines.append(line.strip())
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return joined + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands_in(text: str) -> list[Command]:
    """Every `python -m MODULE ...` and `torchrun ... --module MODULE ...`."""
    pattern = re.compile(r"(python3? -m|torchrun .*--module) ([\w.]+)(.*)")
    found = map(pattern.search, code_in(text))
    return [Command(*match.groups()) for match in found if match]


def anchors_in(text: str) -> set[str]:
    """The fragments that a Markdown page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_somewhere(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        name, _, fragment = link.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), link
        if fragment:
            assert fragment in anchors_in(path.read_text()), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_and_flag_of_a_command_exists(document):
    for command in commands_in((ROOT / document).read_text()):
        try:
            found = importlib.util.find_spec(command.module)
        except ModuleNotFoundError:
            found = None
        assert found is not None, f"there is no module {command.module}"
        assert set(FLAG.findall(command.launcher)) - {"--module"} <= torchrun_flags()
        if command.module in COMMAND_LINES:
            unknown = set(FLAG.findall(command.rest)) - flags_of(command.module)
            assert not unknown, f"{command.module} has no {', '.join(sorted(unknown))}"


def test_the_training_page_names_flags_of_train_train():
    named = set(FLAG.findall((ROOT / "docs" / "training.md").read_text()))
    assert "--module train.train" in (ROOT / "README.md").read_text()
    assert "--fsdp_config $TEACHER" in (ROOT / "README.md").read_text()
    assert len(named) > 15
    commands = ("train.train", "train.cache_teacher", "train.weight_delta")
    known = torchrun_flags().union(*map(flags_of, commands))
    assert named <= known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_in_the_text_exists(document):
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")]
    known = set(re.findall(r'"(--[\w-]+)"', "".join(script.read_text() for script in scripts)))
    known |= torchrun_flags() | set().union(*map(flags_of, COMMAND_LINES))
    known.add("--seconds")  # of a script that is gone, named with the figures it made
    for code in code_in((ROOT / document).read_text()):
        unknown = set(FLAG.findall(code)) - known
        assert not unknown, f"no command line has {', '.join(sorted(unknown))}"


# Commands of the README as first published. They must keep working as they are.

TRAIN = r"""
    torchrun --standalone --nnodes=1 --nproc-per-node=4 --module train.train \
        --teacher_model_name_or_path $TEACHER --save_directory DIR \
        --dataset EleutherAI/the_pile_deduplicated --fsdp_config $TEACHER
"""
TRAIN_OWN_TEACHER = """
    python -m train.train --teacher_model_name_or_path MY_TEACHER --save_directory STUDENT --dataset MY_TEXT
"""  # noqa: E501
EVALUATE_ONE = r"""
    python3 -m evaluate.evaluate --teacher_model_name_or_path $TEACHER --student_model_name_or_path $STUDENT \
        --save_directory DIR --num_layers_to_patch 4
"""  # noqa: E501
EVALUATE_ALL = r"""
    python3 -m evaluate.evaluate --teacher_model_name_or_path $TEACHER --student_model_name_or_path $STUDENT \
        --save_directory DIR --num_layers_to_patch all --tasks arc_easy,hellaswag,wikitext \
        --baselines naive,block_influence --calibration TEXT --random_student STUDENT_2 --compare MODEL
"""  # noqa: E501
EVALUATE_TEXT = r"""
    python3 -m evaluate.evaluate --teacher_model_name_or_path google-bert/bert-base-uncased \
        --student_model_name_or_path distilbert/distilbert-base-uncased --save_directory DIR \
        --dataset Salesforce/wikitext --dataset_config wikitext-2-raw-v1 --limit 40 --baselines naive --dtype float32
"""  # noqa: E501
REPORT = """
    python3 -m evaluate.report DIR... --save_directory OUT
"""
PATCH = r"""
    python3 -m patching.patch --teacher_model_name_or_path $TEACHER --student_model_name_or_path $STUDENT \
        --num_layers_to_patch 4 --save_directory DIR
"""  # noqa: E501
ORDERS = r"""
    python -m patching.orders --teacher_model_name_or_path $TEACHER --student_model_name_or_path $STUDENT \
        --calibration TEXT --save_directory DIR --beam 3 --exact
"""  # noqa: E501
PATCH_IN_ORDER = """
    python -m patching.patch ... --order DIR/order.json        # evaluate.evaluate takes it too
"""
IN_PYTHON = """
    from patching.patch import build_intermediate_model, iter_family

    model, tokenizer = build_intermediate_model(teacher, student, num_layers_to_patch=4)
    for size in iter_family(teacher, student):  # one copy of both in memory
        print(size.num_layers_to_patch, size.model.num_parameters())
"""
PUBLISHED_FLAGS = {
    "train.train": (
        "--packing --dry_run --dry_run_ranks --fsdp_config --resume_from_checkpoint "
        "--torch_compile --attn_implementation --use_liger_kernel --activation_checkpointing "
        "--report_to --kept_layers --calibration --num_kept_layers --target_params "
        "--first_layers_to_keep --alternate_every_n_layers --last_layers_to_keep "
        "--trust_remote_code --T --revision"
    ),
    "evaluate.evaluate": (
        "--random_student --compare --tasks --include_path --log_samples --order --calibration "
        "--kept_layers --dataset --trust_remote_code --patch_first_k_layers "
        "--override_llama_patching --eval_batch_size --dtype --revision"
    ),
    "patching.patch": (
        "--target_params --target_bytes --patched_layers --list --push_to_hub --order "
        "--calibration --kept_layers --trust_remote_code --revision"
    ),
    "patching.orders": "--calibration --save_directory --beam --exact",
    "patching.similarity": "--calibration --save_directory",
    "evaluate.report": "--save_directory",
}

NUM_LAYERS = 12  # 7 kept by default, 5 of them patchable
FEW_STEPS = (
    *("--max_steps", 2, "--max_length", 32, "--gradient_accumulation_steps", 2),
    *("--save_strategy", "no", "--report_to", "none"),
)
SUITE = (
    *("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande"),
    *("race", "mmlu", "rte", "wikitext", "gsm8k_cot", "ifeval", "hendrycks_math"),
)


def run_published(text: str, values: dict[str, object], *more: object) -> str:
    """Run a published command with some words replaced and more flags added.

    A tuple in `values` takes the place of its word as several words.
    """
    (command,) = commands_in(text)
    words = []
    for word in shlex.split(command.rest, comments=True):
        value = values.get(word, word)
        words += value if isinstance(value, tuple) else (value,)
    missing = values.keys() - set(shlex.split(command.rest, comments=True))
    assert not missing, f"the command has no {', '.join(missing)}"
    return run(command.module, *words, *more)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "teacher"
    tiny_model(tiny_config("qwen3-tied", NUM_LAYERS)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(teacher, text_file) -> Path:
    """What the published training command makes."""
    folder = teacher.parent / "student"
    values = {
        "$TEACHER": teacher,
        "DIR": folder,
        "EleutherAI/the_pile_deduplicated": text_file,
    }
    run_published(TRAIN, values, *FEW_STEPS)
    return folder


@pytest.fixture(scope="module")
def patched(teacher, student) -> Path:
    """What the published patching command makes."""
    folder = teacher.parent / "k4"
    values = {"$TEACHER": teacher, "$STUDENT": student, "DIR": folder}
    run_published(PATCH, values)
    return folder


@pytest.fixture(scope="module")
def suite(teacher) -> Path:
    """Local tasks by the names of the paper's suite, so that nothing is downloaded."""
    folder = teacher.parent / "tasks"
    folder.mkdir()
    for name in SUITE:
        write_task(folder, name, QUESTIONS, **CHOICE)
    return folder


@pytest.mark.parametrize("module", PUBLISHED_FLAGS)
def test_published_flags_are_still_there(module):
    assert set(PUBLISHED_FLAGS[module].split()) <= flags_of(module)


def test_the_published_training_command_runs(student):
    names = {path.name for path in student.iterdir()}
    assert {"model.safetensors", "student_config.json", "run.json", "loss.png"} <= names
    config = json.loads((student / "student_config.json").read_text())
    assert config["copied_teacher_layers"] == [0, 2, 4, 6, 8, 10, 11]


def test_the_published_command_for_ones_own_teacher_runs(teacher, text_file):
    folder = teacher.parent / "own_student"
    values = {"MY_TEACHER": teacher, "STUDENT": folder, "MY_TEXT": text_file}
    plan = run_published(TRAIN_OWN_TEACHER, values, "--dry_run", "--max_length", 32)
    assert "student of 7 layers from 12" in plan
    assert not folder.exists()


@torch.no_grad()
def test_the_published_patching_command_and_python_agree(teacher, student, patched):
    namespace = {"teacher": str(teacher), "student": str(student)}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(textwrap.dedent(IN_PYTHON), namespace)
    assert [line.split()[0] for line in printed.getvalue().splitlines()] == list("012345")
    saved = AutoModelForCausalLM.from_pretrained(patched)
    tokens = namespace["tokenizer"]("Document", return_tensors="pt")["input_ids"]
    assert torch.equal(saved(tokens).logits, namespace["model"](tokens).logits)


@pytest.mark.parametrize("document", ["README.md", "docs/patching.md"])
def test_python_in_the_documents_runs(document, teacher, student, patched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the documents' DIR appears
    text = (ROOT / document).read_text()
    for name, folder in (
        ("Qwen/Qwen3-4B-Base", teacher),
        ("Harvard-DCML/boomerang-qwen3-2.3B", student),
        ("DIR/provenance.json", patched / "provenance.json"),
    ):
        assert name in text or name.startswith("DIR")
        text = text.replace(name, str(folder))
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        exec(block, {})


@pytest.mark.slow
def test_published_evaluations_and_their_report_run(
    teacher, student, patched, suite, text_file, tmp_path
):
    values = {"$TEACHER": teacher, "$STUDENT": student}
    include, one, whole = ("--include_path", suite), tmp_path / "one", tmp_path / "all"
    run_published(EVALUATE_ONE, values | {"DIR": one}, *include)
    assert json.loads((one / "family_k4.json").read_text())["results"].keys() == set(SUITE)
    values |= {"DIR": whole, "TEXT": text_file, "STUDENT_2": student, "MODEL": patched}
    run_published(EVALUATE_ALL, values, *include)
    assert {path.stem for path in whole.glob("*_k[0-9].json")} == {
        *(f"family_k{k}" for k in range(6)),
        *(f"{name}_k{k}" for name in ("naive", "block_influence") for k in range(5)),
        *(f"random_student_k{k}" for k in range(5)),  # its largest size is the teacher again
        "compare_k4",  # the folder's name
    }
    run_published(REPORT, {"DIR...": (one, whole), "OUT": tmp_path / "both"})
    assert "one: k = 4" in (tmp_path / "both" / "summary.md").read_text()


@pytest.mark.slow
def test_the_published_evaluation_on_text_runs(tmp_path):
    for name, model in (
        ("teacher", tiny_model(encoder_config("bert", NUM_LAYERS))),
        ("student", tiny_distilbert(6)),
    ):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "words.txt").write_text("\n\n".join(texts_of([4, 9, 2])))
    values = {
        "google-bert/bert-base-uncased": tmp_path / "teacher",
        "distilbert/distilbert-base-uncased": tmp_path / "student",
        "Salesforce/wikitext": tmp_path / "words.txt",
        "DIR": tmp_path / "results",
    }
    # The names of the public students imply these layers.
    run_published(EVALUATE_TEXT, values, "--kept_layers", "0,2,4,7,9,11")
    assert "pseudo_perplexity" in (tmp_path / "results" / "summary.md").read_text()


@pytest.mark.slow
def test_the_published_search_and_its_order_file_work(teacher, student, suite, text_file, tmp_path):
    values = {"$TEACHER": teacher, "$STUDENT": student}
    found, text = tmp_path / "orders", {"TEXT": text_file}
    run_published(ORDERS, values | text | {"DIR": found}, "--calibration_texts", 4)
    order = json.loads((found / "order.json").read_text())["order"]
    models = [("--teacher_model_name_or_path", teacher), ("--student_model_name_or_path", student)]
    named = (*models[0], *models[1], "--num_layers_to_patch", 4)
    values = {"...": (*named, "--save_directory", tmp_path / "k4")}
    run_published(PATCH_IN_ORDER, values | {"DIR/order.json": found / "order.json"})
    assert json.loads((tmp_path / "k4" / "provenance.json").read_text())["order"] == order
    in_order = ("--order", found / "order.json", "--tasks", "rte", "--include_path", suite)
    run("evaluate.evaluate", *named, *in_order, "--save_directory", tmp_path / "results")
    assert json.loads((tmp_path / "results" / "family_k4.json").read_text())["order"] == order
