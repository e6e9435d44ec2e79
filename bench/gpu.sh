#!/usr/bin/env bash
# bash bench/gpu.sh          the first hour on a GPU: every part below, one after the other
# bash bench/gpu.sh PART     one of them, in at most 9 minutes
#
#   engine   the engine's tests                                    needs vLLM
#   bf16, fp32, sleep, original   the gap of engine and trainer, a row each   needs vLLM
#   memory   the memory of steps 02 and 04 beside the plan, and seconds of a step by phase: random 7B weights
#   step     an update of step 04 beside TRL's stock trainer
#   sweep    learning rates: KL to the reference, reward, gap after 20 updates
#
# Each part prints its table and writes JSON into outputs/bench_gpu/. What it lacks here, a GPU or vLLM, it says in one
# line and ends with 0. PYTHON= names another interpreter than .venv's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
out=outputs/bench_gpu
mkdir -p "$out"
limit="" # a Mac has no `timeout`
if command -v timeout >/dev/null; then limit="timeout --signal=INT --kill-after=20 540"; fi

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }
has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

bench() { # what it runs, with its limit; its table goes to the screen and beside its JSON
  local code=0
  # shellcheck disable=SC2086 # several words, or none
  $limit "$python" "$@" 2>&1 | tee "$out/$part.txt" || code=$?
  [ $code != 124 ] || echo "$part: not done in 9 minutes; what it has made is kept, so run it once more"
  return $code
}

run_part() {
  local code=0
  part=$1
  printf '\n== %s\n' "$part"
  case $part in
    engine)
      has vllm || { echo "vLLM is not installed here; pip install -r requirements.txt"; return 0; }
      has pytest || { echo "the tests need more; pip install -r requirements-dev.txt"; return 0; }
      has_gpu || echo "no GPU here: this tests vLLM's CPU build, whose code is partly another"
      bench -m pytest -q -n 0 -p no:cacheprovider tests/test_engine.py --durations 0 || code=$?
      "$python" -c 'import json, sys; print(json.dumps({"exit_code": int(sys.argv[1]), "said": sys.stdin.read()}))' \
        "$code" <"$out/engine.txt" >"$out/engine.json"
      return "$code"
      ;;
    bf16 | fp32 | sleep | original) bench bench/gap.py --out "$out" --row "$part" ;;
    memory) bench bench/memory.py --out "$out" ;;
    step | sweep)
      [ -f bench/step.py ] || { echo "$part: bench/step.py is not here"; return 0; }
      if [ "$part" = sweep ]; then bench bench/step.py --sweep; else bench bench/step.py; fi
      ;;
    *)
      sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
}

if [ $# -gt 0 ]; then
  run_part "$1"
else
  failed=""
  for part in engine bf16 fp32 sleep original memory step sweep; do run_part "$part" || failed="$failed $part"; done
  [ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
fi
