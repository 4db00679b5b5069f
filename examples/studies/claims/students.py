"""The students of the study and the sweeps over them, as command lines of `train.train` and
`evaluate.evaluate`. What is finished is not done again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.commands import run_here
from examples.stdlib.corpus import is_held_out, iter_modules, write_corpus
from examples.stdlib.demo import distillation, evaluation
from examples.stdlib.tasks import write_tasks

TASKS = ("stdlib_bits_per_byte", "stdlib_next_line")
OWN = {"own_8": "0,2,4,6,8-11", "own_10": "0,2,4-11", "own_11": "0,2-11"}
"""The kept layers of students that are as deep as a size of the family, k = 1, 3 and 4: those of
the teacher naively pruned to that size, as the family's student has those of size 0.
"""

NO_COSINE = ("--use_cosine_loss", "false")
NO_KL = ("--use_kl_loss", "false")
NO_CROSS_ENTROPY = ("--use_cross_entropy", "false")
STUDENTS: dict[str, tuple[str, ...]] = {
    "all_terms": (),
    "ce": (*NO_KL, *NO_COSINE),
    "ce_kl": NO_COSINE,
    "cosine": (*NO_CROSS_ENTROPY, *NO_KL),
    "random": ("--random_initialization",),
    **{f"every_{n}": ("--alternate_every_n_layers", str(n)) for n in (3, 4, 5)},
    **{name: ("--kept_layers", layers) for name, layers in OWN.items()},
}
"""Each student's flags, besides those of the demo."""


SWEEPS = (
    *("all_terms", "first", "klpatch", "random", "ce", "ce_kl", "cosine"),
    *("every_3", "every_4", "every_5", "own"),
)
"""Each sweep is over the family of the student of its name, or else of the one with all terms."""


def students_of(sweep: str) -> tuple[str, ...]:
    """The students that a sweep needs. The family is the first one's."""
    if sweep == "own":
        return ("all_terms", *OWN)
    return (sweep if sweep in STUDENTS else "all_terms",)


def training(folder: Path, name: str, seed: int, flags_of_all: Sequence[str]) -> list[object]:
    """The module and arguments that distill a student."""
    flags = (*STUDENTS[name], *flags_of_all, "--seed", seed)
    return distillation(folder, f"seed_{seed}/{name}", *flags)


def sweep_flags(sweep: str, of_seed: Path, with_baselines: bool) -> Iterator[object]:
    """The flags of a sweep, besides those of the demo. Baselines are the same for all seeds."""
    calibration = ("--calibration", of_seed.parent / "corpus" / "train.jsonl")
    yield from ("--tasks", ",".join(TASKS))
    if sweep == "all_terms" and with_baselines:
        yield from ("--baselines", "naive,block_influence,laco", *calibration)
    elif sweep == "first":
        yield from ("--order", "first")
    elif sweep == "klpatch":
        yield from ("--order", "klpatch", *calibration)
    elif sweep == "own":
        yield from ("--num_layers_to_patch", 0)
        for name in OWN:
            yield from ("--compare", of_seed / name)


def write_texts(folder: Path) -> None:
    """Write the demo's text and tasks, unless they are there. Little text is held out in training,
    because the sweeps measure the students.
    """
    if not (folder / "tasks" / f"{TASKS[-1]}.yaml").is_file():
        write_corpus(folder / "corpus")
        held_out = folder / "corpus" / "heldout.jsonl"
        held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:2]))
        held_out = (module for module in iter_modules() if is_held_out(module.name))
        write_tasks(held_out, folder / "tasks")


def make(
    folder: Path,
    seeds: Sequence[int],
    sweeps: Sequence[str] = SWEEPS,
    flags_of_all: Sequence[str] = (),
    num_documents: int | None = None,
) -> None:
    """Distill and evaluate what is missing in `folder`, sweep by sweep.

    `flags_of_all` go to `train.train` for every student. The first seed's sweeps have the
    baselines. Of each task, `num_documents` are evaluated, by default all.
    """
    write_texts(folder)
    limit = () if num_documents is None else ("--limit", num_documents)
    for sweep in sweeps:
        for seed in seeds:
            of_seed = folder / f"seed_{seed}"
            if not missing_sweeps(folder, [seed], [sweep]):
                continue
            student, *_ = names = students_of(sweep)
            for name in names:
                if not (of_seed / name / "config.json").is_file():
                    run_here(*training(folder, name, seed, flags_of_all))
            flags = sweep_flags(sweep, of_seed, with_baselines=seed == seeds[0])
            out = f"{of_seed.name}/results/{sweep}"
            run_here(*evaluation(folder, of_seed / student, out, *flags, *limit))


def missing_sweeps(
    folder: Path, seeds: Sequence[int], sweeps: Sequence[str] = SWEEPS
) -> list[Path]:
    """The folders of sweeps that have no report, which is written last."""
    folders = (folder / f"seed_{seed}" / "results" / sweep for seed in seeds for sweep in sweeps)
    return [path for path in folders if not (path / "summary.json").is_file()]
