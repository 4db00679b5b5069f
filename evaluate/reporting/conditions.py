"""The conditions under which scores were measured: documents, examples in prompts, limit, versions.
Scores of one task can only be compared where these are the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from evaluate.reporting.scores import leaves_of
from evaluate.result import Result

Conditions = Mapping[str, str]
NOT_KNOWN = "not known"
HASHES = ("task config", "prompts", "documents")
ASKED_FOR = "asked for with"
"""The tasks that the hashes are of. Those of a group are not those of one of its tasks."""
PACKAGES = ("lm_eval", "transformers", "torch")


def conditions_of(result: Result, task: str) -> Conditions:
    """By name, what one score was measured with, in words or hashes."""
    finished, settings = result.finished(task), result.settings_of(task)
    sources = finished.sources if finished and finished.sources else {}
    run = result.run_of(task)
    environment = run.environment if run else {}
    limit, seeds = settings.get("limit", NOT_KNOWN), settings.get("seed", NOT_KNOWN)
    return {
        ASKED_FOR: ",".join(finished.contains) if finished else NOT_KNOWN,
        "number of documents": documents_text(result, task),
        "few-shot": few_shot_text(result, task),
        "task version": version_text(result, task),
        **{name: sources.get(name, NOT_KNOWN) for name in HASHES},
        "limit": "none" if limit is None else f"{limit:g}" if limit != NOT_KNOWN else limit,
        "seed": seeds if isinstance(seeds, str) else ",".join(map(str, seeds)),
        "dtype": settings.get("dtype", NOT_KNOWN),
        **{name: str(sources.get(name) or environment.get(name) or NOT_KNOWN) for name in PACKAGES},
    }


def documents_text(result: Result, task: str) -> str:
    """Documents that were used, and of how many if not all: `100 of 2,376`."""
    found = [result.n_samples.get(leaf) for leaf in leaves_of(result, task)]
    if None in found:
        return NOT_KNOWN
    used, there = (sum(of_task[key] for of_task in found) for key in ("effective", "original"))
    return f"{used:,}" if used == there else f"{used:,} of {there:,}"


def few_shot_text(result: Result, task: str) -> str:
    """The number of examples in prompts, `0-5` if the tasks of a group differ."""
    names = [task] if task in result.n_shot else leaves_of(result, task)
    found = sorted({result.n_shot[name] for name in names if name in result.n_shot})
    return "-".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else NOT_KNOWN


def version_text(result: Result, task: str) -> str:
    """A task's version, `1.0-2.0` if the tasks of a group differ."""
    names = [task] if task in result.versions else leaves_of(result, task)
    found = sorted({str(result.versions[n]) for n in names if result.versions.get(n) is not None})
    return "-".join(dict.fromkeys((found[0], found[-1]))) if found else NOT_KNOWN


def usual(of_models: Sequence[Conditions]) -> Conditions:
    """The most frequent conditions of a task: the first of them if several are, and those that are
    known if any are.
    """
    known = [of_model for of_model in of_models if NOT_KNOWN not in of_model.values()]
    counts = Counter(tuple(conditions.items()) for conditions in known or of_models)
    ((found, _),) = counts.most_common(1)
    return dict(found)


def differences(conditions: Conditions, of_others: Conditions) -> str:
    """What differs from others as far as both are known, in words. Hashes are named without their
    values.
    """
    skipped = {ASKED_FOR}
    if conditions[ASKED_FOR] != of_others[ASKED_FOR]:
        skipped |= {*HASHES}
    parts = []
    for name in conditions.keys() - skipped:
        other, here = of_others[name], conditions[name]
        if here != other and NOT_KNOWN not in (here, other):
            parts.append(f"other {name}" if name in HASHES else f"{name} {here}, not {other}")
    return ", ".join(sorted(parts))
