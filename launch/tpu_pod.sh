#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, from creating the slice to deleting it. launch/README.md has an example.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/tpu_pod.sh --name NAME --zone ZONE [options] ACTION [arguments of the run]

  create  ask for the slice as a queued resource and wait for it; a slice of this name that is there is taken
  sync    copy what is committed in the checkout to all workers, install, mount the bucket
  run     python -m biomass_jax.main with the arguments, on all workers; again while it runs: follow its log
  stop    SIGTERM: the run saves and ends with 75; run again to resume
  delete  give the slice back
  all     create, sync, run

  --type TYPE         of the slice, such as v5litepod-64 or v6e-32 (create)
  --version VERSION   of its software, such as v2-alpha-tpuv5-lite or v2-alpha-tpuv6e (create)
  --project PROJECT   else gcloud's own
  --bucket gs://NAME  mounted as /mnt/NAME on every worker (sync)
  --spot              cheaper, may be taken away (create)
  --dry-run           print the commands, run none
TEXT
}

fail() {
    echo "launch/tpu_pod.sh: $*" >&2
    exit 2
}

name='' zone='' type='' version='' project='' bucket='' spot='' dry_run=''
while (($#)); do
    case $1 in
        --name | --zone | --type | --version | --project | --bucket)
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --spot) spot=yes && shift ;;
        --dry-run) dry_run=yes && shift ;;
        --help | -h) usage && exit 0 ;;
        -*) fail "unknown option $1; --help lists them" ;;
        *) break ;;
    esac
done
action=${1:-}
[[ -n $action ]] || { usage >&2 && exit 2; }
shift
[[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
[[ -z $bucket || $bucket =~ ^gs://[^/]+$ ]] || fail "--bucket is '$bucket'; expected gs://NAME"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus)
place=("--zone=$zone" ${project:+"--project=$project"})

call() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_all() {
    call "${tpu[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all "--command=$1"
}

state() {
    "${tpu[@]}" queued-resources describe "$name" "${place[@]}" '--format=value(state.state)' 2>/dev/null || true
}

create() {
    local now=''
    [[ $dry_run ]] || now=$(state)
    if [[ -z $now ]]; then
        [[ -n $type && -n $version ]] || fail "there is no slice $name in $zone; --type and --version are needed to create it"
        call "${tpu[@]}" queued-resources create "$name" "${place[@]}" "--node-id=$name" "--accelerator-type=$type" \
            "--runtime-version=$version" ${spot:+--spot}
    fi
    if [[ $dry_run ]]; then
        echo "# wait until ${tpu[*]} queued-resources describe $name ${place[*]} says ACTIVE"
        return
    fi
    until now=$(state) && [[ $now == ACTIVE ]]; do
        case $now in
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                fail "the queued resource $name is $now; delete it and create it again"
                ;;
        esac
        echo "$(date +%T) $name: ${now:-not known yet}"
        sleep 30
    done
}

sync() {
    local archive=biomass_jax.tar.gz
    call mkdir -p "$root/.cache"
    call git -C "$root" archive --format=tar.gz "--output=$root/.cache/$archive" HEAD
    call "${tpu[@]}" tpu-vm scp "$root/.cache/$archive" "$name:$archive" "${place[@]}" --worker=all
    on_all "mkdir -p biomass_jax && tar -xzf $archive -C biomass_jax && bash biomass_jax/launch/_worker.sh setup ${bucket:+$bucket=/mnt/${bucket#gs://}}"
}

run() {
    local words=''
    (($#)) || fail "run needs the run's arguments, --config and --workdir"
    printf -v words ' %q' "$@"
    on_all "bash biomass_jax/launch/_worker.sh run$words"
}

case $action in
    create) create ;;
    sync) sync ;;
    run) run "$@" ;;
    stop) on_all "bash biomass_jax/launch/_worker.sh stop" ;;
    delete) call "${tpu[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet ;;
    all)
        (($#)) || fail "all needs the run's arguments, --config and --workdir"
        create
        sync
        run "$@"
        ;;
    *) fail "unknown action $action; --help lists them" ;;
esac
