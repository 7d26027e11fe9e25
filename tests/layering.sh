#!/usr/bin/env bash
# Dependencies point one way: launcher -> runtime -> {kernels, comm} -> kernels/base. An include that points up, or a
# library's header outside the one place that may know it, fails.
set -euo pipefail
cd "$(dirname "$0")/.."
failed=0

# folder, and what the files below it must not include
forbid() {
  local folder=$1 pattern=$2 except=${3:-^$} found
  found=$(grep -rnE --include='*.[ch]' --include='*.cu' --include='*.cuh' "^ *# *include [<\"]($pattern)" "$folder" | grep -vE "$except" || true)
  if [ -n "$found" ]; then
    echo "$folder must not include $pattern:"
    echo "$found"
    failed=1
  fi
}

forbid kernels/base 'kernels/(device|ops|sparsity|cpu|cuda)|comm/|runtime/|launcher/'
forbid kernels 'comm/|runtime/|launcher/'
forbid comm 'kernels/(device|ops|sparsity|cpu|cuda)|runtime/|launcher/'
forbid runtime 'kernels/(cpu|cuda)/|launcher/|cuda|cblas|omp\.h'
forbid kernels 'cblas|omp\.h' '^kernels/cpu/'
forbid kernels 'cuda|cublas|nccl' '^kernels/cuda/'
forbid comm 'mpi\.h' '^comm/mpi\.c'
for folder in kernels runtime launcher tests; do forbid "$folder" 'mpi\.h' '^tests/comm/'; done
found=$(grep -rnE --include='*.[ch]' '\bgetenv\(' kernels comm runtime || true)
[ -z "$found" ] || { echo "only the launcher reads the environment:"; echo "$found"; failed=1; }
[ $failed -eq 0 ] && echo "layering: every include points down"
exit $failed
