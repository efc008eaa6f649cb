#!/usr/bin/env bash
# Nsight profiles of the parts of a step, with the package's ranges; see bench/workload.py for what runs.
#
#   bench/profile.sh nsys PART [OUT] [workload options]   a timeline: OUT/PART.nsys-rep
#   bench/profile.sh ncu  PART [OUT] [workload options]   counters of each kernel: OUT/PART.csv, then their table
#
# PART is step, graph, topk or train; OUT is a folder (default: profiles). Clocks are left as they are, so that times
# are those of use: Nsight Compute would else lower them to the base clock. PYTHON names the interpreter.
set -euo pipefail

usage() { sed -n '4,5p' "$0" | sed 's/^# *//' >&2; exit 2; }
[ $# -ge 2 ] || usage
tool=$1 part=$2
shift 2
out=profiles
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then out=$1; shift; fi
case $tool in nsys | ncu) ;; *) usage ;; esac
case $part in step | graph | topk | train) ;; *) usage ;; esac
command -v "$tool" >/dev/null || { echo "bench/profile.sh: $tool is not on the PATH" >&2; exit 2; }

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export FAVE_FAST_NVTX=1
workload=("$python" -m bench.workload "$part" "$@")

if [ "$tool" = nsys ]; then
  # node: the kernels inside a graph, too; it adds a little to each.
  exec nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --capture-range=cudaProfilerApi \
    --capture-range-end=stop --force-overwrite=true --output="$out/$part" "${workload[@]}"
fi

# Ours alone: Triton's are called _name, scan or finish, the CUDA one encode_kernel. Training launches some hundred of
# PyTorch's own beside them. Not by range: backward passes run in a thread of their own, outside the forward's ranges.
# A kernel is replayed for every group of counters, with caches flushed before each: what it does from a cold L2.
ncu --clock-control none --cache-control all --profile-from-start off --graph-profiling node --target-processes all \
  --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section WarpStateStats \
  --section LaunchStats --section Occupancy --nvtx --kernel-name 'regex:^(_|scan$|finish$|encode_kernel)' \
  --csv --page raw --print-units base --log-file "$out/$part.csv" "${workload[@]}"
"$python" -m bench.counters "$out/$part.csv"
