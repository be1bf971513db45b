#!/usr/bin/env bash
# images-save.sh DIR: the images as files, for `docker load` where no registry is reached, with their SHA-256.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"name a folder: make images-save DIR=..."}
tag=${MEDHIVE_TAG:-0.1.0}

save() { # IMAGE FILE: whole or not at all
    docker image inspect "$1" >/dev/null 2>&1 || { echo "error: there is no image $1; make it with: make images" >&2; exit 1; }
    docker save "$1" | gzip -1 > "$folder/$2.part"
    mv "$folder/$2.part" "$folder/$2"
    echo "$folder/$2"
}

mkdir -p "$folder"
trap 'rm -f "$folder"/*.part' EXIT
# By itself, since it is all that a hospital needs.
save "${MEDHIVE_SITE_IMAGE:-fl-client}" fl-client.tar.gz
for name in api-gateway fl-server mlflow proxy; do save "medhive/$name:$tag" "$name-$tag.tar.gz"; done
if docker image inspect "medhive/postgres:$tag" >/dev/null 2>&1; then save "medhive/postgres:$tag" "postgres-$tag.tar.gz"; fi
(cd "$folder" && sha256sum -- *.tar.gz > SHA256SUMS.part && mv SHA256SUMS.part SHA256SUMS)
