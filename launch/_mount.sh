#!/usr/bin/env bash
# Mounts buckets: launch/_mount.sh gs://BUCKET=/mnt/BUCKET [s3://OTHER=/mnt/OTHER ...]
# One that is mounted already is left as it is. Processes of a machine may call it at once.
set -euo pipefail

install_gcsfuse() {
    local release
    release=$(lsb_release -cs)
    echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-$release main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
}

if [[ ${1:-} == --install ]]; then
    shift
    command -v gcsfuse >/dev/null || install_gcsfuse
fi

for pair in "$@"; do
    address=${pair%%=*}
    folder=${pair#*=}
    scheme=${address%%://*}
    bucket=${address#*://}
    if [[ $pair != ?*://?*=/?* || $bucket == */* ]]; then
        echo "$0: '$pair'; expected gs://BUCKET=/FOLDER or s3://BUCKET=/FOLDER" >&2
        exit 2
    fi
    case $scheme in
        # A flat bucket has no folders to rename: the limit lets gcsfuse move a finished checkpoint's files one by one.
        gs) mount=(gcsfuse --implicit-dirs --rename-dir-limit=100000) ;;
        s3) mount=(mount-s3 --allow-delete --allow-overwrite) ;;
        *)
            echo "$0: '$pair'; only gs:// and s3:// can be mounted" >&2
            exit 2
            ;;
    esac
    if ! command -v "${mount[0]}" >/dev/null; then
        echo "$0: ${mount[0]} is not installed; launch/README.md, 'Buckets', says where it comes from" >&2
        exit 1
    fi
    mkdir -p "$folder" 2>/dev/null || { sudo mkdir -p "$folder" && sudo chown "$(id -u)" "$folder"; }
    (
        flock 9
        mountpoint -q "$folder" || "${mount[@]}" "$bucket" "$folder" 9>&-
    ) 9>"/tmp/.mount_$(id -u)_${folder//\//_}"
done
