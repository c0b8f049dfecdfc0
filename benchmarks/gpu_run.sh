#!/usr/bin/env bash
# All that can be learnt on a machine with an NVIDIA GPU, in one command and without a network.
#
#   benchmarks/gpu_run.sh [STEP...]     the steps named, in the order in which they are; or all of them, in this one:
#
#     info       what the machine is
#     build      compiles the libraries for the visible GPU; registers and spills of every kernel
#     probe      every function of csrc/cuda/tile/ptx.cuh: the GPU's bits against those that the emulator is held to
#     wgmma      tests of the attention's kernels for sm_90; if one fails, later steps leave these kernels aside
#     bench      python -m relpos_cuda bench, the logits op first
#     profile    ncu on every kernel of a few layers, bfloat16; those for sm_90 by themselves
#     tests      the tests that a GPU takes part in
#     sanitize   compute-sanitizer, memcheck and racecheck, on tiny problems
#
#   benchmarks/gpu_run.sh --list        the steps, and the seconds each may take
#
# A step that fails or runs out of time does not keep the next from running. Everything is written as it happens, to
#
#   OUT/log.txt        info, build, probe, sanitize      OUT/bench.txt   OUT/profile.txt       OUT/summary.json:
#   OUT/wgmma.txt      OUT/wgmma.xml                     OUT/bench.json  OUT/profile*.ncu-rep  exit code, seconds, ...
#   OUT/tests.txt      OUT/tests.xml                     OUT/*.svg       OUT/profile*.csv*     OUT/clocks.csv
#
# Where a machine is dear, compile elsewhere: a wheel made with RELPOS_CUDA_BUILD=all TORCH_CUDA_ARCH_LIST=9.0a has the
# libraries in relpos_cuda/_prebuilt; with them in that folder here, leave out `build`.
#
# Variables: OUT (default benchmarks/results/<gpu>/<date>-<commit>), PYTHON (python3), BUDGET (seconds for all steps
# together; none), COMMIT (what git says), BENCH_ARGS and TEST_ARGS (more arguments of the two), ARCHIVE (a .tar.gz that
# gets all of OUT after every step; none).
#
# Exit code: 0 if every step passed, 1 if one failed, 2 if there is no GPU or no such step.
set -uo pipefail

STEPS="info build probe wgmma bench profile tests sanitize"
# Tests of builds, packaging and the emulator: the CPU's business, minutes of it.
CPU_TESTS="bench bench_optional build canaries cute demo distributed gpu_run install isa loader modules readme sass sass_rules
  sass_probe simt simt_races simt_sm90 toolchain"

limit_of() {
  case $1 in
    info) echo 60 ;;
    build) echo 240 ;;
    probe) echo 120 ;;
    wgmma) echo 120 ;;
    bench) echo 540 ;;
    profile) echo 240 ;;
    tests) echo 480 ;;
    sanitize) echo 300 ;;
  esac
}

log_of() {
  case $1 in
    tests | bench | wgmma | profile) echo "$OUT/$1.txt" ;;
    *) echo "$OUT/log.txt" ;;
  esac
}

# ---- the steps; each runs in a process of its own, and its exit code is that of the worst command

worst=0
try() {
  echo "+ $*"
  "$@"
  local code=$?
  [ $code = 0 ] || echo "exit code $code"
  [ $code -le $worst ] || worst=$code
  return $code
}

step_info() {
  local clocks=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem
  try nvidia-smi
  try nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,$clocks,power.limit,ecc.mode.current --format=csv
  for tool in nvcc ncu compute-sanitizer; do
    if command -v $tool >/dev/null; then $tool --version; else echo "$tool: not on the path"; fi
  done
  # Not compiled yet: the build step is timed.
  RELPOS_CUDA_NO_JIT=1 try "$PYTHON" -m relpos_cuda info
}

step_build() {
  local start paths
  paths=$(mktemp)
  for kind in plan cpu cuda; do
    start=$SECONDS
    try "$PYTHON" -m relpos_cuda build $kind | tee "$paths"
    local code=${PIPESTATUS[0]}
    [ "$code" -le $worst ] || worst=$code
    echo "$kind: $((SECONDS - start)) s, or found in the cache if no compile command is above"
  done
  local library
  library=$(sed -n 's/^cuda  *\(\/.*\)/\1/p' "$paths")
  rm -f "$paths"
  [ -z "$library" ] || try cat "$(dirname "$library")/ptxas.log"
  try "$PYTHON" -m relpos_cuda info
}

