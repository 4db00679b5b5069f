"""`--dry_run`: layers, sizes, tokens, FLOPs and memory of a run, from configs alone."""

import torch
from transformers import PreTrainedConfig

from patching.blocks import LayerMap, as_layer_list
from patching.patch_order import recommended_order
from train.chats.arguments import ChatArguments
from train.data_args import DataArguments
from train.estimate import (
    MicroBatch,
    flops_per_token,
    forward_flops,
    memory,
    sizes,
    student_config,
)
from train.order_of_student import cost_of_order, why_not
from train.training_args import DistillationArguments

GIB = 2**30


def plan(
    teacher: PreTrainedConfig,
    layer_map: LayerMap,
    data_args: DataArguments,
    chat_args: ChatArguments,
    args: DistillationArguments,
    has_cache: bool = False,
) -> str:
    """Return the plan of a run as text. With a cache no teacher is in memory."""
    student = student_config(teacher, layer_map)
    order = recommended_order(teacher.model_type)
    num_ranks = args.dry_run_ranks or args.world_size
    is_sharded = bool(args.fsdp_config) and num_ranks > 1
    batch = MicroBatch(
        args.per_device_train_batch_size,
        data_args.max_length,
        args.compute_dtype,
        bool(args.activation_checkpointing)
        or (is_sharded and bool(args.fsdp_config.get("activation_checkpointing"))),
    )
    tokens_per_step = batch.num_tokens * args.gradient_accumulation_steps * num_ranks
    flops = flops_per_token(student, teacher, args.loss_weights).at(batch.num_positions)
    parts = memory(
        student,
        teacher,
        args.loss_weights,
        batch,
        num_shards=num_ranks // args.fsdp_replicas if is_sharded else 1,
        num_aligned_pairs=len(layer_map.alignment_pairs),
        is_cpu=not torch.accelerator.is_available(),
        num_replicas=1 if is_sharded else num_ranks,
        optimizer=args.optim.value,
        optimizer_options=args.optim_args,
    )
    if has_cache:
        parts = parts._replace(teacher=0)
        flops = flops_per_token(student, None, args.loss_weights).at(batch.num_positions)
    lines = [
        f"student of {len(layer_map.kept)} layers from {layer_map.num_teacher_layers} "
        f"({teacher.model_type}): {as_layer_list(layer_map.kept)}",
        "",
        "student layer  teacher block  hidden states compared (student, teacher)",
        f"{'embedding':>13}  {'':13}  {layer_map.alignment_pairs[0]}",
    ]
    for i, (block, pair) in enumerate(zip(layer_map.blocks, layer_map.alignment_pairs[1:])):
        layers = f"{block.start}-{block.stop - 1}" if len(block) > 1 else f"{block.start}"
        lines.append(f"{i:13}  {layers:>13}  {pair}")
    lines += ["", f"sizes, patched {order} first (parameters: stored, embedding and head both)"]
    names = {0: "student", layer_map.max_layers_to_patch: "teacher"}
    for k, size in enumerate(sizes(teacher, layer_map, order)):
        stored, both = (count / 1e6 for count in size.parameters)
        lines.append(
            f"  k = {k:2}  {size.depth:3} layers  {stored:10,.2f} M  {both:10,.2f} M  "
            f"{names.get(k, '')}".rstrip()
        )
    lines += [
        "",
        f"tokens per optimizer step: {tokens_per_step:,} ({batch.num_rows} rows of "
        f"{batch.num_positions} x {args.gradient_accumulation_steps} micro-batches x "
        f"{num_ranks} ranks)",
        f"FLOPs per optimizer step:  {tokens_per_step * flops:.3g}",
    ]
    if args.max_steps > 0:
        tokens = tokens_per_step * args.max_steps
        lines.append(f"in {args.max_steps} steps: {tokens:,} tokens, {tokens * flops:.3g} FLOPs")
        lines += phases(chat_args, args.max_steps, tokens_per_step)
    else:
        lines.append(f"{args.num_train_epochs:g} passes over the text; its length sets the steps")
    if data_args.measure_order and why_not(teacher, layer_map) is None:
        documents = data_args.order_documents
        between = (forward_flops(student).layers + forward_flops(teacher).layers) // 2
        training_flops = tokens_per_step * args.max_steps * flops if args.max_steps > 0 else None
        cost = cost_of_order(teacher, layer_map, documents, data_args.max_length, between)
        cost = cost.within(args.order_budget, training_flops)
        lines.append(
            f"then the order of patching on {documents} documents set aside: {cost.text()}"
        )
    lines += ["", f"memory per rank, {args.optim.value}{', sharded' * is_sharded} (estimate, GiB)"]
    lines += [f"  {name:12}{num_bytes / GIB:8.2f}" for name, num_bytes in parts._asdict().items()]
    lines.append(f"  {'total':12}{parts.total / GIB:8.2f}")
    return "\n".join(lines)


def phases(chat_args: ChatArguments, num_steps: int, tokens_per_step: int) -> list[str]:
    """Return the phases of a run with chats. How many of the tokens of chats are responses is not
    known before they are read.
    """
    if chat_args.sft_dataset is None:
        return []
    num_text_steps = chat_args.num_text_steps(num_steps)
    tokens = (num_steps - num_text_steps) * tokens_per_step
    lines = [
        f"  chats: steps {num_text_steps + 1}-{num_steps}, about {tokens:,} loss tokens, which are "
        "the responses; their prompts are read besides",
    ]
    if num_text_steps:
        tokens = num_text_steps * tokens_per_step
        lines.insert(0, f"  text:  steps 1-{num_text_steps}, {tokens:,} tokens, all loss tokens")
    return lines
