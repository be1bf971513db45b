#!/usr/bin/env bash
# backup.sh create FILE | restore FILE: all that the coordinator's containers know, in one file (docs/deployment.md).
# COMPOSE_FILE and COMPOSE_PROJECT_NAME say which coordinator, as for every `docker compose`.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 077

command=$1
file=${2:?"name the file: make $command FILE=..."}

fail() { echo "error: $*" >&2; exit 1; }

# The tool of the gateway's image, with every volume and without a network.
tool() { docker compose --profile backup run --rm --no-deps -T "$@"; }

create() {
    [ ! -e "$file" ] || fail "$file is there already; name another file."
    stopped=$(docker compose ps --quiet --status running)
    # Also when the disk is full or somebody interrupts: the coordinator goes on.
    trap 'rm -f "$file.part"; [ -z "$stopped" ] || docker start $stopped >/dev/null' EXIT
    [ -z "$stopped" ] || docker compose stop >&2
    tool backup create > "$file.part"
    [ -z "$stopped" ] || docker start $stopped >/dev/null
    stopped=
    tool backup verify < "$file.part"
    sync "$file.part"
    ln "$file.part" "$file"
    echo "wrote $file ($(stat -c %s "$file" 2>/dev/null || stat -f %z "$file") bytes). It holds private keys: keep it as you keep those."
}

restore() {
    [ -r "$file" ] || fail "$file cannot be read."
    [ -z "$(docker compose ps --quiet --status running)" ] || fail "the coordinator runs: restore goes into a new one."
    # Makes the volumes, as their services need them.
    docker compose create >&2
    tool backup verify < "$file"
    tool restore restore < "$file"
    echo "restored; start it with: docker compose up -d"
}

case $command in
    create | restore) "$command" ;;
    *) fail "create or restore, not $command" ;;
esac
