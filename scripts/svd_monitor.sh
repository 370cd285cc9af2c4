#!/usr/bin/env bash
# Terminal 2 of 2: watch the newest run, or the one named; waits for it to begin.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/svd_monitor.sh [--wait SECONDS] [RUN_DIR] [flags of svd-monitor]

Waits (at most 600 s) until the run has written its first record, then shows it live. Without RUN_DIR: the newest run
under runs/. Flags of svd-monitor: svd-monitor --help, or docs/MONITORING.md.
TEXT
}

wait_s=600
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --wait) wait_s="${2:-}"; shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
case "$wait_s" in '' | *[!0-9]*) echo "svd_monitor: --wait takes a number of seconds" >&2; exit 3 ;; esac

here=$(pwd)
cd "$(dirname "$0")/.."
run=runs
if [ ${#arguments[@]} -gt 0 ]; then
    case "${arguments[0]}" in
        wandb:* | -*) run="" ;;
        /*) run="${arguments[0]}" ;;
        *) [ -e "$here/${arguments[0]}" ] && run="$here/${arguments[0]}" || run="${arguments[0]}"; arguments[0]="$run" ;;
    esac
fi

if python3 -c 'import rich' 2>/dev/null; then python=python3; else python=.venv/bin/python; fi
command -v "$python" >/dev/null || { echo "svd_monitor: no environment yet; bash scripts/quickstart.sh makes one" >&2; exit 3; }
case "${LC_ALL:-${LC_CTYPE:-${LANG:-}}}" in *[Uu][Tt][Ff]*) ;; *) arguments+=(--ascii) ;; esac

began=$SECONDS told=0
has_run() {
    local log
    for log in "$run" "$run"/metrics.jsonl "$run"/*/metrics.jsonl; do
        [ -f "$log" ] && return 0
    done
    return 1
}
while [ -n "$run" ] && ! has_run; do
    if [ $((SECONDS - began)) -ge "$wait_s" ]; then
        echo "svd_monitor: no run in $run after $wait_s s" >&2
        exit 3
    fi
    [ "$told" = 0 ] && echo "waiting for the first record in $run (Ctrl-C stops)" && told=1
    sleep 1
done
exec "$python" -m svdtrain.monitor.cli ${arguments[@]+"${arguments[@]}"}
