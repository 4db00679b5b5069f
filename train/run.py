"""A run of training, from parsed flags to the saved student."""

import copy
import signal
import sys
import warnings
from itertools import islice
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.training_args import ParallelMode

from patching.architectures.lookup import check_builds, max_positions, read_config
from patching.architectures.models import load_model, predicts_masked_tokens
from patching.arguments import CalibrationArguments
from patching.blocks import LayerMap, as_layer_list
from patching.checkpoints.fingerprint import fingerprint
from patching.checkpoints.hub import check_can_push
from patching.checkpoints.origin import origin_of
from patching.checkpoints.splice import OutOfRange
from patching.checkpoints.tokenizers import read_tokenizer
from patching.cli.command_line import one_line, user_errors
from patching.devices import warn_if_slow
from patching.files.columns import UnusableText
from patching.patch_order import recommended_order
from patching.recipe import Reference
from patching.running.logits import LogitChange, logit_change
from patching.student_config import StudentConfig
from train.chats.arguments import ChatArguments
from train.checkpoints.find import (
    check_only_its_checkpoints,
    check_resumable,
    find_checkpoint,
)
from train.checkpoints.identity import (
    ANNOUNCED,
    differences,
    read_settings,
    run_settings,
    template_key,
    text_settings,
    values_of,
)
from train.choose_layers import choose_layers
from train.data import Rows, load_phases, load_rows
from train.data_args import DataArguments
from train.divergence import Diverged
from train.dry_run import plan
from train.flag_checks import check_installed, needs_held_out_rows
from train.fp8 import check_fp8, use_fp8
from train.fsdp_config import check_layer_classes
from train.global_batch import split_global_batch
from train.gradient_reduction import choose_reduction
from train.local_batches import check_enough_rows, rows_per_step
from train.masking import Masking
from train.model_args import ModelArguments
from train.order_of_student import measure_order
from train.packing import check_attention, check_separates_documents
from train.ranks import FirstRankFailed, first_rank_first
from train.refused_flags import ignored_flags
from train.saving import Made, is_finished, recorded_settings, repository_of, save_run, upload
from train.sharding import check_replicas, reads_weights, without_weights
from train.speed import check_liger_knows, compile_if_long, reuse_freed_memory
from train.stream import TextChanged
from train.student import cast_parameters, check_range, new_student, student_companions
from train.teacher_cache import TOP_K, TeacherCache, UnusableCache, origin_of_rows, settings_of
from train.trainer import DistillationTrainer
from train.training_args import DistillationArguments

