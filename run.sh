#!/usr/bin/env bash
# bash run.sh [flags]       set up .venv and run steps 01 to 05; flags go to every step (--run, --seed, --offline, ...)
#                           on a GPU with a judge beside them, unless --base-url names one or one answers on port 8000
# bash run.sh --small [..]  a pretrained model of half a billion parameters, on a CPU or a small GPU
# bash run.sh --paper [..]  the paper's settings on a GPU, checked first
# bash run.sh --check [..]  only the checks before that, and the hours and money it would take
# bash run.sh test [flags]  set up .venv and run the tests; flags go to pytest
set -euo pipefail
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID} # as nvidia-smi counts GPUs; by itself CUDA has the fastest first
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }

set_up() { # requirements file: install it into .venv, unless that was done and no requirement changed since
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 must be 3.11 or newer" >&2; exit 2; }
  [ -x .venv/bin/python ] || python3 -m venv .venv
  if ! cat requirements*.txt | cmp -s - ".venv/$1"; then
    say "installing $1 into .venv (once)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r "$1"
    cat requirements*.txt >".venv/$1"
  fi
}

flag() { # name, default: the value that the command line gives it
  local value=$2 previous="" word
  for word in ${flags[@]+"${flags[@]}"}; do
    [ "$previous" != "$1" ] || value=$word
    case $word in "$1="*) value=${word#*=} ;; esac
    previous=$word
  done
  echo "$value"
}

case " $* " in *" -h "* | *" --help "*) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
if [ "${1:-}" = test ]; then
  shift
  set_up requirements-dev.txt
  exec .venv/bin/python -m pytest "$@"
fi

mode="" flags=() # bash 3.2 calls an empty array unset: hence ${flags[@]+...} wherever it is used
for word in "$@"; do
  case $word in
    --paper | --check | --small) [ -z "$mode" ] || { echo "error: $mode or $word, not both" >&2; exit 2; }; mode=$word ;;
    *) flags+=("$word") ;;
  esac
done
set -- ${flags[@]+"${flags[@]}"}
needs=requirements-cpu.txt
case ${CUDA_VISIBLE_DEVICES-0} in
  "" | -1) ;; # no GPU is to be used
  *) if nvidia-smi -L >/dev/null 2>&1; then needs=requirements.txt; fi ;;
esac
policy="" writing="" grpo="" offline="" # flags of every step, of those that write, of step 04: what fits on the GPU
choose() {
  local lines judge
  lines=$(.venv/bin/python tools/check.py --choose "$@")
  { read -r policy && read -r writing && read -r grpo && read -r judge; } <<<"$lines"
  export JUDGE_MEMORY=${JUDGE_MEMORY:-$judge}
}
judge_around() { # one judge for all steps: this script once more, with a server around it, which then answers here
  [ -z "$(flag --base-url "")" ] || return 0
  if (exec 3<>/dev/tcp/127.0.0.1/8000) 2>/dev/null; then say "what answers on port 8000 is the judge"; return 0; fi
  PORT=8000 CONCURRENCY=$(flag --concurrency 64) exec bash tools/with_judge.sh \
    "$(flag --model Qwen/Qwen2.5-32B-Instruct-AWQ)" bash run.sh "$@"
}

some() { # every so many-th row of a file of data/, so that all occasions are there
  mkdir -p outputs
  awk "NR % $2 == 1" "data/$1.jsonl" >outputs/some.$$ && mv outputs/some.$$ "outputs/some_$1.jsonl"
  echo "outputs/some_$1.jsonl"
}
small() { # what step $1 takes with --small; docs/guide.md says why
  local writes="--engine hf --max-tokens 48" labels="--samples 4 --labels likelihood" sft="--sft-epochs 2 --sft-learning-rate 1e-4"
  if [ -z "$offline" ]; then # agents judge references too, from which SFT has to learn more gently than from its own texts
    labels="--samples 2 --candidates outputs/some_references.jsonl" sft="--sft-epochs 1 --sft-learning-rate 2e-5"
  fi
  case $1 in
    01*) echo "$writes --queries $(some references 9) --temperature 0.8 --max-copied 1 $labels" ;;
    02*) echo "--epochs 1 --learning-rate 1e-4 --batch-size 8 --accumulation 1 --max-length 256 --derived 1 --checks 2 --stress-size 12" ;;
    04*) echo "$writes $sft --sft-batch-size 8 --learning-rate 1e-4 --kl 0.01 --steps 20" \
      "--queries-per-step 4 --mini-batch 4 --samples 8 --micro-batch 8 --novelty 0.5 --save-every 1 --watch-every 10 --watch-queries 24" ;;
    05*) echo "$writes --queries $(some queries_heldout 4) --samples 1${offline:+ --search 6}" ;;
  esac
}

if [ "$mode" = --small ]; then
  say "--small: half a billion parameters, on this $([ $needs = requirements.txt ] && echo GPU || echo "CPU, for one to two hours if it computes in bf16, else for more")"
  set_up $needs
  [ -n "$(flag --policy "")" ] || flags+=(--policy Qwen/Qwen2.5-0.5B-Instruct)
  [ -n "$(flag --likelihood "")" ] || flags+=(--likelihood Qwen/Qwen2.5-1.5B-Instruct)
  [ -n "$(flag --base-url "")" ] || offline=yes
  [ -z "$offline" ] || flags+=(--offline)
  flags=(--run outputs/small --bits 16 ${flags[@]+"${flags[@]}"}) # what the command line gives comes later and wins
elif [ -n "$mode" ]; then
  set_up $needs
  say "does this machine have what the paper run needs?"
  .venv/bin/python tools/check.py "$@"
  [ "$mode" = --paper ] || exit 0
  choose "$@"
  judge_around "$@"
elif [[ " $* " == *" --offline "* ]]; then
  say "--offline was given: the tiny model and the rule-based critic, on this machine alone"
  set_up requirements-cpu.txt
elif [ $needs = requirements.txt ]; then
  say "NVIDIA GPU found: the paper's settings, with the largest models that fit (add --offline for the tiny model)"
  set_up $needs
  choose "$@"
  judge_around "$@"
else
  say "no NVIDIA GPU found: --offline, the tiny model and the rule-based critic"
  set_up $needs
  flags+=(--offline)
fi

step() { # script and its own flags; exit code 3 means done, with failures that the step has counted and named
  say "$*"
  local own=$policy
  case $1 in 01* | 05*) own+=" $writing" ;; 04*) own+=" $writing $grpo" ;; esac
  [ "$mode" != --small ] || own+=" $(small "$1")"
  # shellcheck disable=SC2086 # several words; flags of the command line come later and win
  .venv/bin/python "$@" $own ${flags[@]+"${flags[@]}"} || { local code=$?; [ $code = 3 ] || exit $code; }
}

step 01_curate_preferences.py
step 02_train_rm.py
step 03_refine_judge.py
step 04_grpo.py --reward none
step 04_grpo.py --reward rm
if [ "$mode" = --small ] && [ -n "$offline" ]; then
  step 04_grpo.py --reward likelihood # the rule-based critic is no judge of what a pretrained model writes
else
  step 04_grpo.py --reward judge
fi
step 05_evaluate.py
