"""Commands that are killed at random moments: nothing that was reported done is lost, nothing
half-written looks finished, and the same command run again ends as if nothing had happened.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Command, ranks_of
from local_tasks import flags, save_pair_and_tasks
from safetensors.torch import load_file
from small_disks import mounted
from transformers import AutoModelForCausalLM

from patching.matched_scale import MatchedScales, SetScale

NUM_KILLS = 20
NUM_STOPS = 6
WAIT_SECONDS = 60
"""In which a rank has to notice that the other is gone."""

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_pair_and_tasks(folder)
    # Factors far from 1, so that the weights show whether they were used.
    scale = SetScale(frozenset({1}), {0: 1.3, 2: 0.7}, {0: 1.3, 2: 0.7}, 0.2, 0.1, 0.01)
    scales = MatchedScales.of([scale], {"text": "text.jsonl"}).to_dict()
    (folder / "order.json").write_text(json.dumps({"order": [1, 0], "scales": scales}))
    Command(*commands(folder, folder / "results")["sweep"], folder / "log").finish()
    return folder


@pytest.fixture
def work(tmp_path, request) -> Path:
    random.seed(request.node.name)
    return tmp_path


def pair(given: Path) -> list[str]:
    return [
        *("--teacher_model_name_or_path", str(given / "teacher")),
        *("--student_model_name_or_path", str(given / "student")),
    ]


def training(given: Path, folder: Path, *more: object) -> list[object]:
    settings = {
        "teacher_model_name_or_path": given / "teacher", "dataset": given / "text.jsonl",
        "max_length": 32, "max_steps": 24, "save_steps": 2, "eval_steps": 12, "bf16": False,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "disable_tqdm": True, "save_directory": folder, "resume_from_checkpoint": "last",
    }  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", value)] + [*more]


def caching(given: Path, folder: Path) -> list[object]:
    settings = {
        "teacher_model_name_or_path": given / "teacher", "dataset": given / "text.jsonl",
        "max_length": 32, "bf16": False, "teacher_cache": folder,
    }  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def commands(given: Path, folder: Path) -> dict[str, tuple[str, list[object]]]:
    """Every command that writes into a folder. `test_models` lists those that write a new model."""
    parents = pair(given)
    text = ["--calibration", given / "text.jsonl", "--dtype", "float32"]
    out = ["--save_directory", folder]
    in_files = ["--max_shard_size", "60KB"]
    teachers = ["--teacher_from", given / "teacher", "--teacher_to", given / "teacher"]
    values = {"tasks": "choice", "include_path": given / "tasks"}
    splice = [*parents, "--num_layers_to_patch", 1, *out, *in_files]
    return {
        "splice": ("patching.patch", splice),
        "splice at matched scale": ("patching.patch", [*splice, "--order", given / "order.json"]),
        "weight delta": (
            "train.weight_delta",
            ["--student", given / "student", *teachers, *out],
        ),
        "training": ("train.train", training(given, folder)),
        "search": ("patching.orders.__main__", [*parents, *text, *out]),
        "sweep": (
            "evaluate.evaluate",
            flags((given / "teacher", given / "student"), folder, **values),
        ),
        "report": ("evaluate.report", [given / "results", *out]),
        "similarity": ("patching.similarity", [*parents, *text, *out]),
        "teacher cache": ("train.cache_teacher", caching(given, folder)),
    }


COMMANDS = [*commands(Path(), Path())]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_finished_or_not_loadable(out: Path, whole: Path) -> None:
    """What a killed command left is either the whole model or none."""
    if (out / "config.json").exists():
        assert same_weights(out, whole)
        AutoModelForCausalLM.from_pretrained(out)
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["splice", "splice at matched scale", "weight delta"])
def test_models(name, given, work):
    def command(folder: Path) -> Command:
        return Command(*commands(given, folder)[name], work / "log")

    whole, out = work / "whole", work / "killed" / "out"
    seconds = command(whole).finish()
    if name.startswith("splice"):
        provenance = json.loads((whole / "provenance.json").read_text())
        assert ("scale" in name) == ("matched_scale" in provenance)
    for _ in command(out).killed_within(seconds, NUM_KILLS):
        check_finished_or_not_loadable(out, whole)
    command(out).finish()
    assert same_weights(out, whole)
    assert os.listdir(out.parent) == ["out"]  # the rerun cleaned up
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))


def test_every_size(given, work):
    """The sizes that were saved are whole, and the rerun goes on with the others."""

    def command(folder: Path) -> Command:
        all_sizes = ["--num_layers_to_patch", "all", "--max_shard_size", "60KB"]
        words = [*pair(given), *all_sizes, "--save_directory", folder]
        return Command("patching.patch", words, work / "log")

    whole, out = work / "whole", work / "out"
    seconds, before = command(whole).finish(), set()
    for _ in command(out).killed_within(seconds, NUM_KILLS):
        saved = {path.parent.name for path in out.glob("*/config.json")}
        assert saved >= before
        assert all(same_weights(out / name, whole / name) for name in saved - before)
        before = saved
        if saved == {*os.listdir(whole)}:
            shutil.rmtree(out)
            before = set()
    command(out).finish()
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    assert all(same_weights(out / name, whole / name) for name in os.listdir(whole))


def test_training(given, work):
    whole, killed = work / "whole", work / "killed"
    command = Command("train.train", training(given, killed), work / "log")
    seconds = Command("train.train", training(given, whole), work / "log").finish()
    steps = [0]
    for _ in command.killed_within(seconds, NUM_KILLS):
        steps.append(newest_step(killed))
        assert steps[-1] >= steps[-2]  # no checkpoint is lost
        if (killed / "config.json").exists():
            assert same_weights(killed, whole)
            shutil.rmtree(killed)
            steps.append(0)
    command.finish()
    assert same_weights(killed, whole)
    assert losses(killed) == losses(whole)


def newest_step(folder: Path) -> int:
    paths = (folder / "checkpoints").glob("checkpoint-*/trainer_state.json")
    return max((json.loads(path.read_text())["global_step"] for path in paths), default=0)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "run.json").read_text())["log"]
    return [line["loss"] for line in log if "loss" in line]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_ranks(command: Command) -> None:
    ranks = ranks_of(command, free_port())
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0, command.log.read_text()[-3000:]


def test_training_on_two_ranks(given, work):
    """Both ranks are killed, as when a node is lost."""
    whole, killed = work / "whole", work / "killed"
    start = time.monotonic()
    two_ranks(Command("train.train", training(given, whole), work / "log"))
    seconds = time.monotonic() - start
    command, steps = Command("train.train", training(given, killed), work / "log"), [0]
    num_kills = 0
    while num_kills < NUM_KILLS:
        ranks = ranks_of(command, free_port())
        time.sleep(random.uniform(0, seconds))
        num_kills += all(rank.is_alive() for rank in ranks)
        for rank in random.sample(ranks, 2):
            rank.kill()
            rank.join()
        steps.append(newest_step(killed))
        assert steps[-1] >= steps[-2]
        if (killed / "config.json").exists():
            assert same_weights(killed, whole)
            shutil.rmtree(killed)
            steps.append(0)
    two_ranks(command)
    assert same_weights(killed, whole)
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_one_of_two_ranks(killed_rank, given, work):
    """The other leaves with a message, and what was saved is good."""
    whole, killed = work / "whole", work / "killed"
    two_ranks(Command("train.train", training(given, whole), work / "log"))
    command = Command("train.train", training(given, killed), work / "killed.log")
    ranks = ranks_of(command, free_port())
    while newest_step(killed) < 4:
        assert all(rank.is_alive() for rank in ranks), command.log.read_text()[-3000:]
    ranks[killed_rank].kill()
    check_leaves(ranks[1 - killed_rank], command.log)
    assert not (killed / "config.json").exists()
    two_ranks(command)
    assert same_weights(killed, whole)


def check_leaves(rank: BaseProcess, log: Path) -> None:
    """A rank whose peer is gone ends soon, and says why."""
    rank.join(WAIT_SECONDS)
    has_left = not rank.is_alive()
    rank.kill()
    assert has_left, log.read_text()[-3000:]
    assert rank.exitcode not in (0, None)
    assert "peer" in log.read_text()[-2000:]


def finished(folder: Path) -> dict[str, Any]:
    """The scores of each model and task that a sweep has stored."""
    found = {}
    for path in folder.glob("*_k*.json"):
        values = json.loads(path.read_text())
        for task in values["tasks"]:
            found[f"{path.stem} {task}"] = values["results"][task]
    return found


def test_sweep(given, work):
    def command(folder: Path) -> Command:
        values = {"tasks": "choice,generation", "include_path": given / "tasks"}
        values |= {"num_layers_to_patch": "all", "baselines": "naive"}
        words = flags((given / "teacher", given / "student"), folder, **values)
        return Command("evaluate.evaluate", words, work / "log")

    whole, killed = work / "whole", work / "killed"
    seconds = command(whole).finish()
    before: dict[str, Any] = {}
    for _ in command(killed).killed_within(seconds, NUM_KILLS):
        now = finished(killed) if killed.is_dir() else {}
        assert {part: now[part] for part in before} == before  # nothing stored is lost
        before = now
        if len(now) == len(finished(whole)):
            shutil.rmtree(killed)
            before = {}
    command(killed).finish()
    assert finished(killed) == finished(whole)
    names = ("summary.md", "summary.csv")
    assert all((killed / name).stat().st_size for name in names)


def test_order_search(given, work):
    def command(folder: Path) -> Command:
        words = [*pair(given), "--calibration", given / "text.jsonl", "--save_directory", folder]
        return Command(
            "patching.orders.__main__", [*words, "--exact", "--dtype", "float32"], work / "log"
        )

    whole, killed = work / "whole", work / "killed"
    seconds = command(whole).finish()
    for _ in command(killed).killed_within(seconds, NUM_KILLS):
        if (killed / "order.json").exists():
            assert found_in(killed) == found_in(whole)
            shutil.rmtree(killed)
    command(killed).finish()
    assert found_in(killed) == found_in(whole)


def found_in(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "order.json").read_text())
    return {name: found[name] for name in ("order", "name", "orders", "best_sets", "settings")}


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_one_of_two_ranks_of_a_sweep(killed_rank, given, work):
    """The other leaves with a message, and what was stored is good."""
    values = {"tasks": "choice,generation", "include_path": given / "tasks"}
    values |= {"num_layers_to_patch": "all", "baselines": "naive"}

    def command(folder: Path, log: str) -> Command:
        words = flags((given / "teacher", given / "student"), folder, **values)
        return Command("evaluate.evaluate", words, work / log)

    whole, killed = work / "whole", work / "killed"
    command(whole, "log").finish()
    ranks = ranks_of(command(killed, "killed.log"), free_port(), TORCHELASTIC_RUN_ID="none")
    while not killed.is_dir() or not finished(killed):
        assert all(rank.is_alive() for rank in ranks), (work / "killed.log").read_text()[-3000:]
    ranks[killed_rank].kill()
    check_leaves(ranks[1 - killed_rank], work / "killed.log")
    stored = finished(killed)
    assert stored == {name: finished(whole)[name] for name in stored}
    command(killed, "log").finish()
    assert finished(killed) == finished(whole)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c(name, given, work):
    """It ends quickly with one line, pressed once or twice, and the rerun works."""

    def command(folder: str, log: str) -> Command:
        return Command(*commands(given, work / folder)[name], work / log)

    seconds = command("whole", "log").finish()
    last_line = (work / "log").read_text().splitlines()[-1].replace("whole", "out")
    for i in range(NUM_STOPS):
        process, is_twice = command("out", f"log {i}").start(), i % 2
        time.sleep(random.uniform(0.1, seconds))  # until the command itself runs
        for _ in range(1 + is_twice):
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
                time.sleep(random.uniform(0, 0.1) * is_twice)
        process.join(WAIT_SECONDS)
        said = (work / f"log {i}").read_text()
        assert process.exitcode in (-signal.SIGINT, 0), said
        assert "Traceback" not in said
        if said.splitlines()[-1:] == [last_line]:
            shutil.rmtree(work / "out")
        else:
            assert is_twice or said.splitlines()[-1].startswith("stopped by Ctrl-C: ")
    command("out", "log").finish()


@pytest.fixture
def small_disk(work) -> Iterator[Path]:
    """A file system of 300 kB, less than any of these commands writes."""
    with mounted(work / "disk", "-o", "size=300k") as folder:
        yield folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name, given, small_disk, work):
    """The command fails and says why, and succeeds when there is room."""
    (small_disk / "filler").write_bytes(bytes(280_000))
    out = small_disk / "out"
    module, words = commands(given, out)[name]
    command = Command(module, words, work / "log")
    process = command.start()
    process.join()
    assert process.exitcode not in (0, None)
    said = (work / "log").read_text().splitlines()[-1]
    assert any(words in said for words in ("No space left", "make room", "could not be written"))
    assert not (out / "config.json").exists()
    assert not (out / "order.json").exists()
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    command.finish()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_to(name, given, small_disk, work):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    module, words = commands(given, small_disk / "out")[name]
    process = Command(module, words, work / "log").start()
    process.join()
    assert process.exitcode == 2
    said = (work / "log").read_text().splitlines()[-1]
    assert "cannot be written to: Read-only file system, choose another folder" in said
