"""Answer requests by lm-eval's vLLM model.

    python -m evaluate.vllm_process QUESTIONS ANSWERS

QUESTIONS is a JSON file with the arguments of the model and of each request, ANSWERS becomes one
with a text for each. The environment needs vLLM and lm-eval and nothing that this toolkit uses, so
this file imports nothing of it.
"""

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.vllm_causallms import VLLM


def main(questions_file: str, answers_file: str) -> None:
    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    lm = VLLM(**questions["model"])
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=tuple(arguments), idx=i)
        for i, arguments in enumerate(questions["requests"])
    ]
    Path(answers_file).write_text(json.dumps(lm.generate_until(requests)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
