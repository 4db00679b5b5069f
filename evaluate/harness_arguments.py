"""The flags of lm-evaluation-harness, by its names. Declaring them imports neither torch nor
lm-eval.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patching.files.json_files import load_json

KEYS_AND_VALUES = "key=value, several separated by commas or spaces, or a JSON object"


@dataclass
class TaskArguments:
    """Flags that name tasks and their documents."""

    _argument_group_name = "tasks"

    tasks: str | None = field(
        default=None,
        metadata={
            "help": "lm-eval tasks, groups and tags, patterns such as arc_*, and task files, "
            "separated by commas or spaces (by default the paper's suite, or none with --dataset)",
            "nargs": "+",
        },
    )
    include_path: str | None = field(
        default=None, metadata={"help": "folder with your own task files"}
    )
    metadata: list[str] | None = field(
        default=None,
        metadata={"help": f"for tasks that need it, such as RULER: {KEYS_AND_VALUES}"},
    )
    limit: float | None = field(
        default=None, metadata={"help": "documents per task; below 1, the share of each task"}
    )
    samples: str | None = field(
        default=None,
        metadata={
            "help": "documents to evaluate by task, as JSON or a file with it: "
            "'{\"arc_easy\": [0, 3, 6]}'"
        },
    )
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "run tasks that execute code which a model has written"}
    )

    def check_tasks(self) -> list[str]:
        """Problems with these flags, one line each. Joins tasks that are separated by spaces."""
        if isinstance(self.tasks, list):
            self.tasks = ",".join(self.tasks)
        problems = []
        if self.limit is not None and not 0 < self.limit < math.inf:
            problems.append(f"limit={self.limit}: choose a number above 0")
        if self.limit is not None and self.samples is not None:
            problems.append("--limit and --samples both choose documents: give one of them")
        try:
            _ = self.documents
        except (ValueError, OSError) as error:
            problems.append(str(error))
        return problems

    @property
    def documents(self) -> dict[str, list[int]] | None:
        """The documents of `--samples` by task. Raises ValueError or OSError for unusable ones."""
        if self.samples is None:
            return None
        text = self.samples
        if not text.lstrip().startswith("{"):
            if not Path(text).is_file():
                raise ValueError(f"samples={text}: there is no such file; write JSON or name one")
            text = None
        try:
            found = json.loads(text) if text else load_json(Path(self.samples))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"samples={self.samples}: this is not JSON ({error})") from error
        if not isinstance(found, dict) or not all(
            isinstance(of, list) and all(isinstance(i, int) and i >= 0 for i in of) and of
            for of in found.values()
        ):
            raise ValueError(f"samples={self.samples}: write a list of numbers for each task")
        return found


@dataclass
class PromptArguments:
    """Flags that say how prompts are built."""

    _argument_group_name = "prompts"

    num_fewshot: int | None = field(
        default=None,
        metadata={"help": "examples in the prompt (by default each task's own number)"},
    )
    apply_chat_template: str | None = field(
        default=None,
        metadata={
            "help": "apply the tokenizer's chat template to prompts",
            "nargs": "?",
            "const": "true",
        },
    )
    system_instruction: str | None = field(
        default=None, metadata={"help": "text to put before each prompt, or in its system turn"}
    )
    fewshot_as_multiturn: str | None = field(
        default=None,
        metadata={
            "help": "give each example as a turn of the conversation; true or false (by default "
            "true with --apply_chat_template)",
            "nargs": "?",
            "const": "true",
        },
    )
    cache_requests: str | None = field(
        default=None,
        metadata={
            "help": "keep prompts for further runs; refresh builds them again, delete forgets them",
            "nargs": "?",
            "const": "true",
            "choices": ["true", "refresh", "delete"],
        },
    )
    write_out: bool = field(default=False, metadata={"help": "show the first prompt of each task"})

    def check_prompts(self) -> list[str]:
        """Problems with these flags, one line each."""
        problems = []
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"num_fewshot={self.num_fewshot}: choose 0 or more")
        if self.fewshot_as_multiturn not in (None, "true", "false"):
            problems.append(f"fewshot_as_multiturn={self.fewshot_as_multiturn}: true or false")
        if self.fewshot_as_multiturn == "true" and self.apply_chat_template is None:
            problems.append("--fewshot_as_multiturn needs --apply_chat_template")
        return problems

    @property
    def prompting(self) -> dict[str, Any]:
        """How prompts are built, as arguments of lm-eval's `evaluate`."""
        chat = self.apply_chat_template
        chat = {None: False, "true": True}.get(chat, chat)
        multiturn = self.fewshot_as_multiturn
        return {
            "apply_chat_template": chat,
            "fewshot_as_multiturn": bool(chat) if multiturn is None else multiturn == "true",
            "system_instruction": self.system_instruction,
        }


