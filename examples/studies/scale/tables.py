"""What is found about the pairs, as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from examples.studies.orders import markdown

Found = Mapping[str, Any]
"""What `findings_of` says about one pair."""
LABELS = {
    "plain": "as is",
    "one": "one factor",
    "matched": "matched scale",
    "rotated": "rotated",
    "rotated and matched": "rotated and matched",
}
OTHER_STUDENTS = {"student_length": "length term", "student_auto": "layers chosen"}
LEAST_GAIN = 0.08
"""How much lower the mean KL of the sizes in between is to be, as a share."""


def with_error(gain: Found, digits: int = 4) -> str:
    return f"{gain['mean']:.{digits}f} ± {gain['error']:.{digits}f}"


def holds(flags: Iterable[bool]) -> str:
    flags = [*flags]
    return f"yes ({len(flags)} of {len(flags)})" if all(flags) else f"{sum(flags)} of {len(flags)}"


def orders_of(pairs: Sequence[Found]) -> Iterable[tuple[Found, str, Found]]:
    for found in pairs:
        for order, of_order in found["orders"].items():
            yield found, order, of_order


def hypotheses_table(pairs: Sequence[Found]) -> str:
    rows = []
    for found, order, of_order in orders_of(pairs):
        plain = mean(of_order["mean"]["plain"])
        gain = of_order["mean_gain"]["matched"]
        share, error = gain["mean"] / plain, gain["error"] / plain
        gains = [of_size["gain"]["matched"] for of_size in of_order["sizes"]]
        worse = [g["mean"] < -g["error"] for g in gains]
        dip = of_order["dip"]["kl"]
        rows.append(
            [
                *(found["pair"], order),
                f"{share:.1%} ± {error:.1%}",
                "yes" if share >= LEAST_GAIN else "no",
                "yes" if not any(worse) else f"no ({sum(worse)} of {len(worse)} worse)",
                dip_verdict(dip),
            ]
        )
    header = ["pair", "order", "mean KL lower by", "8 % or more", "no size worse", "first dip"]
    return markdown(header, rows, num_words=6)


def dip_verdict(dip: Found) -> str:
    """What becomes of the step from the student to k = 1."""
    before, after = dip["plain"], dip["matched"]
    if before["mean"] <= before["error"]:
        return "none as is"
    if after["mean"] <= 0:
        return "gone"
    return "halved" if after["mean"] <= before["mean"] / 2 else "not halved"


def dips_table(pairs: Sequence[Found]) -> str:
    rows = [
        [
            *(found["pair"], order),
            *(
                with_error(of_order["dip"][score][name])
                for score in ("kl", "cross_entropy")
                for name in ("plain", "matched")
            ),
        ]
        for found, order, of_order in orders_of(pairs)
    ]
    header = ["pair", "order", "KL, as is", "KL, matched", "bits, as is", "bits, matched"]
    return markdown(header, rows, num_words=2)


def sizes_table(pairs: Sequence[Found]) -> str:
    """KL of each size, and what the factors of its own gain."""
    rows = []
    for found, order, of_order in orders_of(pairs):
        for of_size in of_order["sizes"]:
            gain = of_size["gain"]["matched"]
            factors = " / ".join(
                " ".join(f"{factor:.2f}" for factor in of_seed.values()) or "1"
                for of_seed in of_size["factors"]
            )
            known = of_size["kl"]
            kl = (f"{mean(known[name]):.4f}" if name in known else "" for name in LABELS)
            better = holds(value > 0 for value in gain["by_seed"])
            k = of_size["num_layers_to_patch"]
            rows.append([found["pair"], order, str(k), *kl, with_error(gain), better, factors])
    header = ["pair", "order", "k", *LABELS.values(), "gain of matching", "seeds", "factors"]
    return markdown(header, rows, num_words=2)


def treatments_table(pairs: Sequence[Found]) -> str:
    """How much lower the mean KL of the sizes in between is with each treatment."""
    rows = []
    for found, order, of_order in orders_of(pairs):
        plain = mean(of_order["mean"]["plain"])
        gains = [of_order["mean_gain"].get(name) for name in LABELS if name != "plain"]
        shares = (
            f"{gain['mean'] / plain:.1%} ± {gain['error'] / plain:.1%}" if gain else ""
            for gain in gains
        )
        rows.append([found["pair"], order, f"{plain:.4f}", *shares])
    names = [label for name, label in LABELS.items() if name != "plain"]
    return markdown(["pair", "order", "as is", *names], rows, num_words=2)


def shares_table(pairs: Sequence[Found]) -> str:
    """How much lower KL is where the stream has the length or the direction that it should have."""
    rows = []
    for found, order, of_order in orders_of(pairs):
        for of_size in of_order["sizes"]:
            if "length" not in of_size["gain"]:
                continue
            plain = mean(of_size["kl"]["plain"])
            cells = (
                f"{mean(of_size['kl'][name]):.4f} ({of_size['gain'][name]['mean'] / plain:.0%})"
                for name in ("matched", "length", "direction")
            )
            k = of_size["num_layers_to_patch"]
            rows.append([found["pair"], order, str(k), f"{plain:.4f}", *cells])
    header = ["pair", "order", "k", "as is", "matched scale", "each token's length", "direction"]
    return markdown(header, rows, num_words=2)


def baselines_table(pairs: Sequence[Found]) -> str:
    """Bits per byte by number of layers, the pruned teacher's own factors included."""
    parts = []
    for found in pairs:
        ends = [f"{mean(found[end]['cross_entropy']):.4f}" for end in ("student", "teacher")]
        rows = []
        for order, of_order in found["orders"].items():
            for name in ("plain", "matched"):
                sizes = (
                    f"{mean(of_size['bits_per_byte'][name]):.4f}" for of_size in of_order["sizes"]
                )
                rows.append([f"{order}, {LABELS[name]}", ends[0], *sizes, ends[1]])
        for baseline, of_name in found["baselines"].items():
            for name in ("plain", "matched"):
                bits = (f"{value:.4f}" for value in of_name[name])
                rows.append([f"{baseline}, {LABELS[name]}", *bits, ""])
        header = [found["pair"], *map(str, found["layers"])]
        parts.append(markdown(header, rows, num_words=1))
    return "\n\n".join(parts)