WHILE_READING = (TextChanged, UnusableText, UnusableCache, FirstRankFailed)
"""What a user can cause and only reading a stream shows."""


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    chat_args: ChatArguments,
    args: DistillationArguments,
    text_args: CalibrationArguments,
) -> None:
    """Distill and save a student. What a user can get wrong ends the process with one line and exit
    code 2, almost all of it before weights load.
    """
    with user_errors():
        num_ranks = (args.dry_run and args.dry_run_ranks) or args.world_size
        split_global_batch(args, data_args.max_length, num_ranks)
        chat_args.settle(args, data_args)
    flags = values_of((model_args, data_args, chat_args, args, text_args))
    uploads = args.push_to_hub  # Trainer must not see it
    reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
    with user_errors():
        teacher_config, _ = read_teacher_config(model_args, data_args.max_length)
        if data_args.packing == "documents":
            attention, max_length = model_args.attn_implementation, data_args.max_length
            check_separates_documents(teacher_config, attention, max_length)
        checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
        layer_map = kept_layers(model_args, text_args, args, teacher_config, checkpoint)
        if args.dry_run:
            check_replicas(args, num_ranks)
            has_cache = model_args.teacher_cache is not None
            print_on_main_process(
                args,
                plan(teacher_config, layer_map, data_args, chat_args, args, has_cache),
            )
            return
        weights = fingerprint(reference)
        settings = run_settings(flags, layer_map, weights, args.world_size)
        if is_finished(args, settings):
            print_on_main_process(args, f"{args.save_directory} already holds the finished student")
            measure_order(model_args, data_args, args)
            upload_student(args, uploads)
            return
        check_only_its_checkpoints(checkpoint, args.output_dir)
        check_run(args, teacher_config, uploads)
        choose_reduction(args, teacher_config, layer_map, data_args.max_length)
        if model_args.teacher_fp8:
            check_fp8(args)
        attention = model_args.attn_implementation
        check_attention(attention, teacher_config, data_args.packing, args.device)
        tokenizer = read_tokenizer(reference, teacher_config, model_args.trust_remote_code)
        check_chats(chat_args, model_args, teacher_config)
        masking = Masking.of(tokenizer) if predicts_masked_tokens(teacher_config) else None
        companions = student_companions(
            reference,
            teacher_config,
            layer_map,
            getattr(torch, args.save_dtype),
            tokenizer,
            model_args.trust_remote_code,
        )
        num_set_aside = 0 if masking is not None else data_args.num_set_aside
        rows = read_rows(data_args, chat_args, args, tokenizer, num_set_aside)
        names = [source.name for source in data_args.sources] + [chat_args.sft_dataset]
        sources = [name for name in names if name is not None]
        settings |= text_settings(rows, sources, data_args)
        if chat_args.sft_dataset is not None:
            settings["chat_template"] = template_key(tokenizer)
        cache = open_cache(model_args, data_args, args, teacher_config, tokenizer, rows)
        if cache is not None:
            settings[TOP_K] = cache.made_by["top_k"]
        if checkpoint is not None:
            check_checkpoint(checkpoint, args, rows, settings)
    choose_compilation(args, teacher_config, layer_map, rows, data_args.max_length, cache)
    flags |= {name: getattr(args, name) for name in ("torch_compile", "torch_compile_backend")}
    print_on_main_process(
        args,
        f"student of {len(layer_map.kept)} layers from {layer_map.num_teacher_layers}: "
        f"{as_layer_list(layer_map.kept)}",
    )
    if args.process_index == 0:
        warn_if_slow(args.device, args.compute_dtype, "--bf16 False")

    set_seed(args.seed)
    with user_errors():
        teacher = load_teacher(model_args, teacher_config, args)
    student = new_student(teacher, layer_map, model_args.random_initialization)
    if reads_weights(args):
        try:
            check_range(student, getattr(torch, args.save_dtype))
        except OutOfRange as error:
            exit_out_of_range(args, error)
    if cache is None:
        cast_parameters(teacher, args.compute_dtype)
        if model_args.teacher_fp8:
            use_fp8(teacher)
    else:
        teacher = None  # the student has copies of its layers
    if args.device.type == "cpu":
        reuse_freed_memory()
    trainer = DistillationTrainer(
        student,
        teacher,
        layer_map,
        args,
        masking,
        cache,
        settings,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        held_out_chats=rows.held_out_chats,
    )
    student_config = StudentConfig(layer_map, recommended_order(teacher_config.model_type))
    made = Made(flags, settings, teacher_config, origin_of(reference), student_config)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_on_sigterm.stopped:
            exit_after_sigterm(trainer)
        save_run(made, trainer, companions)
    except WHILE_READING as error:
        print(f"error: {one_line(str(error))}{how_to_go_on(args)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        exit_out_of_memory(trainer)
    except Diverged as error:
        if args.process_index == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OutOfRange as error:
        exit_out_of_range(args, error)
    print_on_main_process(args, f"student saved in {args.save_directory}")
    del trainer, student, teacher  # their memory is needed
    measure_order(model_args, data_args, args)
    with user_errors():
        upload_student(args, uploads)


def read_teacher_config(
    model_args: ModelArguments, max_length: int
) -> tuple[PreTrainedConfig, LogitChange]:
    """Return the teacher's config, and what the teacher does to the output of its head.

    Raises ValueError if the config cannot be read, if its architecture is not supported or its
    logits cannot be reproduced, if it cannot have the attention that is asked for, or if rows are
    longer than its table of positions.
    """
    name, revision = model_args.teacher_model_name_or_path, model_args.revision
    flag, trust_remote_code = "teacher_model_name_or_path", model_args.trust_remote_code
    config = read_config(flag, name, revision, trust_remote_code)
    change = logit_change(check_builds(flag, name, config, trust_remote_code))
    if (attention := model_args.attn_implementation) is not None:
        settings = {"trust_remote_code": trust_remote_code, "attn_implementation": attention}
        try:
            without_weights(copy.deepcopy(config), **settings)
        except (ImportError, ValueError) as error:
            raise ValueError(f"attn_implementation={attention}: {error}") from error
    longest = max_positions(config)
    if longest is not None and max_length > longest:
        raise ValueError(
            f"max_length={max_length}: this {config.model_type} model has positions for {longest} "
            f"tokens, choose 2-{longest}"
        )
    return config, change


def check_acceleration(args: DistillationArguments, teacher_config: PreTrainedConfig) -> None:
    """Switch FSDP off where there is nothing to shard, with a warning as for other flags that this
    launch has no use for. Raises ValueError if FSDP or Liger kernels do not fit the teacher's
    architecture.

    The documented command has `--fsdp_config`, but one process has nothing to shard, and accelerate
    does not shard on CPUs.
    """
    is_single = args.parallel_mode != ParallelMode.DISTRIBUTED
    for line in ignored_flags(args, is_single):
        warnings.warn(line, stacklevel=2)
    if args.fsdp:
        reason = None
        if is_single:
            reason = "on a single process: start it with torchrun"
        elif args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
            reason = "on CPUs: every rank holds the whole student and teacher"
        if reason is None:
            check_layer_classes(args.fsdp_config, teacher_config)
        else:
            warnings.warn(f"--fsdp_config has no effect {reason}", stacklevel=2)
            args.fsdp = args.fsdp_plugin_args = None
            checkpointing = args.fsdp_config.get("activation_checkpointing", False)
            args.activation_checkpointing |= checkpointing
    if args.use_liger_kernel:
        check_liger_knows(teacher_config)


def check_run(args: DistillationArguments, teacher: PreTrainedConfig, uploads: bool) -> None:
    """Raise ValueError, ImportError or OSError for what would fail once weights are loaded."""
    check_acceleration(args, teacher)
    check_replicas(args, args.world_size)
    check_installed(args)
    if uploads and args.process_index == 0:
        check_can_push(repository_of(args), args.public)


def check_chats(
    chat_args: ChatArguments, model_args: ModelArguments, teacher: PreTrainedConfig
) -> None:
    """Raise ValueError for a run with chats that a teacher, or a cache of one, cannot have."""
    if chat_args.sft_dataset is None:
        return
    if predicts_masked_tokens(teacher):
        raise ValueError(
            f"sft_dataset: a {teacher.model_type} model predicts hidden tokens and gives no replies"
        )
    if model_args.teacher_cache is not None:
        raise ValueError("teacher_cache: it holds no chats, leave it or --sft_dataset out")


def kept_layers(
    model_args: ModelArguments,
    text_args: CalibrationArguments,
    args: DistillationArguments,
    teacher: PreTrainedConfig,
    checkpoint: str | None,
) -> LayerMap:
    """Return the layer map. Chosen layers are chosen once: a resumed run reads them back.

    Raises ValueError for layers that do not exist and for text that cannot be read.
    """
    layer_map = model_args.layer_map(teacher)
    if not model_args.chooses_layers:
        return layer_map
    recorded = recorded_settings(args, checkpoint)
    if recorded is not None:
        return LayerMap(tuple(recorded["kept_layers"]), recorded["num_teacher_layers"])
    text = text_args.read_calibration()
    layer_map, reasons = choose_layers(model_args, text, args, teacher)
    print_on_main_process(args, reasons)
    return layer_map


def read_rows(
    data_args: DataArguments,
    chat_args: ChatArguments,
    args: DistillationArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_set_aside: int,
) -> Rows:
    """Return the rows. Raises ValueError for unusable text, for a stream without a number of steps
    or without text, and for less text than one step takes.
    """
    with first_rank_first(args, "tokenizing"):
        seed = args.text_seed
        if chat_args.sft_dataset is None:
            rows = load_rows(data_args, tokenizer, seed, num_set_aside)
        else:
            steps = args.max_steps
            rows = load_phases(data_args, chat_args, tokenizer, seed, steps, num_set_aside)
    if rows.held_out is None and (names := needs_held_out_rows(args)):
        raise ValueError(f"{', '.join(names)}: no text is held out, raise --heldout_documents")
    if rows.is_stream:
        if args.max_steps < 0:
            raise ValueError(
                "max_steps=-1: a stream has no length to count passes by, give --max_steps in "
                "place of --num_train_epochs"
            )
        if args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy}: a stream is read in its "
                "own order, --shuffle_buffer documents at a time; leave it out"
            )
        if args.process_index == 0 and (
            found := rows.train.check(rows_per_step(args, args.world_size))
        ):
            print_on_main_process(args, found)
    elif smaller := check_enough_rows(rows.train, args, data_args.max_length):
        print_on_main_process(args, smaller)
    return rows


