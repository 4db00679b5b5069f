"""Results and samples of models for Weights & Biases and Trackio, logged by lm-eval's own loggers.
Each model is a run of its own, named after it.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.loggers import TrackioLogger, WandbLogger

from evaluate.harness_arguments import HarnessArguments

logger = logging.getLogger(__name__)


def log_results(
    name: str, found: Mapping[str, Any], samples: Mapping[str, Path], arguments: HarnessArguments
) -> None:
    """Log what lm-eval found for a model wherever that is asked for, with its samples if there is a
    file for every task. Logging that fails is an error message, since the scores are stored.
    """
    loggers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "wandb": WandbLogger,
        "trackio": TrackioLogger,
    }
    for tracker, make in loggers.items():
        if getattr(arguments, f"{tracker}_args") is None:
            continue
        try:
            log = make({"name": name} | arguments.values_of(f"{tracker}_args"))
            try:
                log.post_init(dict(found))
                log.log_eval_result()
                if samples.keys() == found["configs"].keys():
                    log.log_eval_samples(
                        {
                            task: samples_in(path, found["configs"][task]["output_type"])
                            for task, path in samples.items()
                        }
                    )
            finally:
                (log.run if tracker == "wandb" else log).finish()
        except Exception:  # a service may be out of reach
            logger.error("%s: logging to %s failed", name, tracker, exc_info=True)


def samples_in(path: Path, output_type: str) -> list[dict[str, Any]]:
    """The samples in a file as lm-eval had them in memory. Its files have numbers as texts."""
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for sample in samples:
        sample["arguments"] = [[*of_one.values()] for of_one in sample["arguments"].values()]
        if output_type != "generate_until":
            for key in ("resps", "filtered_resps"):
                sample[key] = _as_numbers(sample[key])
    return samples


def _as_numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_as_numbers, value)]
    return value == "True" if value in ("True", "False") else float(value)
