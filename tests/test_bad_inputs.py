"""Every bad input of the table in `tests/bad_inputs.py`, through the real command lines: one line
that says what to do, exit code 2, nothing written, no hang, bounded memory.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bad_inputs import COMMANDS, OF_HUB, TABLE, BadInput
from conftest import ROOT
from limits import bounded
from local_tasks import CHOICE, QUESTIONS, write_task
from patching_models import family_pair, save_models

from evaluate.result import FinishedTask, Parameters, Result, Run
from patching.cli.command_line import LONGEST_MESSAGE


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The folder that `tests/bad_inputs.py` describes."""
    folder = tmp_path_factory.mktemp("original")
    save_models(folder, *family_pair("qwen3"), max_shard_size="60KB")
    texts = ({"text": f"Document {i} is about {' '.join(map(str, range(i)))}."} for i in range(20))
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (folder / "tasks").mkdir()
    write_task(folder / "tasks", "choice", QUESTIONS, **CHOICE)
    (folder / "results").mkdir()
    run = Run({"teacher": "another"}, {"tasks": "choice"}, {})
    result = Result("family", 0, 4, Parameters(10, 20), max_layers_to_patch=2, order="last")
    scores = {"choice": {"alias": "choice", "acc,none": 0.5, "acc_stderr,none": 0.1}}
    found = {"results": scores, "versions": {"choice": 1.0}}
    result.add_scores({"choice": FinishedTask(1.0, False, {"prompts": "x"})}, run, found)
    (folder / "results/family_k0.json").write_text(json.dumps(result.to_dict()))
    return folder


@pytest.fixture
def folder(original, tmp_path, monkeypatch) -> Path:
    """A copy to damage, and the current folder."""
    copy = shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(copy)
    return copy


def words_of(bad: BadInput) -> list[str]:
    """The command line: the usual flags without those taken out, then the added ones."""
    added = shlex.split(bad.flags)
    left_out = {f"-{word}" for word in added if word[:1] == "-" and word[1:2] not in ("-", "")}
    usual = shlex.split(COMMANDS[bad.command])
    kept = []
    while usual:
        flag, *values = [usual.pop(0)]
        if flag.startswith("--") and "=" not in flag:
            values = [usual.pop(0)]
        if flag.partition("=")[0] not in left_out:
            kept += [flag, *values]
    return [*kept, *(word for word in added if f"-{word}" not in left_out)]


def listing(folder: Path) -> dict[str, tuple]:
    """All that is in a folder, so that any write shows."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        times = () if path.is_dir() else (about.st_mtime_ns,)
        found[str(path.relative_to(folder))] = (about.st_mode, about.st_size, *times)
    return found


def check_message(bad: BadInput, output: str, errors: str) -> None:
    """One line, with the words of the table. Progress may come before it: bars, and the lines that
    say how often the hub was asked.
    """
    assert "Traceback" not in errors + output
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    progress = ("examples [", "%|", "thrown while requesting", "Retrying in ")
    lines = [line for line in lines if not any(part in line for part in progress)]
    assert len(lines) == 1, errors
    assert len(lines[0]) <= LONGEST_MESSAGE + 100
    assert lines[0].startswith(("error: ", f"{bad.command}: error: "))
    for word in bad.words:
        assert word in lines[0]


def named(table: list[BadInput], sample: Collection[BadInput] | None = None) -> list:
    """Parameters for pytest. Those outside a sample are slow."""
    return [
        pytest.param(
            bad,
            id=f"{bad.command}: {bad.name}",
            marks=() if sample is None or bad in sample else pytest.mark.slow,
        )
        for bad in table
    ]


def format_of(bad: BadInput) -> str:
    """The kind of file that is bad, empty for flags."""
    return bad.name.rpartition(": ")[0]


SAMPLE = {(bad.command, format_of(bad)): bad for bad in reversed(TABLE)}.values()
"""The first input of each file format for each command."""


@pytest.mark.parametrize("bad", named(TABLE, SAMPLE))
def test_one_line_and_nothing_written(bad, folder, capsys, monkeypatch):
    if bad.prepare is not None:
        bad.prepare(folder)
    for name, value in bad.environment.items():
        monkeypatch.setenv(name, value)
    main = importlib.import_module(entry_point(bad.command)).main
    before = listing(folder.parent)
    capsys.readouterr()
    with bounded(), pytest.raises(SystemExit) as ended:
        main(words_of(bad))
    captured = capsys.readouterr()
    assert ended.value.code == 2
    check_message(bad, captured.out, captured.err)
    assert listing(folder.parent) == before


def entry_point(command: str) -> str:
    return f"{command}.__main__" if (ROOT / command.replace(".", "/")).is_dir() else command


def test_the_table_covers_every_command_and_format():
    assert len({bad.name for bad in TABLE}) == len(TABLE) >= 100
    of_command = Counter(bad.command for bad in TABLE)
    assert of_command.keys() == COMMANDS.keys()
    assert min(of_command.values()) >= 5
    of_format = Counter(map(format_of, TABLE))
    formats = (
        "config.json", "student_config.json", "order.json", "tokenizer.json", "safetensors",
        "index", "fsdp_config", "checkpoint", "text", "chats", "cache.json", "order_kl.json",
        "task file", "samples", "result", "documents",
    )  # fmt: skip
    assert min(of_format[name] for name in formats) >= 5, of_format


REAL = ("a flag that does not exist", "safetensors: overlap", "a seed beyond 32 bits",
        "result: binary", "task file: code")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bad", named([bad for bad in TABLE if bad.name in REAL]))
def test_the_same_in_a_process_of_its_own(bad, folder):
    if bad.prepare is not None:
        bad.prepare(folder)
    before = listing(folder.parent)
    done = subprocess.run(
        [sys.executable, "-m", bad.command, *words_of(bad)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    check_message(bad, done.stdout, done.stderr)
    assert listing(folder.parent) == before


class StandInHub(BaseHTTPRequestHandler):
    """Answers with the status in the name of the repository, or breaks the line for 0."""

    def answer(self) -> None:
        found = re.search(r"status/([0-9]+)", self.path)
        status = int(found[1]) if found else 401
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *_) -> None:
        pass


IN_ONE_PROCESS = """
import importlib, io, json, sys, time
from contextlib import redirect_stderr, redirect_stdout
waited = []
time.sleep = waited.append  # the hub's client waits before it tries again
results = []
for command, words in json.load(sys.stdin):
    output, code = io.StringIO(), 0
    waited.clear()
    with redirect_stderr(output), redirect_stdout(output):
        try:
            importlib.import_module(command).main(words)
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    results.append((code, output.getvalue(), sum(waited)))
json.dump(results, sys.stdout)
"""
LONGEST_WAIT = 180
"""Seconds in which the hub's client may try again."""


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [True, False])
def test_a_hub_that_refuses_and_one_that_is_not_there(is_there, folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    if is_there:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    before = listing(folder.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_ONE_PROCESS],
        input=json.dumps([(entry_point(bad.command), words_of(bad)) for bad in OF_HUB]),
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        | {"HF_DATASETS_OFFLINE": "0", "HF_HOME": str(folder.parents[1] / "home")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    if is_there:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert listing(folder.parent) == before
    for bad, (code, output, waited) in zip(OF_HUB, json.loads(done.stdout), strict=True):
        assert code == 2, (bad.name, code, output)
        assert waited < LONGEST_WAIT
        words = bad.words if is_there or "upload" not in bad.name else ()
        check_message(bad._replace(words=words), "", output)