def check_checkpoint(
    checkpoint: str, args: DistillationArguments, rows: Rows, settings: dict[str, Any]
) -> None:
    """Say what changes on resuming. Raises ValueError if the run cannot resume."""
    check_resumable(checkpoint, rows.is_stream, bool(args.fsdp), settings)
    before = read_settings(checkpoint) or {}
    schedule = args.lr_scheduler_type.value
    if before.get("learning_rate", args.learning_rate) != args.learning_rate and schedule in (
        "reduce_lr_on_plateau",
        "greedy",
    ):
        raise ValueError(
            f"learning_rate={args.learning_rate}: {schedule} continues with the checkpoint's own "
            f"rate, give {before['learning_rate']}"
        )
    announced = {name: settings[name] for name in ANNOUNCED}
    for text in differences(before, announced):
        print_on_main_process(args, f"resuming from {checkpoint}: {text} from here on")


def choose_compilation(
    args: DistillationArguments,
    teacher: PreTrainedConfig,
    layer_map: LayerMap,
    rows: Rows,
    max_length: int,
    cache: TeacherCache | None,
) -> None:
    """Compile a long run on a CPU, too, and say so."""
    if args.max_steps > 0:
        num_rows = args.max_steps * rows_per_step(args, args.world_size)
    else:
        num_rows = args.num_train_epochs * len(rows.train)
    num_tokens, has_cache = num_rows * max_length, cache is not None
    if compile_if_long(args, teacher, layer_map, num_tokens, max_length, has_cache):
        print_on_main_process(
            args, "compiling layers, which a run this long is worth (--torch_compile False: do not)"
        )