step_probe() {
  try "$PYTHON" -m benchmarks.gpu_probe probe
}

step_tests() {
  local options=() name
  for name in $CPU_TESTS attention_sm90; do options+=(--ignore="tests/test_$name.py"); done
  # shellcheck disable=SC2086  # several arguments
  run_tests tests "${options[@]}" --ignore=tests/integrations -k "(cuda or gpu or threads_launch) and not emulated" \
    --durations=15 ${TEST_ARGS:-} tests
}

step_wgmma() { # by itself: an instruction that a GPU refuses ends all that its process has there
  run_tests wgmma -k "not emulated" tests/test_attention_sm90.py
}

run_tests() { # NAME OPTION...
  local options=(--junitxml="$OUT/$1.xml" -p no:cacheprovider -v -rfE)
  shift
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    options+=(-n 8)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
    # A kernel that hangs must take no other test with it. Without workers, it would be all.
    if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then options+=(--timeout=60 --timeout-method=thread); fi
  fi
  # Interrupted in time, pytest tells what it has found so far.
  try timeout --foreground -s INT -k 10 $((LIMIT > 30 ? LIMIT - 15 : LIMIT)) "$PYTHON" -m pytest "${options[@]}" "$@"
}

step_bench() {
  # shellcheck disable=SC2086  # several arguments
  try "$PYTHON" -m relpos_cuda bench --device cuda --ops logits attention --mma-sync --out "$OUT" ${BENCH_ARGS:-}
}

step_profile() {
  profile profile 0 logits attention
  profile profile_sm90 1 attention
}

profile() { # NAME RELPOS_CUDA_WGMMA OP...
  local name=$1 wgmma=$2 section options=(--clock-control none --profile-from-start off)
  shift 2
  for section in SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis SchedulerStats WarpStateStats LaunchStats \
    Occupancy SourceCounters; do options+=(--section "$section"); done
  options+=(--kernel-name 'regex:logits_|attention_|table_' --force-overwrite --export "$OUT/$name")
  RELPOS_CUDA_WGMMA=$wgmma try ncu "${options[@]}" "$PYTHON" -m benchmarks.gpu_probe layers "$@" || return
  ncu --import "$OUT/$name.ncu-rep" --csv --page raw >"$OUT/$name.csv"
  try "$PYTHON" -m benchmarks.gpu_probe table "$OUT/$name.csv"
  try ncu --import "$OUT/$name.ncu-rep" --page details
  ncu --import "$OUT/$name.ncu-rep" --page source --csv | gzip >"$OUT/$name.source.csv.gz" # where warps waited
}

step_sanitize() {
  # Without the cache every tensor is an allocation of its own, and a write past its end is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  RELPOS_CUDA_WGMMA=1 try compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_probe tiny
  local tool
  for tool in memcheck racecheck; do
    try compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" -m benchmarks.gpu_probe tiny
  done
}

# ---- summary.json: the rows of this run, and of an earlier one into the same folder

write_summary() { # [STEP EXIT SECONDS LIMIT]
  "$PYTHON" - "$OUT/summary.json" "$COMMIT" "$DEVICE" "$DRIVER" "$TORCH" "$@" <<'PY'
import json, os, sys, time

path, commit, device, driver, torch, *row = sys.argv[1:]
described = {"commit": commit, "device": device, "driver": driver, "torch": torch}
try:
    with open(path) as file:
        old = json.load(file)
except (OSError, ValueError):
    old = {}
steps = old.get("steps", []) if all(old.get(key) == value for key, value in described.items()) else []
if row:
    new = {"step": row[0], "exit": int(row[1]), "seconds": int(row[2]), "limit": int(row[3])}
    new["timed_out"] = new["exit"] in (124, 137)
    steps = [step for step in steps if step["step"] != row[0]] + [new]
with open(path + ".tmp", "w") as file:
    json.dump({"date": time.strftime("%Y-%m-%d"), **described, "steps": steps}, file, indent=1)
    file.write("\n")
os.replace(path + ".tmp", path)
PY
}

