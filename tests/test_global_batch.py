"""`--global_batch_tokens` and `--global_batch_rows`: the same steps on any number of ranks."""

import pytest
from test_train import parse

from train.global_batch import split_global_batch
from train.local_batches import rows_per_step
from train.train import main
from train.training_args import DistillationArguments


def arguments(*flags: str) -> DistillationArguments:
    teacher_and_folder = ("--teacher_model_name_or_path", "t", "--save_directory", "s")
    return parse(*teacher_and_folder, *flags)[-1]


@pytest.mark.parametrize(
    "flags", [("--global_batch_tokens", "49152"), ("--global_batch_rows", "24")]
)
@pytest.mark.parametrize(
    ("num_ranks", "rows", "micro_batches"),
    [(1, 2, 12), (2, 2, 6), (4, 2, 3), (8, 1, 3), (24, 1, 1)],
)
def test_a_step_has_the_same_rows_on_any_number_of_ranks(flags, num_ranks, rows, micro_batches):
    args = arguments(*flags)
    split_global_batch(args, 2048, num_ranks)
    assert args.per_device_train_batch_size == rows
    assert args.gradient_accumulation_steps == micro_batches
    assert rows_per_step(args, num_ranks) == 24


def test_without_these_flags_the_paper_on_four_ranks():
    args = arguments()
    split_global_batch(args, 2048, 3)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 256)
    assert rows_per_step(args, 4) * 2048 == 2048 * 2048


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--global_batch_tokens", "5000"), "global_batch_tokens=5000: .*, choose 4096 or 6144"),
        (("--global_batch_tokens", "100"), "global_batch_tokens=100: .*, choose 2048"),
        (("--global_batch_rows", "10"), "10 rows .* does not divide over 4 ranks"),
    ],
)
def test_what_does_not_divide_is_rejected(flags, message):
    with pytest.raises(ValueError, match=message):
        split_global_batch(arguments(*flags), 2048, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--global_batch_rows", "8", "--per_device_train_batch_size", "2"),
            "--global_batch_rows and --per_device_train_batch_size all set the rows of a step",
        ),
        (("--global_batch_tokens", "8", "--gradient_accumulation_steps", "256"), "all set"),
        (("--global_batch_tokens", "8", "--global_batch_rows", "2"), "all set"),
        (("--global_batch_rows", "0"), "global_batch_rows=0: choose 1 or more"),
    ],
)
def test_only_one_flag_sets_the_rows_of_a_step(flags, message):
    with pytest.raises(ValueError, match=message):
        arguments(*flags)


def test_the_plan_of_other_ranks_has_the_same_tokens(pair_folders, text_file, tmp_path, capsys):
    command = [
        *("--teacher_model_name_or_path", str(pair_folders[0]), "--dataset", str(text_file)),
        *("--save_directory", str(tmp_path / "student"), "--max_length", "32", "--dry_run"),
        *("--global_batch_tokens", "512"),
    ]
    for ranks, split in (
        ("1", "of 32 x 8 micro-batches x 1"),
        ("4", "of 32 x 2 micro-batches x 4"),
    ):
        main([*command, "--dry_run_ranks", ranks])
        printed = capsys.readouterr().out
        assert "tokens per optimizer step: 512 " in printed
        assert split in printed
    with pytest.raises(SystemExit) as ended:
        main([*command, "--dry_run_ranks", "3"])
    assert ended.value.code == 2
    assert "does not divide over 3 ranks" in capsys.readouterr().err
