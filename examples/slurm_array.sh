#!/bin/bash
# A run in shards on a SLURM cluster: one independent process with one GPU per task.
#
#   sbatch examples/slurm_array.sh                                    # 64 shards
#   sbatch --array=7,12 --export=ALL,SHARDS=64 examples/slurm_array.sh  # resume two of them
#   sbatch --dependency=afterok:JOB --wrap 'certify merge shards/ -o run.jsonl --if-needed'   # when all tasks have ended
#   certify status shards/                                            # progress; names missing and stalled shards
#
# Use one kind of GPU (--constraint): equal noise is not promised across kinds, and merging rejects a mixture.
#SBATCH --job-name=certify
#SBATCH --array=1-64
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@60
#SBATCH --requeue
set -euo pipefail

shards=${SHARDS:-$SLURM_ARRAY_TASK_COUNT}

exec certify --model resnet50 --weights resnet50.pth --data imagenet --root /data/imagenet \
    --sigma 0.5 --radius 0.5 --n 100000 --quiet \
    --shard "$SLURM_ARRAY_TASK_ID/$shards" --out shards/
