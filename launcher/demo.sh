#!/usr/bin/env bash
# Builds tessera and runs the main job: two MPI ranks generate for configs/demo/requests.jsonl with the demo model.
# usage: launcher/demo.sh [RANKS]
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:-2}
results=results/demo.jsonl

launcher/build.sh release
mkdir -p "$(dirname "$results")"

# Containers often run as root, and a laptop may have fewer processors than ranks: Open MPI wants to be told that both are meant.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun -n "$ranks" --oversubscribe --bind-to none build/release/bin/tessera run \
  --model configs/models/demo --input configs/demo/requests.jsonl --output "$results"

build/release/bin/tessera show --input configs/demo/requests.jsonl --results "$results"
echo "results: $PWD/$results"