def open_cache(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
) -> TeacherCache | None:
    """Return the cache of the teacher's predictions, if this run reads one.

    Raises ValueError unless the loss needs nothing else, and the cache holds these rows, made by
    the same teacher at the same temperature. Of a stream, the number of rows is compared, and those
    of the first step are looked up; the others are as they are read.
    """
    if model_args.teacher_cache is None:
        return None
    if args.loss_weights.cosine:
        raise ValueError(
            "teacher_cache: it has no hidden states, which the cosine term compares; add "
            "--use_cosine_loss False, or leave --teacher_cache out"
        )
    if not args.loss_weights.kl:
        raise ValueError("teacher_cache: only the KL term reads it, and that is off")
    reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
    wanted = origin_of_rows(data_args, args.text_seed)
    cache = TeacherCache(model_args.teacher_cache, wanted)
    cache.check(settings_of(reference, config, tokenizer, args.temperature))
    cache.check_holds(rows.held_out or ())
    if not rows.is_stream:
        cache.check_holds(rows.train)
    else:
        num_rows = rows_per_step(args, args.world_size)
        cache.check_has_rows(num_rows * args.max_steps)
        if args.process_index == 0:
            cache.check_holds(islice(rows.train, num_rows))
            rows.train.resume(None)
    return cache


def load_teacher(
    model_args: ModelArguments, config: PreTrainedConfig, args: DistillationArguments
) -> PreTrainedModel:
    """Return the teacher in its own dtype. Of sharded ranks only the first reads its weights.

    Raises ValueError if its weights are damaged or incomplete.
    """
    trust, attention = model_args.trust_remote_code, model_args.attn_implementation
    if not reads_weights(args):
        settings = {"trust_remote_code": trust, "attn_implementation": attention}
        return without_weights(config, dtype=args.compute_dtype, **settings)
    reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
    return load_model(reference, "auto", trust, attention)


def exit_after_sigterm(trainer: DistillationTrainer) -> NoReturn:
    print_on_main_process(
        trainer.args,
        f"stopped by SIGTERM at step {trainer.state.global_step}; run the same command with "
        "--resume_from_checkpoint last to continue",
    )
    sys.exit(128 + signal.SIGTERM)


def exit_out_of_memory(trainer: DistillationTrainer) -> NoReturn:
    """End the process with what needs less memory and leaves the result as it is."""
    args = trainer.args
    remedies = []
    if (batch := args.per_device_train_batch_size) > 1:
        remedies.append(
            f"lower --per_device_train_batch_size, now {batch}, and raise "
            "--gradient_accumulation_steps as much"
        )
    if not args.activation_checkpointing:
        remedies.append("give --activation_checkpointing True")
    remedies.append("use more devices with --fsdp_config")
    print(
        f"error: out of memory in step {trainer.state.global_step + 1}: "
        f"{', or '.join(remedies)}{how_to_go_on(args)}",
        file=sys.stderr,
    )
    sys.exit(2)


def exit_out_of_range(args: DistillationArguments, error: OutOfRange) -> NoReturn:
    """End the process because the student cannot be saved in --save_dtype."""
    print(f"error: save_{error}{how_to_go_on(args)}", file=sys.stderr)
    sys.exit(2)


def how_to_go_on(args: DistillationArguments) -> str:
    """Say how to continue from the newest checkpoint, if there is one."""
    checkpoint = find_checkpoint("last", args.output_dir)
    return f"; --resume_from_checkpoint last continues from {checkpoint}" if checkpoint else ""


def upload_student(args: DistillationArguments, uploads: bool) -> None:
    """Upload the finished student if that was asked for. Raises OSError if it fails."""
    if uploads and args.process_index == 0:
        print(f"student uploaded to {upload(args)}", flush=True)


def print_on_main_process(args: DistillationArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)
