#!/usr/bin/env bash
# bash tools/with_judge.sh MODEL COMMAND...
#
# Serves MODEL with vLLM on this machine while COMMAND runs, and exits with COMMAND's exit code. One server for as many
# steps as COMMAND has, since a 32B judge takes minutes to load. If it dies it is restarted, 3 times at most; the steps
# wait for it (--wait). It never outlives COMMAND, a Ctrl-C, an error, or a kill -9 of this script.
#
#   PORT=8000         of 127.0.0.1; the steps ask it with --base-url http://127.0.0.1:8000/v1
#   JUDGE_MEMORY=30   GiB of the first GPU; without a GPU, vLLM's CPU build is expected
#   CONCURRENCY=64    requests answered at once; give the steps the same --concurrency
#   JUDGE_FLAGS=      more flags for vLLM, such as "--max-model-len 8192"; on a CPU that, if more, takes
#                     "--max-num-batched-tokens" of the same number too
#   JUDGE_LOG=        where vLLM's output goes (outputs/judge.log)
#   PYTHON=           the interpreter that has vLLM (.venv/bin/python, else python3)
#
# Example: bash tools/with_judge.sh Qwen/Qwen2.5-32B-Instruct-AWQ bash run.sh
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
port=${PORT:-8000}
log=${JUDGE_LOG:-$root/outputs/judge.log}
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
server="" job="" # the server's and COMMAND's process groups, which are also their leaders' numbers

fail() {
  echo "error: $*" >&2
  exit 2
}

fail_with_log() { # what happened
  tail -n 20 "$log" >&2
  fail "the judge's server $1; the end of $log is above. Try less JUDGE_MEMORY, other JUDGE_FLAGS, another model," \
    "or a server elsewhere (--base-url)"
}

alive() { kill -0 -- "$1" 2>/dev/null; } # a process, or a whole group as -NUMBER

end() { # group, signal: send it, give the leader 30 seconds, and kill what is left
  kill "-$2" -- "-$1" 2>/dev/null || return 0
  for _ in {1..300}; do
    alive "$1" || break
    sleep 0.1
  done
  kill -KILL -- "-$1" 2>/dev/null || true
}

guard() { # group: end it once this script is gone, since a script that gets kill -9 cannot do so itself
  {
    # `kill -0` also reaches a zombie, which this script is until its parent asks for its exit code.
    while alive "-$1" && alive $$ && [[ $(ps -o stat= -p $$ 2>/dev/null) != Z* ]]; do sleep 1; done
    end "$1" TERM
  } </dev/null >/dev/null 2>&1 &
}

start_server() {
  local gpu=${CUDA_VISIBLE_DEVICES:-0} mib
  if mib=$(nvidia-smi -i "${gpu%%,*}" --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null); then
    set -- --gpu-memory-utilization "$(awk "BEGIN { printf \"%.3f\", ${JUDGE_MEMORY:-30} * 1024 / $mib }")"
  else
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    # Chunked prefill is off: the CPU build cannot rewind a seeded generator after a part of a prompt, and dies.
    set -- --enforce-eager --dtype bfloat16 --no-enable-chunked-prefill --max-num-batched-tokens 8192
  fi
  set -m # a process group for each job, so that a Ctrl-C reaches this script alone, which ends them in order
  (
    unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT # a launcher's; vLLM would take them for its own
    # --generation-config vllm: Qwen's own configuration has a repetition penalty, which shifts the verdict's digit.
    # disable_any_whitespace: a model may otherwise pad its JSON with blanks until the answer is cut off.
    # shellcheck disable=SC2086 # JUDGE_FLAGS holds several words
    exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "$port" \
      --generation-config vllm --max-model-len 4096 --max-num-seqs "${CONCURRENCY:-64}" \
      --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' "$@" ${JUDGE_FLAGS:-}
  ) </dev/null >>"$log" 2>&1 &
  server=$!
  guard "$server"
  set +m
}

healthy() { # in Python, because it is there anyway; without the proxies that the environment may name
  "$python" -c "import urllib.request as u
u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:$port/health', timeout=5)" 2>/dev/null
}

# shellcheck disable=SC2329 # the traps below call it
leave() { # exit code, signal for COMMAND
  trap - EXIT
  trap '' INT TERM HUP
  [ -z "$job" ] || end "$job" "$2"
  [ -z "$server" ] || end "$server" TERM
  exit "$1"
}
trap 'leave 130 INT' INT
trap 'leave 143 TERM' TERM
trap 'leave 129 HUP' HUP
trap 'leave $? TERM' EXIT

if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  fail "something answers on port $port already; use it with --base-url http://127.0.0.1:$port/v1, or set PORT"
fi
mkdir -p "$(dirname "$log")"
echo "starting $model on port $port; its log is $log" >&2
start_server
until healthy; do
  alive "$server" || fail_with_log "did not start"
  [ "$SECONDS" -lt 3600 ] || fail_with_log "is not ready after an hour"
  sleep 1
done

set -m
"$@" &
job=$!
guard "$job"
set +m

deaths=0
while alive "$job"; do
  if ! alive "$server"; then
    deaths=$((deaths + 1))
    [ $deaths -le 3 ] || fail_with_log "died $deaths times"
    echo "the judge's server died and is restarted; its log is $log" >&2
    end "$server" KILL # its workers, which may outlive it
    start_server
  fi
  sleep 1
done
wait "$job" # its exit code is this script's
