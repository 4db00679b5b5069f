"""Answers of one model by vLLM: the model is saved, run in a process of its own by lm-eval's vLLM
model, and deleted. The process knows nothing of the family, and gives its memory back as it ends.

    python -m evaluate.vllm QUESTIONS ANSWERS

is that process. QUESTIONS is a JSON file with the arguments of lm-eval's model and of each request.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def vllm_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Instance],
    options: Mapping[str, Any],
) -> list[str]:
    """A model's answer to each request. `options` are arguments of lm-eval's vLLM model.

    Raises RuntimeError with the last line of its output if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-member-") as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        dtype = str(model.dtype).removeprefix("torch.")
        questions = {
            "model": {"pretrained": str(folder / "model"), "dtype": dtype} | dict(options),
            "requests": [request.args for request in requests],
        }
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "evaluate.vllm", folder / "questions.json", folder / "answers"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
            raise RuntimeError(f"vLLM failed: {lines[-1]}")
        return json.loads((folder / "answers").read_text(encoding="utf-8"))


def main(questions_file: str, answers_file: str) -> None:
    from lm_eval.models.vllm_causallms import VLLM

    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    lm = VLLM(**questions["model"])
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=tuple(arguments), idx=i)
        for i, arguments in enumerate(questions["requests"])
    ]
    Path(answers_file).write_text(json.dumps(lm.generate_until(requests)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
