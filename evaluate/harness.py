"""One model on one task, run by lm-eval, and the samples it can write."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate, get_sample_size
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable, sanitize_list

from evaluate.seeds import DEFAULT_SEEDS, Seeds
from evaluate.sources import sources_of
from patching.files.outputs import write_text


@dataclass(frozen=True)
class Harness:
    """lm-eval's settings for all tasks."""

    num_fewshot: int | None = None
    limit: float | None = None
    log_samples: bool = False
    seeds: Seeds = DEFAULT_SEEDS

    def prepare(self, loaded: TaskDict) -> None:
        """Set seeds and configs as `lm_eval.simple_evaluate` does before it builds prompts."""
        self.seeds.set()
        for task in loaded["tasks"].values():
            own_num_fewshot = task.get_config("num_fewshot")
            if own_num_fewshot is None or (own_num_fewshot != 0 and self.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            task.set_fewshot_seed(seed=self.seeds.fewshot)

    def sources(self, loaded: TaskDict) -> dict[str, str]:
        """Hashes of what tasks ask, see `evaluate.sources`."""
        self.prepare(loaded)
        for task in loaded["tasks"].values():
            limit = get_sample_size(task, self.limit)
            task.build_all_requests(limit=limit, fewshot_as_multiturn=True)
        return sources_of(loaded)

    def score(self, lm: LM, loaded: TaskDict) -> dict[str, Any]:
        """What lm-eval finds on some tasks and their groups, with samples.

        Seeds and settings are those of `lm_eval.simple_evaluate`. Calling that would take seconds
        more each time, because it asks pip what is installed.
        """
        self.prepare(loaded)
        limit = self.limit
        found = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            log_samples=True,  # scores of single documents are always kept
            fewshot_as_multiturn=True,
        )
        for values in found["results"].values() if found else ():
            # A metric that is itself a standard error has none.
            for key in [key for key in values if "_stderr_stderr," in key]:
                del values[key]
        return found


def as_json(found: Any) -> Any:
    """lm-eval's findings as plain JSON values."""
    return json.loads(json.dumps(found, default=handle_non_serializable))


def write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write one file per task with one line per sample, as lm-eval's own `--log_samples` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, of_task in samples.items():
        lines = []
        for sample in of_task:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
                for i, values in enumerate(sample["arguments"])
            }
            plain = sample | {
                "arguments": arguments,
                "resps": sanitize_list(sample["resps"]),
                "filtered_resps": sanitize_list(sample["filtered_resps"]),
                "target": str(sample["target"]),
            }
            lines.append(json.dumps(plain, default=handle_non_serializable, ensure_ascii=False))
        write_text(folder / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines))
