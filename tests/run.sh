#!/usr/bin/env bash
# Builds everything and runs all tests through ctest. Arguments go to ctest, e.g. -L unit.
# usage: tests/run.sh [CTEST ARGUMENTS]          PRESET=asan tests/run.sh for another preset
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${PRESET:-release}
launcher/build.sh "$preset" all
ctest --preset "$preset" "$@"
# Why tests were skipped, if any were.
grep -hE '^SKIP' "build/$preset/Testing/Temporary/LastTest.log" || true
