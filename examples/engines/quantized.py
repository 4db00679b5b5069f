"""What 4 bits cost each size: KL in llama.cpp, from the same size in fp32 and from the teacher.

The family is the demo's: the shipped teacher and a student distilled from it.
"""

from typing import NamedTuple

from examples.engines.agreement import Predictions, mean_kl
from examples.engines.check import SavedMember, predict, reference, save_members, write_inputs
from examples.engines.engines import ENGINES
from examples.engines.table import markdown
from patching.cli.units import bytes_text

PAIR = "demo"
KINDS = {"f16": (), "q8_0": ("--quantize", "q8_0"), "q4_0": ("--quantize", "q4_0")}
"""Runner options by the name of the file. Rows of the demo's weights are too short for llama.cpp's
K-quants.
"""


class Quantized(NamedTuple):
    """One size in one number type. KL divergences are means over positions, in nats."""

    num_bytes: int
    from_itself: float
    from_teacher: float


def measure_sizes(num_rows: int) -> dict[SavedMember, dict[str, Quantized]]:
    """Measure every size of the demo's family in every number type."""
    members = save_members(PAIR, all_sizes=True)
    tokens, prompts = write_inputs(members, num_rows)
    ours = {member: reference(member, tokens, prompts).logits_RTV for member in members}
    teacher_RTV = ours[members[-1]]
    found = {member: {} for member in members}
    for kind, options in KINDS.items():
        predictions = predict(ENGINES["llama_cpp_f16"], members, tokens, prompts, options)
        for member, theirs in zip(members, predictions):
            assert isinstance(theirs, Predictions), theirs
            found[member][kind] = Quantized(
                (member.folder / f"{kind}.gguf").stat().st_size,
                mean_kl(ours[member], theirs.logits_RTV),
                mean_kl(teacher_RTV, theirs.logits_RTV),
            )
    return found


def quantized_table(found: dict[SavedMember, dict[str, Quantized]]) -> str:
    """One row per size. KLs are in thousandths of a nat."""
    header = ["k", "layers"]
    header += [f"{kind.upper()}: size, KL, KL from the teacher" for kind in KINDS]
    rows = []
    for member, of_kinds in found.items():
        cells = [
            f"{bytes_text(size.num_bytes)}, {1000 * size.from_itself:.2f}, "
            f"{1000 * size.from_teacher:.2f}"
            for size in of_kinds.values()
        ]
        rows.append([str(member.num_layers_to_patch), str(member.depth), *cells])
    return markdown(header, rows)
