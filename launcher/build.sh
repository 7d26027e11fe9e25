#!/usr/bin/env bash
# Builds a CMake preset, after installing the distribution packages it needs and that are missing (Debian, Ubuntu).
# Run again, it does only what is left to do.
# usage: launcher/build.sh PRESET [TARGET]     PRESET: release, debug or asan; TARGET: tessera (default) or all
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:?usage: launcher/build.sh PRESET [TARGET]}
target=${2:-tessera}

packages=(
  gcc libc6-dev cmake ninja-build pkg-config
  libopenblas-openmp-dev libopenmpi-dev openmpi-bin
  libjansson-dev libpcre2-dev libutf8proc-dev libprotobuf-c-dev protobuf-c-compiler
)
[ "$target" = all ] && packages+=(libcriterion-dev)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

tests=OFF
[ "$target" = all ] && tests=ON
# A build for the program alone leaves the tests out, and does not take them away from a build that has them.
if [ "$tests" = ON ] || [ ! -f "build/$preset/CMakeCache.txt" ]; then
  cmake --preset "$preset" -DTS_TESTS=$tests >"build-$preset.log" 2>&1 || { cat "build-$preset.log"; rm -f "build-$preset.log"; exit 1; }
  rm -f "build-$preset.log"
fi
cmake --build --preset "$preset" --target "$target"
