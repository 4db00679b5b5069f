"""The model card (README.md) of a student: what it is, how it was made and how to build sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from patching.architectures.models import auto_class
from patching.blocks import Order, as_layer_list
from patching.checkpoints.model_card import PAPER, TASKS, how_to_load
from patching.checkpoints.origin import CARD_FILE_NAME, Origin
from patching.cli.units import count_text
from patching.files.outputs import write_text
from patching.student_config import StudentConfig
from train.data_args import parse_sources
from train.estimate import sizes
from train.teacher_cache import TOP_K


def write_student_card(
    folder: Path,
    title: str,
    origin: Origin,
    teacher: PreTrainedConfig,
    student_config: StudentConfig,
    facts: Mapping[str, str],
    held_out: Mapping[str, float],
) -> None:
    """Write the card into a student's folder. `origin` says where the teacher came from, and
    `facts` how the student was made, such as `training_facts`.
    """
    text = student_card(title, origin, teacher, student_config, facts, held_out)
    write_text(folder / CARD_FILE_NAME, text)


def student_card(
    title: str,
    origin: Origin,
    teacher: PreTrainedConfig,
    student_config: StudentConfig,
    facts: Mapping[str, str],
    held_out: Mapping[str, float],
) -> str:
    layer_map, order = student_config.layer_map, student_config.patch_order
    family = sizes(teacher, layer_map, order)
    smallest, largest = (count_text(family[i].parameters.stored) for i in (0, -1))
    loader = auto_class(teacher).__name__
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": TASKS[loader]}
    metadata["tags"] = ["boomerang-distillation", "distillation"]
    if origin.repository:
        metadata["base_model"] = origin.repository
    if origin.license:
        metadata |= origin.license.metadata
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"A student of {len(layer_map.kept)} layers, made from a teacher of "
        f"{layer_map.num_teacher_layers} so that blocks of teacher layers can be put back in place "
        f"of single student layers, with no further training ([paper]({PAPER})).",
        "",
        "| | |",
        "| --- | --- |",
        f"| teacher | {origin.title} |",
        f"| revision of the teacher | {origin.commit or origin.revision or origin.fingerprint} |",
        f"| license of the teacher | {origin.license or 'not stated in its card'} |",
        f"| kept teacher layers | {as_layer_list(layer_map.kept)} |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        *(
            f"| {name.removeprefix('eval_')}, held out | {held_out[name]:.4f} |"
            for name in held_out
        ),
        "",
        *how_to_load(title, loader),
        "",
        f"With the teacher it makes {len(family)} sizes from {smallest} to {largest} parameters, "
        f"patched {order_text(order)}:",
        "",
        "| layers patched | layers | parameters |",
        "| --- | --- | --- |",
        *(
            f"| {k} | {size.depth} | {count_text(size.parameters.stored)} |"
            for k, size in enumerate(family)
        ),
        "",
        "```sh",
        "python -m patching.patch \\",
        f"    --teacher_model_name_or_path {origin.repository or 'TEACHER'} \\",
        f"    --student_model_name_or_path {title} \\",
        f"    --num_layers_to_patch {layer_map.max_layers_to_patch // 2} --save_directory DIR",
        "```",
        "",
    ]
    return "\n".join(lines)


def order_text(order: Order) -> str:
    """Return an order in words."""
    if isinstance(order, str):
        return f"{order} layer first"
    return f"in the sequence of student layers {as_layer_list(order)}"


def chat_facts(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return which chats a student was trained on, if any."""
    chats = arguments.get("sft_dataset")
    if chats is None:
        return {}
    return {"chats": f"{public_name(chats)}, the last {arguments['sft_share']:.0%} of the steps"}


def public_name(text: str) -> str:
    """Return the name of a text, without what names the machine."""
    return "local files" if Path(text).exists() else text


def text_fact(dataset: str) -> str:
    """Return the names of the texts, and their weights if there are several."""
    (first, *others) = sources = parse_sources(dataset)
    if not others:
        return public_name(first.name)
    return ", ".join(f"{public_name(source.name)} ({source.weight:g})" for source in sources)


def training_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """Return how a student was trained, of what its run.json says, without anything that names the
    machine.
    """
    arguments = run["arguments"]
    start = "random weights" if arguments["random_initialization"] else "the kept teacher layers"
    loss = {
        "cross entropy": 1.0 * arguments["use_cross_entropy"],
        "KL": arguments["kl_loss_weight"] * arguments["use_kl_loss"],
        "cosine": arguments["cosine_loss_weight"] * arguments["use_cosine_loss"],
    }
    facts = {
        "initialized from": start,
        "text": text_fact(arguments["dataset"]),
        **chat_facts(arguments),
        "loss": ", ".join(f"{weight:g} {name}" for name, weight in loss.items() if weight),
        "temperature": f"{arguments['temperature']:g}",
        "learning rate": f"{arguments['learning_rate']:g}",
        "optimizer steps": f"{run['student_step']:,}",
        "tokens per row": f"{arguments['max_length']:,}",
    }
    if (top_k := run["settings"].get(TOP_K)) is not None:
        facts["predictions of the teacher"] = (
            f"its {top_k} most probable tokens and all others together, from a cache; KL is "
            "between these, and at most the whole one"
        )
    return facts
