#!/usr/bin/env bash
# Checks that every source is formatted as .clang-format says; --fix formats them.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v clang-format >/dev/null; then
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-format >/dev/null
fi
mode=(--dry-run --Werror)
[ "${1:-}" = --fix ] && mode=(-i)
git ls-files -z '*.c' '*.h' '*.cu' '*.cuh' | xargs -0 -r clang-format "${mode[@]}"
[ "${1:-}" = --fix ] || echo "format: every source is formatted"
