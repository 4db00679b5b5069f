"""Our `evaluate` and Hugging Face's under one name, whichever way the latter is asked for first."""

import subprocess
import sys

import pytest
from conftest import ROOT


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
def test_both_packages_are_there(code):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport evaluate; import evaluate.tasks; print(evaluate.__file__)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "evaluate" / "__init__.py")


def test_what_neither_has_is_an_attribute_error():
    import evaluate

    with pytest.raises(AttributeError, match="no_such_thing"):
        evaluate.no_such_thing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import evaluate.no_such_module
