"""This toolkit's `evaluate` and Hugging Face's under one name, whichever is imported first."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MAX_ADDRESS_SPACE_BYTES = 8 * 2**30
"""Far more than these imports need; it keeps a runaway import from taking all memory."""


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh process in the repository; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_AS, (MAX_ADDRESS_SPACE_BYTES, MAX_ADDRESS_SPACE_BYTES)
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import evaluate; evaluate.load, evaluate.Metric, evaluate.__version__",
        "from evaluate import load, combine",
        "import evaluate.loading; evaluate.load",
        "from evaluate.utils.file_utils import is_relative_path; import evaluate; evaluate.Metric",
        "import evaluate.evaluate; import evaluate.report; import evaluate; evaluate.load",
        "from evaluate.module import Metric; import evaluate; assert evaluate.Metric is Metric",
    ],
)
def test_both_packages_can_be_imported(code):
    printed = run_python(
        f"{code}\nimport evaluate; import evaluate.tasks; print(evaluate.__file__)"
    )
    assert printed == str(ROOT / "evaluate" / "__init__.py")


@pytest.mark.slow
def test_a_second_clone_on_the_path_is_not_taken_for_hugging_faces_package(tmp_path):
    shutil.copytree(ROOT / "evaluate", tmp_path / "evaluate")
    printed = run_python(
        "import evaluate.loading; print(evaluate.loading.__file__, evaluate.__file__)",
        PYTHONPATH=str(tmp_path),
    )
    loading, own = printed.split()
    assert own == str(ROOT / "evaluate" / "__init__.py")
    assert "site-packages" in loading


def test_a_missing_name_is_an_attribute_error():
    import evaluate

    with pytest.raises(AttributeError, match="no_such_thing"):
        evaluate.no_such_thing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import evaluate.no_such_module
