#!/usr/bin/env bash
# bash run.sh [flags]       set up .venv and run steps 01 to 05; flags go to every step (--run, --seed, --offline, ...)
# bash run.sh --paper [..]  the paper's models and settings on a GPU of 80 GB, with a judge on it unless --base-url names one
# bash run.sh --check [..]  only the checks before that, and the hours and money it would take
# bash run.sh test [flags]  set up .venv and run the tests; flags go to pytest
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }

set_up() { # requirements file: install it into .venv unless that was done already
  local stamp=.venv/installed
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 must be 3.11 or newer" >&2; exit 2; }
  [ -x .venv/bin/python ] || python3 -m venv .venv
  if ! cat "$stamp" 2>/dev/null | grep -qx "$1 $(cat requirements*.txt | sha256sum | cut -c1-16)"; then
    say "installing $1 into .venv (once)"
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements-cpu.txt)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r "$1"
    echo "$1 $(cat requirements*.txt | sha256sum | cut -c1-16)" >>"$stamp"
  fi
}

if [ "${1:-}" = test ]; then
  shift
  set_up requirements-dev.txt
  exec .venv/bin/python -m pytest "$@"
fi

case " $* " in *" -h "* | *" --help "*) sed -n '2,5s/^# //p' "$0"; exit 0 ;; esac
paper=""
case "${1:-}" in --paper | --check) paper=$1; shift ;; esac
flags=("$@")
if [ -n "$paper" ]; then
  [[ " $* " =~ " --base-url"[\ =]|" --serve"[\ =] ]] || flags+=(--serve)
  if nvidia-smi -L >/dev/null 2>&1; then set_up requirements.txt; else set_up requirements-cpu.txt; fi
  say "is there what the paper run needs?"
  .venv/bin/python check.py "${flags[@]}"
  [ "$paper" = --paper ] || exit 0
elif [[ " $* " == *" --offline "* ]]; then
  say "--offline was given: the tiny model and the rule-based critic, on this machine alone"
  set_up requirements-cpu.txt
elif nvidia-smi -L >/dev/null 2>&1; then
  say "NVIDIA GPU found: the paper's models and settings (add --offline for the tiny default)"
  set_up requirements.txt
else
  say "no NVIDIA GPU found: --offline, the tiny model and the rule-based critic"
  set_up requirements-cpu.txt
  flags+=(--offline)
fi

step() { # script and its own flags; exit code 3 means done, with failures that the step has counted and named
  say "$*"
  .venv/bin/python "$@" "${flags[@]}" || { local code=$?; [ $code = 3 ] || exit $code; }
}

step 01_curate_preferences.py
step 02_train_rm.py
step 03_refine_judge.py
step 04_grpo.py --reward none
step 04_grpo.py --reward rm
step 04_grpo.py --reward judge
step 05_evaluate.py
