"""Save members, run them in every engine, and compare their predictions with ours.

Shapes: R rows, T positions, V vocabulary, P prompts, N new tokens.
"""

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from examples.engines.agreement import Agreement, Predictions, Reference, agreement, top_two_gap
from examples.engines.engines import RUNNERS, Engine
from examples.engines.environments import FOLDER, converter, python_of, variables_of
from examples.engines.pairs import held_out_rows, pair_folders
from patching.checkpoints.save import plan_save
from patching.family import Family

ROW_TOKENS = 256
NUM_ROWS = 40
"""Together 10,240 positions for each member."""
PROMPT_TOKENS = 32
NUM_PROMPTS = 8
NEW_TOKENS = 48


class SavedMember(NamedTuple):
    architecture: str
    num_layers_to_patch: int
    depth: int
    tied: bool
    folder: Path


class Outcome(NamedTuple):
    """What became of one member in one engine: an agreement, or the reason why there is none."""

    agreement: Agreement | None
    refusal: str | None


def save_members(name: str, all_sizes: bool = False) -> list[SavedMember]:
    """Save members of a pair in fp32: the student, one in the middle and the teacher, or all."""
    teacher, student = pair_folders(name)
    family = Family.from_pretrained(teacher, student, dtype="float32")
    largest = len(family) - 1
    return save_sizes(name, family, range(largest + 1) if all_sizes else (0, largest // 2, largest))


def save_sizes(name: str, family: Family, sizes: Iterable[int]) -> list[SavedMember]:
    """Save some sizes of a family, in place of what was saved under this name."""
    members = []
    for k in sizes:
        folder = FOLDER / "members" / name / f"k{k}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        plan = plan_save(family, family.patched_layers(k), folder)
        plan.save(folder, f"{name} k={k}", {})
        tied = bool(family.config(family.recipe(k)).tie_word_embeddings)
        members.append(SavedMember(name, k, plan.size.depth, tied, folder))
    return members


def write_inputs(members: Sequence[SavedMember], num_rows: int = NUM_ROWS) -> tuple[Path, Path]:
    """Write `tokens.npy` (R, T) and `prompts.npy` (P, T) of held-out text for an architecture."""
    folder = members[0].folder.parent
    tokenizer = AutoTokenizer.from_pretrained(members[0].folder)
    rows_RT = held_out_rows(tokenizer, num_rows, ROW_TOKENS).numpy()
    np.save(folder / "tokens.npy", rows_RT)
    np.save(folder / "prompts.npy", rows_RT[:NUM_PROMPTS, :PROMPT_TOKENS])
    return folder / "tokens.npy", folder / "prompts.npy"


@torch.inference_mode()
def reference(member: SavedMember, tokens: Path, prompts: Path) -> Reference:
    """Compute our predictions in fp32."""
    model = AutoModelForCausalLM.from_pretrained(member.folder, dtype=torch.float32).eval()
    rows_RT = torch.from_numpy(np.load(tokens))
    logits_RTV = torch.cat(
        [model(input_ids=row, use_cache=False).logits for row in rows_RT.split(8)]
    ).numpy()
    steps = [*greedy_steps(model, torch.from_numpy(np.load(prompts)))]
    greedy_logits_PNV = torch.stack(steps, dim=1).numpy()
    return Reference(
        top1_RT=logits_RTV.argmax(-1),
        greedy_PN=greedy_logits_PNV.argmax(-1),
        logits_RTV=logits_RTV,
        gaps_RT=top_two_gap(logits_RTV),
        greedy_gaps_PN=top_two_gap(greedy_logits_PNV),
    )


def greedy_steps(model: torch.nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the logits of each new token, shape (P, V), as text is continued greedily."""
    cache = DynamicCache(config=model.config)
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        yield logits


def predict(
    engine: Engine,
    members: Sequence[SavedMember],
    tokens: Path,
    prompts: Path,
    options: Sequence[str] = (),
) -> Iterator[Predictions | str]:
    """Run members of one pair in a process of the engine's environment. Yield the predictions of
    each, or the reason why there are none.

    Raises Unavailable if that environment cannot be made here.
    """
    python = python_of(engine.environment)
    refusals = convert_to_gguf(members, engine.gguf) if engine.gguf else {}
    outputs = {member: member.folder / "predictions" for member in members}
    for output in outputs.values():
        shutil.rmtree(output, ignore_errors=True)
    command = [
        *(python, RUNNERS / engine.runner, "--tokens", tokens, "--prompts", prompts),
        *("--new_tokens", str(NEW_TOKENS), *engine.options, *options),
        *(f"{member.folder}={outputs[member]}" for member in members if member not in refusals),
    ]
    crash = ""
    if len(refusals) < len(members):
        log = members[0].folder.parent / "engine.log"
        with log.open("w") as file:
            done = subprocess.run(
                command, env=variables_of(engine.environment), stdout=file, stderr=subprocess.STDOUT
            )
        crash = f"exit status {done.returncode}, see {log}"
    for member in members:
        yield refusals.get(member) or read_predictions(outputs[member], crash)
        shutil.rmtree(outputs[member], ignore_errors=True)


def read_predictions(output: Path, crash: str) -> Predictions | str:
    """Read what a runner wrote for one member. `crash` is the answer if it wrote nothing."""
    refusal, greedy, logits = (
        output / name for name in ("refusal.txt", "greedy.npy", "logits.npy")
    )
    if refusal.exists():
        return refusal.read_text().strip()
    if not greedy.exists():
        return crash
    if not logits.exists():
        return Predictions(top1_RT=np.load(output / "top1.npy"), greedy_PN=np.load(greedy))
    logits_RTV = np.load(logits)
    return Predictions(
        top1_RT=logits_RTV.argmax(-1), greedy_PN=np.load(greedy), logits_RTV=logits_RTV
    )


def compare(ours: Reference, theirs: Predictions | str) -> Outcome:
    if isinstance(theirs, str):
        return Outcome(None, theirs)
    return Outcome(agreement(ours, theirs), None)


def convert_to_gguf(members: Sequence[SavedMember], number_type: str) -> dict[SavedMember, str]:
    """Convert members with llama.cpp's converter, to `f32.gguf` or `f16.gguf` next to the weights.

    Return why the converter rejects a member, for those that it rejects.
    """
    targets = {member: member.folder / f"{number_type}.gguf" for member in members}
    missing = [target for target in targets.values() if not target.exists()]
    if not missing:
        return {}
    script, log = RUNNERS / "convert_to_gguf.py", members[0].folder.parent / "conversion.log"
    with log.open("w") as file:
        subprocess.run(
            [python_of("transformers4"), script, converter(), *missing],
            env=variables_of("transformers4"),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return {
        member: f"the converter fails: {_refusal(target) or f'see {log}'}"
        for member, target in targets.items()
        if not target.exists()
    }


def _refusal(target: Path) -> str | None:
    """Return why there is no GGUF file, if the converter said so."""
    path = target.with_suffix(".refusal")
    return path.read_text().strip() if path.exists() else None