@dataclass
class HarnessArguments(TaskArguments, PromptArguments):
    """Flags that lm-eval has too."""

    _argument_group_name = "how lm-eval runs"

    gen_kwargs: list[str] | None = field(
        default=None,
        metadata={"help": f"changes of each task's generation arguments: {KEYS_AND_VALUES}"},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "most tokens that a model reads at once (by default its own limit)"},
    )
    eval_batch_size: str = field(
        default="4",
        metadata={
            "help": "rows per forward pass; auto for as many as fit, auto:N to try for more",
            "aliases": ["--batch_size"],
        },
    )
    max_batch_size: int | None = field(
        default=None, metadata={"help": "most rows per forward pass with --batch_size auto"}
    )
    seed: str = field(
        default="0,1234,1234,1234",
        metadata={
            "help": "seeds of Python, NumPy, torch and the choice of examples in prompts: one for "
            "all or four, separated by commas, None to leave one out"
        },
    )
    bootstrap_iters: int = field(
        default=100_000,
        metadata={"help": "draws for the standard errors of some metrics; 0 for no standard error"},
    )
    log_samples: bool = field(
        default=False, metadata={"help": "also write each document with its answers and scores"}
    )
    predict_only: bool = field(
        default=False, metadata={"help": "write the answers without computing metrics"}
    )
    wandb_args: list[str] | None = field(
        default=None,
        metadata={"help": f"log each model to Weights & Biases; wandb.init's {KEYS_AND_VALUES}"},
    )
    trackio_args: list[str] | None = field(
        default=None,
        metadata={"help": f"log each model to Trackio; trackio.init's {KEYS_AND_VALUES}"},
    )

    def check_harness(self) -> list[str]:
        """Problems with these flags, one line each. Sets those that lm-eval derives from others."""
        self.log_samples = self.log_samples or self.predict_only
        problems = self.check_tasks() + self.check_prompts()
        problems += [
            f"{name}={value}: choose {least} or more"
            for name, value, least in (
                ("max_length", self.max_length, 2),
                ("max_batch_size", self.max_batch_size, 1),
                ("bootstrap_iters", self.bootstrap_iters, 0),
            )
            if value is not None and value < least
        ]
        size, _, times = self.eval_batch_size.partition(":")
        if not (_is_count(size) and not times) and not (size == "auto" and _is_count(times or "1")):
            problems.append(
                f"eval_batch_size={self.eval_batch_size}: choose 1 or more, or auto, or auto:N"
            )
        for name in ("wandb", "trackio"):
            if getattr(self, f"{name}_args") is not None and not importlib.util.find_spec(name):
                problems.append(f"--{name}_args needs {name}, which is not installed")
        try:
            _ = self.seeds
            for name in ("gen_kwargs", "metadata", "wandb_args", "trackio_args"):
                self.values_of(name)
        except ValueError as error:
            problems.append(str(error))
        return problems

    def values_of(self, name: str) -> dict[str, Any]:
        """A flag of keys and values as a dictionary, read as lm-eval reads it.

        Raises ValueError for anything else.
        """
        given = getattr(self, name)
        if not given:
            return {}
        from lm_eval._cli.utils import key_val_to_dict  # half a second

        text = " ".join(given)
        try:
            if text.lstrip().startswith("{"):
                return json.loads(text)
            return {key: value for part in given for key, value in key_val_to_dict(part).items()}
        except ValueError as error:
            raise ValueError(f"{name}={text}: write {KEYS_AND_VALUES} ({error})") from error

    @property
    def seeds(self) -> list[int | None]:
        """Four seeds, as lm-eval reads them. Raises ValueError for another number of them."""
        parts = [part.strip().lower() for part in self.seed.split(",")]
        try:
            values = [None if part == "none" else int(part) for part in parts]
        except ValueError:
            values = []
        if len(values) == 3:
            values.append(1234)  # lm-eval's default for the choice of examples
        if len(values) not in (1, 4) or not all(0 <= v < 2**32 for v in values if v is not None):
            raise ValueError(
                f"seed={self.seed}: choose one number or four, such as 0,None,8,52, each at most "
                f"{2**32 - 1:,}"
            )
        return values * (4 // len(values))

    @property
    def batch_size(self) -> int | str:
        size = self.eval_batch_size
        return int(size) if size.isdecimal() else size


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
