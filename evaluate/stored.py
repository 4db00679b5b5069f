"""What a sweep keeps in its folder: one JSON file a model, which grows task by task.

A file is whole at any time. A sweep that was killed goes on with what its files lack; files that
were made under settings that change numbers are never mixed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, sanitize_list

from patching.files.outputs import write_json, write_text

SCORES = (
    "results",
    "groups",
    "group_subtasks",
    "higher_is_better",
    "n-shot",
    "n-samples",
    "versions",
    "configs",
)
"""Of what lm-eval finds, each a dictionary by task."""


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The stored models of a sweep by name. Raises ValueError for a damaged file."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): remove it") from error
        if isinstance(values, dict) and "series" in values and "results" in values:
            found[path.stem] = values
    return found


def write_result(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)


def merge(result: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A stored model with lm-eval's findings on further tasks."""
    found = json.loads(json.dumps(found, default=handle_non_serializable))
    scores = {
        key: {**result.get(key, {}), **found[key]} for key in SCORES if found.get(key) is not None
    }
    return {**result, **scores}


def write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """One line a sample, one file a task, as lm-eval's own `--log_samples` writes them."""
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


def check_settings(
    folder: Path,
    stored: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    shared: Iterable[str],
) -> None:
    """Raise ValueError where stored numbers were made under other settings than those of now.

    `settings` are by series; of a series that is not evaluated now, those named in `shared` count.
    """
    now = json.loads(json.dumps(settings, default=str))
    any_series = next(iter(now.values()))
    for name, result in stored.items():
        before = result.get("settings")
        if before is None:
            raise ValueError(
                f"{folder / name}.json does not say under which settings it was made: choose "
                "another --save_directory"
            )
        wanted = now.get(result["series"]) or {key: any_series[key] for key in shared}
        for key in wanted.keys() & before.keys():
            if before[key] != wanted[key]:
                raise ValueError(
                    f"{folder / name}.json was made with {key}={before[key]} and {wanted[key]} is "
                    "asked for now: choose another --save_directory, or the same settings"
                )
