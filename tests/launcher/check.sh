# What the tests of the program share: sourced with the program, the source folder and a folder to write to.
set -euo pipefail
tessera=$1 source=$2 json_get=$4
model=$source/configs/models/demo
scratch=$(mktemp -d "$3/launcher-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# The program on N ranks; one rank needs no launcher.
on_ranks() {
  local n=$1
  shift
  if [ "$n" -eq 1 ]; then
    "$tessera" "$@"
  else
    mpirun --oversubscribe --bind-to none -n "$n" "$tessera" "$@"
  fi
}

# refused RANKS PATTERN ARGUMENTS...: exits with 1 and says why in one line, once, that has the pattern.
refused() {
  local n=$1 pattern=$2 code=0
  shift 2
  on_ranks "$n" "$@" >out 2>err </dev/null || code=$?
  [ $code -eq 1 ] || { cat err >&2; fail "exit status $code, not 1: $*"; }
  [ ! -s out ] || fail "something on standard output: $*"
  grep '^tessera' err >said || true
  [ "$(wc -l <said)" -eq 1 ] || { cat err >&2; fail "$(wc -l <said) lines, not 1: $*"; }
  grep -q -- "$pattern" said || fail "$*: \"$(cat said)\" does not say \"$pattern\""
  if grep -q 'MPI_ABORT' err; then fail "ended by MPI_Abort: $*"; fi
}

# done_by RANKS ARGUMENTS...: exits with 0.
done_by() {
  local n=$1
  shift
  on_ranks "$n" "$@" 2>err || { cat err >&2; fail "on $n ranks: $*"; }
}

# Ends a script that needs a GPU where none is visible; ctest counts it as skipped.
needs_gpu() {
  echo '[1, 2]' >probe.json
  if "$tessera" logits --device cuda --model "$model" --tokens probe.json --output probe.safetensors 2>err; then return; fi
  if grep -qE 'no GPU is visible|this build has: cpu' err; then
    echo "SKIP: $(cat err)"
    exit 77
  fi
  fail "the first logits on the GPU: $(cat err)"
}

# Records as they must be equal from run to run: without the time, in the order of their ids.
records() {
  sed 's/"created":[0-9]*,//' "$1" | sort
}

same() {
  cmp -s "$1" "$2" || { diff "$1" "$2" | cut -c1-2000 >&2; fail "$3"; }
}
