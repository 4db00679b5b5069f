"""Write a teacher's predictions on a text to disk, for training without the teacher.

    python -m train.cache_teacher --teacher_model_name_or_path TEACHER --dataset TEXT \\
        --teacher_cache DIR
    python -m train.train --teacher_model_name_or_path TEACHER --dataset TEXT \\
        --teacher_cache DIR --use_cosine_loss False --save_directory STUDENT

For each token, DIR gets the --top_k most probable next tokens and the probability of all others
together. The KL term is then between these top_k + 1 events, which is at most the whole one. Use
the same flags for text, --max_length, --packing, --seed, --temperature and, for a stream,
--shuffle_buffer in both commands. A command that was stopped continues when it runs again. A masked
language model hides other tokens at every step, so its predictions cannot be kept.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from patching.cli.command_line import CommandLineParser, check_one_process, run_command, user_errors
from patching.files.outputs import check_writable
from train.data_args import DataArguments


@dataclass
class CacheArguments:
    _argument_group_name = "the teacher and its predictions"

    teacher_model_name_or_path: str = field(
        metadata={"help": "the teacher: a folder or a hub repository"}
    )
    teacher_cache: Path = field(metadata={"help": "folder for the predictions"})
    revision: str | None = field(
        default=None,
        metadata={"help": "the teacher's branch, tag or commit (default: main)"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run modeling code that comes with the teacher"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention: sdpa, varlen, flash_attention_2, eager, ..."}
    )
    top_k: int = field(default=64, metadata={"help": "tokens to keep per prediction"})
    temperature: float = field(
        default=1.0, metadata={"help": "temperature of the KL term", "aliases": ["--T"]}
    )
    batch_size: int = field(default=8, metadata={"help": "rows that the teacher reads at once"})
    bf16: bool = field(default=True, metadata={"help": "compute in bf16, as training does"})
    seed: int = field(default=0, metadata={"help": "seed of the split into documents held out"})
    max_rows: int | None = field(
        default=None, metadata={"help": "stop after so many rows (default: all of the text)"}
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: choose 1 or more"
            for name in ("top_k", "batch_size", "max_rows")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not 0 < self.temperature < math.inf:
            problems.append(f"temperature={self.temperature}: choose a number above 0")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed={self.seed}: choose 0 or more, at most {2**32 - 1:,}")
        if problems:
            raise ValueError("; ".join(problems))


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        check_one_process()
        groups = (CacheArguments, DataArguments)
        parser = CommandLineParser(groups, prog="train.cache_teacher", description=__doc__)
        arguments, data_args = parser.parse_args_into_dataclasses(argv)
        check_writable(arguments.teacher_cache)

    # Imported here, so that --help and wrong flags do not wait for the models.
    from train.run_cache import run

    run(arguments, data_args)


if __name__ == "__main__":
    run_command(main, "the same command goes on from the rows it has written")
