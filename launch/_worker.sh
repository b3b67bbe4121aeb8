#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker: launch/_worker.sh setup [gs://BUCKET=/mnt/BUCKET] | run ARGUMENTS | stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$HOME/run.log pid=$HOME/run.pid code=$HOME/run.code

running() {
    [[ -f $pid ]] && kill -0 "$(cat "$pid")" 2>/dev/null
}

setup() {
    # The images' own Python is too old.
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --user --quiet uv
    [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.11 .venv
    uv pip install --quiet --python .venv/bin/python --constraint constraints/py3.11.txt --editable '.[tpu,prep]'
    if (($#)); then
        bash launch/_mount.sh --install "$@"
    fi
    echo "$(hostname): ready"
}

# The run itself, which `run` starts in the background.
child() {
    local status
    export PYTHONUNBUFFERED=1
    "${PYTHON:-.venv/bin/python}" -m biomass_jax.main "$@" &
    trap 'kill -TERM $!' TERM
    echo $$ >"$pid"
    # A signal ends the waiting, not the run.
    while :; do
        status=0
        wait $! || status=$?
        kill -0 $! 2>/dev/null || break
    done
    echo "$status" >"$code"
}

# The run outlives a lost connection: it writes into a file, which is followed from here.
run() {
    if running; then
        echo "$(hostname): it runs; following its log"
    else
        rm -f "$code" "$pid"
        setsid nohup bash launch/_worker.sh child "$@" >"$log" 2>&1 </dev/null &
        until [[ -f $code ]] || running; do sleep 0.2; done
    fi
    tail -n +1 -f "--pid=$(cat "$pid")" "$log"
    if [[ ! -f $code ]]; then
        echo "$(hostname): the run was killed"
        return 1
    fi
    echo "$(hostname): the run ended with exit code $(cat "$code")"
    return "$(cat "$code")"
}

stop() {
    if running; then
        kill -TERM "$(cat "$pid")"
        tail -n 0 -f "--pid=$(cat "$pid")" "$log"
        echo "$(hostname): ended with exit code $(cat "$code" 2>/dev/null || echo unknown)"
    else
        echo "$(hostname): no run"
    fi
}

action=$1
shift
case $action in
    setup | run | child | stop) "$action" "$@" ;;
    *) echo "launch/_worker.sh: unknown action $action" >&2 && exit 2 ;;
esac
