"""How the examples run command lines: a failure is told once, and Ctrl-C ends all of it."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from examples.commands import printed, run, run_here

HEARS_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
"""
SLOW_TO_STOP = f"""{HEARS_CTRL_C}
import time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("cleaned up", flush=True)
"""
PARENT = f"""{HEARS_CTRL_C}
from examples.commands import run
from patching.cli.command_line import run_command

run_command(lambda: run("child"), "the same command goes on")
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "child.py"


@pytest.mark.parametrize(
    ("capability", "words", "added"),
    [
        ("AVX512", ["--k", 9], []),
        ("AVX2", ["--k", 9], ["--bf16", "False"]),
        ("AVX2", ["--bf16", True], []),
    ],
)
def test_commands_compute_in_fp32_where_bf16_is_slow(capability, words, added, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)
    words = [str(word) for word in words]
    assert printed("train.train", words) == [*words, *added]
    assert printed("evaluate.report", words) == words


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("import sys\nprint('error: k=9: choose 0-5', file=sys.stderr)\nsys.exit(2)", 2, None),
        ("raise RuntimeError('no memory')", 1, None),
        (
            "import os\nos.kill(os.getpid(), 9)",
            137,
            "was ended by signal 9 (Killed), as when memory",
        ),
    ],
)
def test_the_example_ends_as_its_command_did(source, code, said, child, capfd):
    child.write_text(source)
    with pytest.raises(SystemExit) as ended:
        run("child", "--k", 9)
    assert ended.value.code == code
    out, err = capfd.readouterr()
    assert out == "\n$ python -m child --k 9\n"
    assert err.count("Traceback") == (code == 1)
    if code != 1:
        assert err.count("\n") == 1 and (said or "error: k=9: choose 0-5") in err


def test_ctrl_c_in_the_command_is_ctrl_c_in_the_example(child):
    child.write_text("import os, signal\nsignal.signal(2, signal.SIG_DFL)\nos.kill(os.getpid(), 2)")
    with pytest.raises(KeyboardInterrupt):
        run("child")


def test_ctrl_c_lets_the_command_clean_up(child):
    child.write_text(SLOW_TO_STOP)
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{child.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline() != "started\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: both processes
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("cleaned up\n", "stopped by Ctrl-C: the same command goes on\n")
    assert process.returncode == -signal.SIGINT


def test_a_command_in_this_process_ends_it_too(child, monkeypatch, capsys):
    child.write_text("import sys\n\ndef main(words):\n    sys.exit(len(words))")
    monkeypatch.syspath_prepend(child.parent)
    with pytest.raises(SystemExit) as ended:
        run_here("child", "--k", 9, "x y")
    assert ended.value.code == 3
    assert capsys.readouterr().out == "\n$ python -m child --k 9 'x y'\n"
