# sanitize_cuda.sh TOOL PROGRAM TOKENS: cases of up to TOKENS tokens under compute-sanitizer's memcheck or racecheck, without a finding.
set -euo pipefail
tool=$1 program=$2
shift 2
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) ||
  { echo "SKIP: no compute-sanitizer in PATH or /usr/local/cuda/bin"; exit 77; }
code=0
"$sanitizer" --tool "$tool" --error-exitcode 9 "$program" small "$@" || code=$?
exit $code
