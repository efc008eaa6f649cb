#!/usr/bin/env bash
# Builds the native code with each sanitizer and runs native.cpp under it.
# csrc/tests/sanitize.sh [address|undefined|thread]...
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ $# -gt 0 ] || set -- address undefined thread
# What cannot run here need not be built, which takes most of the time.
avx512=OFF
if grep -qs '^flags.* avx512f' /proc/cpuinfo; then avx512=ON; fi
for sanitizer in "$@"; do
  cmake -S "$source" -B "$folder/$sanitizer" -DCMAKE_BUILD_TYPE=Release -DFAVE_FAST_PYTHON=OFF -DFAVE_FAST_CUDA=OFF \
    -DFAVE_FAST_AVX512="$avx512" -DFAVE_FAST_SANITIZE="$sanitizer" >"$folder/log" || { cat "$folder/log" >&2; exit 1; }
  cmake --build "$folder/$sanitizer" --parallel 2 >"$folder/log" || { cat "$folder/log" >&2; exit 1; }
  echo "$sanitizer: $("$folder/$sanitizer/native_test")"
done
