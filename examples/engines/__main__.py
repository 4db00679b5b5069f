"""Check that saved members compute the same in other people's software.

    python -m examples.engines
    python -m examples.engines --architectures llama,gpt2 --engines mlx_lm
    python -m examples.engines --chat smollm2_output

Members of small trained pairs are saved, three sizes for each architecture, and run in every engine
on token ids of held-out text. Environments, pairs and outcomes are kept in `.engines` and made only
once. With --chat, sizes of a real model answer chat prompts in llama.cpp. The tables of
`docs/engines.md` are written with --write. The exit status is 1 if an engine that must agree does
not.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from examples.engines.agreement import Reference
from examples.engines.chat import chat, chat_failures, chat_tables, open_family
from examples.engines.check import (
    NUM_ROWS,
    ROW_TOKENS,
    Outcome,
    SavedMember,
    compare,
    predict,
    reference,
    save_members,
    write_inputs,
)
from examples.engines.engines import ENGINES, LIMITS
from examples.engines.environments import FOLDER, ROOT, Unavailable
from examples.engines.pairs import PAIRS
from examples.engines.quantized import measure_sizes, quantized_table
from examples.engines.records import Record
from examples.engines.table import engines_table, reasons
from patching.cli.command_line import run_command, user_errors

PAGE = ROOT / "docs" / "engines.md"


def main() -> None:
    arguments = parse_args()
    try:
        if arguments.chat is not None:
            tables, problems = chat_in_llama_cpp(arguments.chat)
        else:
            tables, problems = compare_engines(arguments)
    except Unavailable as error:
        sys.exit(str(error))
    print("\n\n".join(tables.values()))
    if arguments.write:
        write_tables(PAGE, tables)
    if problems:
        sys.exit("\n".join(problems))


def chat_in_llama_cpp(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Let sizes of a chat model answer, and return their tables and what differs."""
    with user_errors():
        family = open_family(folder)
    chats = chat(family)
    return {"chat": chat_tables(chats)}, chat_failures(chats)


def compare_engines(arguments: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Run all members in all engines, and return the tables and what is wrong."""
    members, outcomes, unavailable = {}, {name: {} for name in arguments.engines}, {}
    for architecture in arguments.architectures:
        members[architecture] = save_members(architecture)
        run = Comparison(members[architecture], arguments.rows)
        for name in arguments.engines:
            if name in unavailable:
                continue
            try:
                found = run.outcomes(name)
            except Unavailable as error:
                unavailable[name] = str(error)
                continue
            outcomes[name][architecture] = found
            for member, result in zip(members[architecture], found):
                print(line(name, member, result), flush=True)
    for name in unavailable:
        del outcomes[name]
    tables = {
        "engines": engines_table(members, outcomes, unavailable),
        "reasons": reasons(members, outcomes),
    }
    if arguments.quantize:
        tables["quantized"] = quantized_table(measure_sizes(arguments.rows))
    return tables, failures(members, outcomes, unavailable)


class Comparison:
    """The comparison of engines with us on the members of one architecture."""

    def __init__(self, members: Sequence[SavedMember], num_rows: int) -> None:
        self._members = members
        self._inputs = write_inputs(members, num_rows)

    @cached_property
    def _ours(self) -> list[Reference]:
        return [reference(member, *self._inputs) for member in self._members]

    def outcomes(self, name: str) -> list[Outcome]:
        """Return what an earlier run found with this engine, or run it.

        Raises Unavailable if its environment cannot be made here.
        """
        engine = ENGINES[name]
        record = Record(name, engine, self._members, self._inputs)
        found = record.read()
        if found is None:
            theirs = predict(engine, self._members, *self._inputs)
            found = [compare(*both) for both in zip(self._ours, theirs)]
            record.write(found)
        return found


def parse_args() -> argparse.Namespace:
    def names(text: str, allowed: Mapping) -> list[str]:
        chosen = text.split(",")
        if unknown := sorted(set(chosen) - allowed.keys()):
            raise argparse.ArgumentTypeError(f"{unknown[0]}: choose from {', '.join(allowed)}")
        return chosen

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures", type=lambda text: names(text, PAIRS), default=[*PAIRS], metavar="A,B"
    )
    parser.add_argument(
        "--engines", type=lambda text: names(text, ENGINES), default=[*ENGINES], metavar="A,B"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=NUM_ROWS,
        help=f"rows of {ROW_TOKENS} tokens to compare each member on (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize", action="store_true", help="also measure every size with llama.cpp's quantizer"
    )
    parser.add_argument(
        "--chat",
        type=Path,
        metavar="DIR",
        help="instead, let sizes of SmolLM2 answer chat prompts in llama.cpp; DIR is the folder of "
        "examples.smollm2",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"write the tables to {PAGE.relative_to(ROOT)}"
    )
    return parser.parse_args()


def line(name: str, member: SavedMember, outcome: Outcome) -> str:
    """One member in one engine, as a line of JSON."""
    found = outcome.agreement._asdict() if outcome.agreement else {"refusal": outcome.refusal}
    described = {
        "engine": name,
        "architecture": member.architecture,
        "num_layers_to_patch": member.num_layers_to_patch,
        "tied": member.tied,
    }
    return json.dumps(described | found)


def failures(
    members: Mapping[str, Sequence[SavedMember]],
    outcomes: Mapping[str, Mapping[str, Sequence[Outcome]]],
    unavailable: Mapping[str, str],
) -> list[str]:
    """What must agree and does not, and limits that are no longer there."""
    problems = [
        f"{ENGINES[name].title}: {reason}"
        for name, reason in unavailable.items()
        if ENGINES[name].must_pass
    ]
    for name, of_architectures in outcomes.items():
        for architecture, of_sizes in of_architectures.items():
            limit = LIMITS.get((name, architecture))
            for member, outcome in zip(members[architecture], of_sizes):
                agrees = outcome.agreement is not None and outcome.agreement.is_enough
                limited = limit is not None and not (limit.untied_only and member.tied)
                if limited and agrees:
                    problems.append(f"no longer a limit: {line(name, member, outcome)}")
                elif ENGINES[name].must_pass and not agrees and not limited:
                    problems.append(f"does not agree: {line(name, member, outcome)}")
    return problems


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Replace what stands between the markers of each table in a page."""
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(
            pattern,
            lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}",
            text,
            flags=re.S,
        )
        assert count == 1, f"{page} has no place for {name}"
    page.write_text(text)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    run_command(main, "the same command goes on")
