#!/bin/bash
# Evaluate a family in shards, one per task of a Slurm array, and put the reports together:
#
#     TEACHER=... STUDENT=... DIR=... sbatch --array=1-8 examples/slurm/evaluate_array.sh
#
# A shard that was stopped continues when it is started again: add --requeue to sbatch.
#SBATCH --job-name=evaluate-family
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail

i=$SLURM_ARRAY_TASK_ID
n=$SLURM_ARRAY_TASK_COUNT
python -m evaluate.evaluate --teacher_model_name_or_path "$TEACHER" --student_model_name_or_path "$STUDENT" \
    --save_directory "$DIR/shard_$i" --shard "$i/$n" --num_layers_to_patch all --baselines naive "$@"

# Every shard that ends draws the report of all that have results by now; the last one's is complete.
python -m evaluate.report "$DIR"/shard_*/ --save_directory "$DIR"
