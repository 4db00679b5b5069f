"""The flags of `evaluate.evaluate`. Nothing here imports torch, transformers' models or lm-eval."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from evaluate.baselines import BASELINES
from evaluate.harness_arguments import KEYS_AND_VALUES, HarnessArguments
from evaluate.shards import Shard
from patching.arguments import DTYPES, CalibrationArguments, MeasuringArguments
from patching.files.outputs import num_ranks

PAPER_SUITE = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "race",
    "mmlu",
    "rte",
    "wikitext",
    "gsm8k_cot",
    "ifeval",
    "hendrycks_math",
)
"""The suite of arXiv 2510.05064: classification, perplexity and generation."""
FIND_VLLM = (
    "import importlib.util, sys\n"
    "sys.exit(not all(map(importlib.util.find_spec, ('vllm', 'lm_eval'))))"
)
"""A program that fails where the process of `evaluate.vllm` cannot run."""


@dataclass
class TextArguments:
    """Flags that name text to evaluate on."""

    _argument_group_name = "plain text to evaluate on"

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "text to measure the (pseudo-)perplexity on: a .txt, .jsonl or .parquet file, "
            "a folder of such files, or a hub dataset. In .txt files blank lines separate documents"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub dataset"}
    )
    dataset_split: str = field(default="test", metadata={"help": "split of a hub dataset"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})

    @property
    def text_name(self) -> str | None:
        """The name of the text in results."""
        if self.dataset is None:
            return None
        return "_".join(filter(None, (Path(self.dataset).stem, self.dataset_config)))

    def read_texts(self, limit: float | None) -> list[str]:
        """The documents these flags name, without empty ones.

        A `limit` of 1 or more is their number. One below 1 is a share, which lm-eval takes itself.
        Raises ValueError or OSError if there are none.
        """
        from patching.files.texts import load_documents

        documents = load_documents(
            self.dataset,
            text_column=self.text_column,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
        )
        with_text = (d["text"].strip() for d in documents if d["text"] and d["text"].strip())
        texts = list(islice(with_text, int(limit) if limit is not None and limit >= 1 else None))
        if not texts:
            raise ValueError(f"dataset={self.dataset}: there is no text in it")
        return texts


@dataclass
class GenerationArguments:
    """Flags that say what generates."""

    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "prompts in a batch of generation (by default as many as fit)"},
    )
    generation_backend: str = field(
        default="transformers",
        metadata={
            "help": "what generates; vllm runs each member from a temporary folder",
            "choices": ["transformers", "vllm"],
        },
    )
    vllm_args: list[str] | None = field(
        default=None,
        metadata={
            "help": "arguments of lm-eval's vLLM model, such as gpu_memory_utilization=0.5: "
            f"{KEYS_AND_VALUES}"
        },
    )
    vllm_python: str | None = field(
        default=None,
        metadata={
            "help": "Python of an environment that has vllm and lm_eval (by default this one): "
            "vllm may need other versions of transformers and torch"
        },
    )

    def check_generation(self) -> list[str]:
        """Problems with these flags, one line each."""
        problems = []
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            problems.append(f"generation_batch_size={self.generation_batch_size}: choose 1 or more")
        if self.generation_backend == "vllm":
            problems += self._check_vllm()
        elif given := [name for name in ("vllm_args", "vllm_python") if getattr(self, name)]:
            flags = " and ".join(f"--{name}" for name in given)
            problems.append(f"{flags} without effect: add --generation_backend vllm")
        return problems

    def _check_vllm(self) -> list[str]:
        needed = "--generation_backend vllm needs vllm"
        if self.vllm_python is None:
            if importlib.util.find_spec("vllm"):
                return []
            return [
                f"{needed}, which is not installed: install it, or name the Python of an "
                "environment that has it with --vllm_python"
            ]
        try:
            found = subprocess.run([self.vllm_python, "-c", FIND_VLLM], capture_output=True)
        except OSError as error:
            return [f"vllm_python={self.vllm_python}: {error.strerror}: name a Python"]
        if found.returncode:
            return [f"{needed} and lm_eval: vllm_python={self.vllm_python} does not have both"]
        return []


@dataclass
class EvaluationArguments(
    TextArguments, GenerationArguments, HarnessArguments, CalibrationArguments, MeasuringArguments
):
    """Flags of `evaluate.evaluate`. Raises ValueError naming every flag with an unusable value."""

    _argument_group_name = "the sweep"

    save_directory: Path = field(kw_only=True, metadata={"help": "folder for results"})
    num_layers_to_patch: str = field(
        default="all", metadata={"help": "sizes to evaluate: 4, or 1,3,5, or 0-5, or all"}
    )
    baselines: str | None = field(
        default=None,
        metadata={
            "help": "baselines to evaluate at each size, separated by commas: "
            + ", ".join(f"{name} ({row.description})" for name, row in BASELINES.items())
        },
    )
    random_student: str | None = field(
        default=None,
        metadata={
            "help": "a second student of the same teacher, such as one distilled from random "
            "weights, whose family is evaluated too"
        },
    )
    random_student_revision: str | None = field(
        default=None,
        metadata={"help": "that student's branch, tag or commit (default: main)"},
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "another model, or a folder of models, to evaluate alongside the family; "
            "MODEL@REVISION for a branch, tag or commit; repeatable",
            "action": "extend",
        },
    )
    shard: str | None = field(
        default=None,
        metadata={
            "help": "the part of the sweep to run, i/n with i from 1 to n, in a folder of its own; "
            "evaluate.report puts the folders together"
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "auto spreads the models over all devices of one process, for models larger "
            "than a device"
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention of transformers, such as sdpa or eager"}
    )
    dtype: str = field(
        default="bfloat16", metadata={"help": "dtype of the weights", "choices": DTYPES}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        reasons = [BASELINES[n].needs_text for n in self.baseline_names if n in BASELINES]
        if self.searches_order:
            reasons.append(f"--order {self.order} is measured on text")
        problems = self.check_calibration(next(filter(None, reasons), None))
        problems += self.check_harness() + self.check_generation()
        if self.device_map is not None and (self.device is not None or num_ranks() > 1):
            problems.append(
                "--device_map places models itself: leave out --device, and start a single process"
            )
        if self.shard is not None:
            try:
                Shard.parse(self.shard)
            except ValueError as error:
                problems.append(str(error))
        if set(self.baseline_names) - set(BASELINES):
            problems.append(f"baselines={self.baselines}: choose from {', '.join(BASELINES)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def baseline_names(self) -> list[str]:
        return split_names(self.baselines or "")

    @property
    def task_names(self) -> list[str]:
        if self.tasks is None:
            return [] if self.dataset else list(PAPER_SUITE)
        return split_names(self.tasks)


def split_names(text: str) -> list[str]:
    """Names separated by commas, without repetition."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
