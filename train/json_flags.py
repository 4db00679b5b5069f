"""Flags whose value is a JSON object: whether it can be read, and whether its settings act."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.training_args import DistillationArguments

SWITCH = (True, False, "true", "false")
CHECKPOINTING_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
CHECKPOINTING: dict[str, tuple] = {
    "every_n_layers": (),
    "offload": SWITCH,
    "use_reentrant": SWITCH,
    "preserve_rng_state": SWITCH,
    "determinism_check": ("default", "none"),
    "debug": SWITCH,
    "early_stop": SWITCH,
}
"""Settings of activation checkpointing, and their values: a number of layers if there are none."""
NOT_REENTRANT = ("determinism_check", "debug", "early_stop")


def json_problems(args: DistillationArguments) -> list[str]:
    """Return problems with the flags that are JSON objects, given as text or as dicts."""
    problems = []
    for name in ("accelerator_config", *CHECKPOINTING_KWARGS, "lr_scheduler_kwargs"):
        value = getattr(args, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                problems.append(f"{name}={value} is not JSON: {error}")
                continue
        if isinstance(value, dict):
            problems += [f"{name}: {problem}" for problem in setting_problems(name, value)]
        elif isinstance(value, (str, int, float, list)):  # not a config that is complete already
            problems.append(f"{name}={value}: not a JSON object of settings")
    return problems


def setting_problems(flag: str, values: dict[str, Any]) -> list[str]:
    """Return what is wrong with the settings of a flag. Those of a schedule depend on it, and
    `check_installed` tries them.
    """
    if flag == "accelerator_config":
        return accelerator_problems(values)
    return checkpointing_problems(values) if flag in CHECKPOINTING_KWARGS else []


def accelerator_problems(values: dict[str, Any]) -> list[str]:
    inner = values.get("gradient_accumulation_kwargs")
    problems = [
        f"{name} is not available: rows are shared among ranks so that their number changes no "
        "result"
        for name in sorted(values.keys() - {"gradient_accumulation_kwargs"})
    ]
    if not isinstance(inner, dict | None):
        return [*problems, f"gradient_accumulation_kwargs={inner}: not a JSON object of settings"]
    problems += [
        f"{name} is not available in gradient_accumulation_kwargs, choose sync_each_batch; steps "
        "are those of --gradient_accumulation_steps"
        for name in sorted((inner or {}).keys() - {"sync_each_batch"})
    ]
    sync_each_batch = (inner or {}).get("sync_each_batch", True)
    if sync_each_batch not in SWITCH:
        problems.append(f"sync_each_batch={sync_each_batch}: choose true or false")
    return problems


def checkpointing_problems(values: dict[str, Any]) -> list[str]:
    problems = []
    for name, value in values.items():
        if name not in CHECKPOINTING:
            problems.append(f"{name} is not a setting here, choose from {', '.join(CHECKPOINTING)}")
        elif name == "every_n_layers":
            if not isinstance(value, int) or value < 1:
                problems.append(f"every_n_layers={value}: choose 1 or more")
        elif value not in (allowed := CHECKPOINTING[name]):
            problems.append(f"{name}={value}: choose {' or '.join(map(str, allowed[-2:]))}")
        elif name in NOT_REENTRANT and values.get("use_reentrant") not in (False, "false"):
            problems.append(f'{name} only applies with "use_reentrant": false')
    return problems
