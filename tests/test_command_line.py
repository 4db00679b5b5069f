"""Every command line: quick help and errors, one line for what a user can fix."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from evaluate.arguments import EvaluationArguments
from patching import similarity
from patching.arguments import CalibrationArguments
from patching.cli.command_line import CommandLineParser, HelpFormatter
from patching.orders.__main__ import OrdersArguments
from patching.patch import PatchArguments
from train.data_args import DataArguments
from train.model_args import ModelArguments
from train.weight_delta import WeightDeltaArguments

COMMANDS = (
    "patching.patch",
    "patching.orders",
    "patching.similarity",
    "evaluate.evaluate",
    "evaluate.report",
)
HEAVY = ("torch", "datasets", "lm_eval", "matplotlib", "accelerate")

RUN = """
import json, runpy, sys
heavy, *sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print(json.dumps([ended.code, [name for name in heavy.split() if name in sys.modules]]))
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["--no_such_flag"], 2)])
def test_help_and_wrong_flags_load_nothing_heavy(command, flags, code):
    done = subprocess.run(
        [sys.executable, "-c", RUN, " ".join(HEAVY), command, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []], done.stderr
    if code:
        assert done.stderr.count("\n") == 1 and "--help lists every flag" in done.stderr


@pytest.mark.parametrize(
    "flags", [["--order", "first"], ["--match_scale", "False"], ["--patch_first_k_layers"]]
)
def test_similarity_refuses_flags_about_sizes(flags, tmp_path, capsys):
    words = "--teacher_model_name_or_path t --student_model_name_or_path s --calibration c"
    with pytest.raises(SystemExit) as ended:
        similarity.main([*words.split(), "--save_directory", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{flags[0]} is about sizes" in error


LISTENS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
"""

STOPPED = f"""{LISTENS}
from patching.cli.command_line import run_command

def main():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("cleaned up")
        if AGAIN:
            signal.raise_signal(signal.SIGINT)

run_command(main, "the same command goes on")
"""


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_ends_with_one_line_and_as_a_signal_does(again):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.replace("AGAIN", str(again))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "cleaned up\n"
    assert done.stderr == "stopped by Ctrl-C: the same command goes on\n"


IGNORED = f"""{LISTENS}
import time, weakref
from patching.cli.command_line import run_command

class Model: pass

def main():
    model = Model()
    reference = weakref.ref(model, lambda _: signal.raise_signal(signal.SIGINT))
    del model
    time.sleep(100)
    print("ran on")

run_command(main, "the same command goes on")
"""


def test_ctrl_c_where_python_ignores_exceptions_ends_the_command_too():
    done = subprocess.run(
        [sys.executable, "-c", IGNORED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "stopped by Ctrl-C: the same command goes on\n")


PRINTS = """
import os
from patching.cli.command_line import run_command

def main():
    print("café", flush=FLUSH)
    if OTHER:
        reads, writes = os.pipe()
        os.close(reads)
        os.write(writes, b"x")

run_command(main)
"""


def run_printing(flush: bool = False, other: bool = False, **how) -> subprocess.CompletedProcess:
    program = PRINTS.replace("FLUSH", str(flush)).replace("OTHER", str(other))
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, **how
    )


@pytest.mark.parametrize("flush", [False, True])
def test_a_pipe_that_nobody_reads_ends_a_command_without_a_word(flush):
    reads, writes = os.pipe()
    os.close(reads)
    done = run_printing(flush, stdout=writes)
    os.close(writes)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_another_broken_pipe_keeps_its_traceback():
    done = run_printing(other=True, stdout=subprocess.PIPE)
    assert done.returncode == 1 and done.stdout.startswith("café")
    assert done.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_what_a_terminal_cannot_show_is_spelled_out():
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run_printing(stdout=subprocess.PIPE, env=ascii_only)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9\n", "")


@pytest.mark.parametrize(
    ("flags", "groups"),
    [
        (PatchArguments, ("what to save:", "the family: teacher, student, order:", "the size:")),
        (OrdersArguments, ("the search:", "how models run:", "calibration text:")),
        (EvaluationArguments, ("the sweep:", "tasks:", "prompts:", "how lm-eval runs:")),
        (WeightDeltaArguments, ("the students and their teachers:",)),
        ((ModelArguments, DataArguments, CalibrationArguments), ("the text:", "calibration text:")),
    ],
)
def test_help_has_groups_and_says_every_default(flags, groups):
    parser = CommandLineParser(flags)
    lines = parser.format_help().splitlines()
    assert {*groups} <= {*lines}
    start = lines.index("options:")
    assert lines[start + 2] == "" and lines[start + 1].split()[0] == "-h,"
    for action in parser._actions[1:]:
        text = HelpFormatter("prog")._get_help_string(action)
        assert any(words in text for words in ("default", "(required)", "the same as --")), text
