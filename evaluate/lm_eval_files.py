"""Results and samples in lm-eval's own files, for its table maker and for what reads its output:

    DIR/lm_eval/MEMBER/results_DATE.json
    DIR/lm_eval/MEMBER/samples_TASK_DATE.jsonl

They are written by lm-eval's `EvaluationTracker`. Each command adds files for the models that it
found scores for, with all of their scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from evaluate.harness import SAMPLES
from evaluate.harness_arguments import HarnessArguments
from evaluate.result import LM_EVAL_KEYS, Result
from evaluate.trackers import log_results

FOLDER = "lm_eval"


def write_files(
    folder: Path, results: Mapping[str, Result], names: Iterable[str], arguments: HarnessArguments
) -> None:
    """Write the results of some models in a sweep's folder, and log them where that is asked for.

    `results` are those in the folder, and `names` the models to write.
    """
    for name in sorted(names):
        found = as_lm_eval_results(name, results[name], arguments)
        tracker = EvaluationTracker(output_path=str(folder / FOLDER))
        tracker.general_config_tracker.log_experiment_args(
            model_source="hf",
            model_args={"pretrained": name},
            system_instruction=arguments.system_instruction,
            chat_template=None,
            fewshot_as_multiturn=arguments.prompting["fewshot_as_multiturn"],
        )
        tracker.save_results_aggregated(dict(found))
        samples = {
            task: path
            for task in found["configs"]
            if (path := folder / SAMPLES / name / f"samples_{task}.jsonl").is_file()
        }
        for task, path in samples.items():
            copied = folder / FOLDER / name / f"samples_{task}_{tracker.date_id}.jsonl"
            shutil.copyfile(path, copied)
        log_results(name, found, samples, arguments)


def as_lm_eval_results(name: str, result: Result, arguments: HarnessArguments) -> dict[str, Any]:
    """A model's scores as `lm_eval.simple_evaluate` returns them."""
    found = {key: getattr(result, field) for field, key in LM_EVAL_KEYS.items()}
    seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    config = {
        "model": "hf",
        "model_args": f"pretrained={name}",
        "batch_size": arguments.eval_batch_size,
        "batch_sizes": [],
        "device": None,
        "use_cache": None,
        "limit": arguments.limit,
        "bootstrap_iters": arguments.bootstrap_iters,
        "gen_kwargs": arguments.values_of("gen_kwargs"),
        "model_num_parameters": result.parameters.stored,
        **dict(zip(seeds, arguments.seeds)),
    }
    groups = {} if found["groups"] else {"groups"}  # lm-eval leaves it out if there are none
    return {key: value for key, value in found.items() if key not in groups} | {"config": config}
