"""Answers of one model by vLLM: the model is saved, run in a process of its own by lm-eval's vLLM
model, and deleted. The process knows nothing of the family, and gives its memory back as it ends.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patching.checkpoints.saved_config import saved_config
from patching.files.outputs import write_json

ROOT = str(Path(__file__).parents[1])
EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b")


def vllm_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Instance],
    options: Mapping[str, Any],
    python: str | None = None,
) -> list[str]:
    """A model's answer to each request. `options` are arguments of lm-eval's vLLM model, and
    `python` runs it, by default this one.

    Raises RuntimeError with what its output says last if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-member-") as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        # vLLM may come with a transformers that reads older spellings only.
        config = saved_config(None, model.config, type(model), model.dtype)
        write_json(folder / "model" / "config.json", config)
        tokenizer.save_pretrained(folder / "model")
        dtype = str(model.dtype).removeprefix("torch.")
        questions = {
            "model": {"pretrained": str(folder / "model"), "dtype": dtype} | dict(options),
            "requests": [request.args for request in requests],
        }
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        done = subprocess.run(
            [
                *(python or sys.executable, "-m", "evaluate.vllm_process"),
                *(folder / "questions.json", folder / "answers"),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([ROOT] if python else sys.path)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"vLLM failed: {reason_in(done.stderr)}")
        return json.loads((folder / "answers").read_text(encoding="utf-8"))


def reason_in(output: str) -> str:
    """Return the last exception that a program printed, or its last line if there is none. A
    progress bar may be drawn once more after an exception.
    """
    lines = output.strip().splitlines() or ["it wrote nothing"]
    return ([line for line in lines if EXCEPTION.match(line)] or lines)[-1]