def leads_table(pairs: Sequence[Found]) -> str:
    """At how many sizes the family takes fewer bits, both rescaled or both as they are."""
    rows = []
    for found, order, _ in orders_of(pairs):
        cells = []
        for of_name in found["baselines"].values():
            for name in ("plain", "matched"):
                leads = of_name["lead"][order][name]
                ahead = holds(lead["mean"] > 0 for lead in leads)
                behind = [
                    str(found["layers"][k])
                    for k, lead in enumerate(leads)
                    if lead["mean"] < -lead["error"]
                ]
                cells.append(ahead + (f", behind at {', '.join(behind)}" if behind else ""))
        under = (
            holds(
                of_size["under_line"][name]["mean"] >= 0
                for of_size in found["orders"][order]["sizes"]
            )
            for name in ("plain", "matched")
        )
        rows.append([found["pair"], order, *cells, *under])
    header = ["pair", "order"]
    header += [
        f"{name}, {how}" for name in ("naive", "block influence") for how in ("as is", "matched")
    ]
    header += ["under the line, as is", "matched"]
    return markdown(header, rows, num_words=len(header))


def others_table(pairs: Sequence[Found]) -> str:
    """Mean KL of the sizes in between, for the other students next to the plain one."""
    rows = []
    for found in pairs:
        for student, of_other in found["others"].items():
            first = [found["pair"], OTHER_STUDENTS[student]]
            ends = [mean(of["kl"]) for of in (found["student"], of_other["student"])]
            rows.append([*first, "k = 0", f"{ends[0]:.4f}", "", f"{ends[1]:.4f}", "", "", ""])
            for order, of_order in of_other["orders"].items():
                means = (
                    f"{mean(of[name]):.4f}"
                    for of in (found["orders"][order]["mean"], of_order["mean"])
                    for name in ("plain", "matched")
                )
                gains = (of_order["gain_as_is"], of_order["gain_over_matched"]["matched"])
                rows.append([*first, order, *means, *map(with_error, gains)])
    header = ["pair", "student", "order", "plain, as is", "plain, matched", "this one, as is"]
    header += ["this one, matched", "gain as is", "gain, both matched"]
    return markdown(header, rows, num_words=3)


def regret_table(pairs: Sequence[Found]) -> str:
    """Mean KL of each order of the first seed, and how far it is above that of the best order."""
    rows = []
    for found in pairs:
        plain, matched = (found.get("regret", {}).get(name) for name in ("plain", "matched"))
        if plain is None:
            continue
        for order, matched_mean in matched["mean"].items():
            cells = ["", ""]
            if order in plain["mean"]:
                mean_kl = plain["mean"][order]
                cells = [f"{mean_kl:.4f}", f"{mean_kl - plain['best_mean']:.4f}"]
            regret = matched_mean - matched["best_mean"]
            rows.append([found["pair"], order, *cells, f"{matched_mean:.4f}", f"{regret:.4f}"])
        for label, of in (("best as is", plain), ("best matched", matched)):
            best = f"{of['best_mean']:.4f}"
            cells = [best, "0", "", ""] if of is plain else ["", "", best, "0"]
            layers = ",".join(map(str, of["best_order"]))
            rows.append([found["pair"], f"{label}: {layers}", *cells])
    header = ["pair", "order", "as is", "regret", "matched", "regret"]
    return markdown(header, rows, num_words=2)


def best_table(pairs: Sequence[Found]) -> str:
    """The best order of each seed, and the size that is farthest under the straight line."""
    rows = []
    for found in pairs:
        cells = []
        for name in ("plain", "matched"):
            means = {order: of["mean"][name] for order, of in found["orders"].items()}
            best = [
                min(means, key=lambda order, i=i: means[order][i])
                for i in range(len(found["seeds"]))
            ]
            cells.append(" ".join(best))
            sizes = [
                (of_size["under_line"][name]["mean"], order, of_size)
                for order, of in found["orders"].items()
                for of_size in of["sizes"]
            ]
            _, order, size = max(sizes, key=lambda each: each[0])
            k = size["num_layers_to_patch"]
            under = with_error(size["under_line"][name])
            cells.append(f"{order}, k = {k} ({found['layers'][k]} layers), {under} bits")
        rows.append([found["pair"], cells[0], cells[2], cells[1], cells[3]])
    header = ["pair", "best order of each seed, as is", "matched"]
    header += ["farthest under the line, as is", "matched"]
    return markdown(header, rows, num_words=len(header))


TABLES = {
    "Hypotheses": hypotheses_table,
    "First step": dips_table,
    "Sizes": sizes_table,
    "Treatments": treatments_table,
    "Length and direction": shares_table,
    "Bits per byte": baselines_table,
    "Leads": leads_table,
    "Best": best_table,
    "Regret": regret_table,
    "Other students": others_table,
}


def tables_of(pairs: Sequence[Found]) -> dict[str, str]:
    """Return the tables by title. Those of regret and of other students may not be measured yet."""
    has_rows = {
        regret_table: any("regret" in found for found in pairs),
        others_table: any(found["others"] for found in pairs),
    }
    return {title: table(pairs) for title, table in TABLES.items() if has_rows.get(table, True)}


def all_tables(pairs: Sequence[Found]) -> str:
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables_of(pairs).items())
