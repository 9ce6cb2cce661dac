#!/bin/sh
# What docs/benchmarks.md says of a GPU, on a machine with one: `PEER_PYTHON=/path/to/python/with/trl sh benchmarks/gpu/run.sh`
#
# Both interpreters need bitsandbytes, the peer's TRL and Liger's kernels; where one is to be both:
# pip install -c constraints.txt -e '.[bench,qlora]' liger-kernel
set -e
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
peer=${PEER_PYTHON:-$python}
out=${OUT:-.}
rounds=${ROUNDS:-3}
lora="--device cuda --lora-rank 16 --peer-python $peer --rounds $rounds"

$python -m pytest tests/gpu
$python benchmarks/gpu/decode.py --json "$out/gpu-decode.json"
$python benchmarks/sft.py $lora --size 1.5b --batch-size 64 --max-length 11264 --steps 10 --warmup 3 \
    --peers trl-liger trl-liger-best kitae-recompute --json "$out/gpu-sft.json"
$python benchmarks/grpo.py $lora --size 1.5b --prompts 8 --group 8 --steps 4 --warmup 1 \
    --peers trl-liger trl-liger-best --json "$out/gpu-grpo.json"
# The consumer's case: 8B in 4 bits, one row of 2,048 tokens a step; peak memory is to stay below 24 GB.
$python benchmarks/sft.py $lora --size 8b --quantization nf4 --length 2048 --batch-size 1 --max-length 2048 --steps 6 --warmup 2 \
    --peers kitae-recompute trl-liger --json "$out/gpu-qlora.json"
