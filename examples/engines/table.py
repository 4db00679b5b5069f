"""The tables of `docs/engines.md`."""

from collections.abc import Mapping, Sequence

from examples.engines.agreement import Agreement
from examples.engines.check import Outcome, SavedMember
from examples.engines.engines import ENGINES, LIMITS

Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""By engine, then architecture: an outcome for each size."""


def engines_table(
    members: Mapping[str, Sequence[SavedMember]],
    outcomes: Outcomes,
    unavailable: Mapping[str, str],
) -> str:
    """One row per engine, one column per architecture. A cell holds the lowest agreement of the
    sizes that the engine takes, and how many it takes if it does not take all: it does not take
    what it rejects, nor what it is known to run as another model.
    """
    header = ["engine", *members, "positions", "near-ties", "greedy tokens"]
    rows = []
    for name, engine in ENGINES.items():
        if name in unavailable:
            rows.append([engine.title, unavailable[name], *[""] * (len(header) - 2)])
            continue
        if name not in outcomes:
            continue
        taken = {
            architecture: [
                outcome.agreement
                for member, outcome in zip(of_sizes, outcomes[name][architecture])
                if outcome.agreement and not is_limited(name, member, outcome)
            ]
            for architecture, of_sizes in members.items()
        }
        agreements = [agreement for of_sizes in taken.values() for agreement in of_sizes]
        rows.append(
            [
                engine.title,
                *(
                    cell(taken[architecture], len(of_sizes))
                    for architecture, of_sizes in members.items()
                ),
                f"{sum(agreement.positions for agreement in agreements):,}",
                f"{sum(agreement.near_ties for agreement in agreements):,}",
                f"{sum(agreement.greedy_tokens for agreement in agreements):,}",
            ]
        )
    return markdown(header, rows)


def is_limited(engine: str, member: SavedMember, outcome: Outcome) -> bool:
    """Return whether an outcome is a difference that the engine is known to make."""
    limit = LIMITS.get((engine, member.architecture))
    if limit is None or (limit.untied_only and member.tied):
        return False
    return outcome.agreement is None or not outcome.agreement.is_enough


def cell(taken: Sequence[Agreement], num_sizes: int) -> str:
    if not taken:
        return "not taken"
    text = f"{min(agreement.top1 for agreement in taken):.2%}"
    if any(agreement.greedy_differences for agreement in taken):
        text += ", greedy text differs"
    if len(taken) < num_sizes:
        text += f" ({len(taken)} of {num_sizes} sizes)"
    return text


def reasons(members: Mapping[str, Sequence[SavedMember]], outcomes: Outcomes) -> str:
    """A list of what was not taken or does not agree, with the engine's own words and ours."""
    lines = []
    for name, of_architectures in outcomes.items():
        for architecture, of_sizes in of_architectures.items():
            for member, outcome in zip(members[architecture], of_sizes):
                if outcome.agreement and outcome.agreement.is_enough:
                    continue
                said = outcome.refusal or f"agreement {outcome.agreement.top1:.2%}"
                limited = is_limited(name, member, outcome)
                why = f" {LIMITS[name, architecture].reason}" if limited else ""
                lines.append(
                    f"- {ENGINES[name].title}, {architecture}, {member.depth} layers, "
                    f"{'tied' if member.tied else 'untied'}: {said}.{why}"
                )
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