# ---- all of them

run_step() { # sets `code`
  local step=$1 start=$SECONDS limit log size pid shown
  limit=$(limit_of "$step")
  if [ -n "${BUDGET:-}" ] && [ $((BUDGET - SECONDS)) -lt "$limit" ]; then limit=$((BUDGET - SECONDS)); fi
  log=$(log_of "$step")
  printf '\n===== %s, at most %s s\n' "$step" "$limit" | tee -a "$log"
  if [ "$limit" -le 0 ]; then
    echo "not run: BUDGET is spent" | tee -a "$log"
    code=124
  else
    size=$(wc -c <"$log")
    LIMIT=$limit timeout --kill-after=10 "$limit" "$BASH" "$SELF" --inside "$step" >>"$log" 2>&1 </dev/null &
    pid=$!
    tail -c +$((size + 1)) -s 0.2 -f --pid=$pid "$log" &
    shown=$!
    # shellcheck disable=SC2064  # these two
    trap "kill $pid $shown 2>/dev/null; wait $pid; exit 130" INT TERM
    wait $pid
    code=$?
    wait $shown
    trap - INT TERM
  fi
  echo "===== $step: exit code $code, $((SECONDS - start)) s" | tee -a "$log"
  write_summary "$step" "$code" $((SECONDS - start)) "$limit"
  [ -z "${ARCHIVE:-}" ] || { tar -czf "$ARCHIVE.new" -C "$OUT" . && mv "$ARCHIVE.new" "$ARCHIVE"; }
}

watch_clocks() { # until this script ends
  local what=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active
  nvidia-smi --query-gpu=$what --format=csv --loop-ms=500 >"$OUT/clocks.csv" 2>&1 </dev/null &
  # shellcheck disable=SC2064  # this one
  trap "kill $! 2>/dev/null" EXIT
}

SELF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
ROOT=$(dirname "$(dirname "$SELF")")

case ${1:-} in
  --inside) # a step, in the process that run_step started
    cd "$ROOT" || exit 1
    "step_$2"
    exit $worst
    ;;
  --list)
    for step in $STEPS; do printf '%-9s at most %s s\n' "$step" "$(limit_of "$step")"; done
    exit 0
    ;;
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$SELF"
    exit 0
    ;;
esac

for wanted in "$@"; do
  case " $STEPS " in
    *" $wanted "*) ;;
    *)
      echo "no step is called '$wanted'; there are: $STEPS" >&2
      exit 2
      ;;
  esac
done

GPU=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
if [[ $GPU != *,* ]]; then
  echo "no NVIDIA GPU: nvidia-smi is missing or shows none; nothing was run" >&2
  exit 2
fi
DEVICE=${GPU%,*}
DRIVER=${GPU##*, }

export PYTHON=${PYTHON:-python3}
case $PYTHON in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;; # steps run in the repository
esac
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TORCH_CUDA_ARCH_LIST=native # images set long lists; here only this GPU counts
if ! TORCH=$("$PYTHON" -c 'import torch; print(torch.__version__)' 2>/dev/null); then TORCH=unavailable; fi

if [ -z "${COMMIT:-}" ]; then
  COMMIT=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null) || COMMIT=unknown
  if [ "$COMMIT" != unknown ] && [ -n "$(git -C "$ROOT" status --porcelain -uno 2>/dev/null | head -n 1)" ]; then
    COMMIT=$COMMIT-dirty
  fi
fi
slug=$(echo "$DEVICE" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-*//; s/-*$//')
OUT=${OUT:-$ROOT/benchmarks/results/$slug/$(date +%Y-%m-%d)-$COMMIT}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
export OUT COMMIT

echo "$DEVICE, driver $DRIVER, torch $TORCH, commit $COMMIT; results in $OUT"
write_summary || exit 1
watch_clocks
failed=0
# shellcheck disable=SC2086  # several arguments
[ $# != 0 ] || set -- $STEPS
for step in "$@"; do
  run_step "$step"
  [ "$code" = 0 ] || failed=1
  [ "$step" != wgmma ] || [ "$code" = 0 ] || export RELPOS_CUDA_WGMMA=0
done
cat "$OUT/summary.json"
exit $failed
