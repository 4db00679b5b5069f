"""CPU time of the harness's own work, prompts and metrics, for all sizes of a family whose answers
are there already.

    python -m benchmarks.harness

A stand-in answers at once, so nothing but lm-eval's work is left. It is compared with lm-eval doing
that work for one model after another.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from benchmarks.sweep import hush, write_random_pairs_tasks
from evaluate.harness import Harness
from evaluate.tasks import load_tasks


class Answered(LM):
    """Has an answer to everything."""

    tokenizer_name = ""

    def loglikelihood(self, requests: Sequence[Instance], **_) -> list[tuple[float, bool]]:
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_) -> list[float]:
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests: Sequence[Instance], **_) -> list[str]:
        return [request.args[0][-20:] for request in requests]


def cpu_seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(settings: argparse.Namespace) -> None:
    lm, harness, names = Answered(), Harness(), ["rolling", "choice", "generation"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tasks"
        write_random_pairs_tasks(folder, settings.num_documents, settings.num_documents)
        loaded = load_tasks(names, str(folder)).by_name

        def theirs(task: str) -> None:
            loaded[task]["tasks"][task].set_config("num_fewshot", 0)
            for _ in range(settings.num_members):
                evaluate(lm, loaded[task], log_samples=True)

        def own(task: str) -> None:
            harness.sources(loaded[task])
            for _ in range(settings.num_members):
                harness.score(lm, loaded[task])

        # All of lm-eval's first: ours changes how it compiles templates.
        before = {task: cpu_seconds(lambda task=task: theirs(task)) for task in names}
        for task in names:
            now = cpu_seconds(lambda task=task: own(task))
            print(
                f"{task}, {settings.num_documents} documents, {settings.num_members} members: "
                f"{now:.1f} s of CPU time, lm-eval for one after another {before[task]:.1f} s, "
                f"{before[task] / now:.1f} x less",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_documents", type=int, default=200)
    parser.add_argument("--num_members", type=int, default=18)
    hush()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    main(parser.parse_args())
