#!/usr/bin/env bash
# Makes the cluster, a certificate and two databases at the first start, then becomes the server.
#
# Each service gets the address of its own database, with a password made here, in a volume that only it mounts beside this
# one. An address that is missing, because a first start was interrupted or a volume was lost, is made anew with a new password.
set -euo pipefail
umask 077

cluster=/state/data
handouts=/handouts

single() { # run SQL, one statement a line, without a server that anybody could reach
    # A failing statement may hold a password: it is not logged.
    postgres --single -D "$cluster" -c log_min_error_statement=panic -c exit_on_error=on "$1" >/dev/null
}

# Whole or not at all: what an interrupted first start left is thrown away.
if [ ! -d "$cluster" ]; then
    rm -rf "$cluster.new"
    initdb --pgdata "$cluster.new" --username medhive --auth-local peer --auth-host scram-sha-256 --encoding UTF8 \
        --locale C.UTF-8 --data-checksums >/dev/null
    # Certificate of a name on an internal network, trusted through the hand-out alone; it ends with the cluster.
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj /CN=postgres \
        -addext subjectAltName=DNS:postgres -keyout "$cluster.new/server.key" -out "$cluster.new/server.crt" 2>/dev/null
    printf '%s\n' 'local all medhive peer' 'hostssl gateway gateway all scram-sha-256' \
        'hostssl mlflow mlflow all scram-sha-256' > "$cluster.new/pg_hba.conf"
    sync
    mv "$cluster.new" "$cluster"
fi

for service in gateway mlflow; do
    url=$handouts/$service/url
    if [ ! -s "$url" ]; then
        password=$(openssl rand -hex 32)
        install -m 600 "$cluster/server.crt" "$handouts/$service/postgres.crt"
        printf 'postgresql://%s:%s@postgres:5432/%s?sslmode=verify-full&sslrootcert=/database/postgres.crt\n' \
            "$service" "$password" "$service" > "$url.part"
        if ! printf 'SELECT rolname FROM pg_roles;\n' | postgres --single -D "$cluster" postgres | grep -q "\"$service\""; then
            printf 'CREATE ROLE %s LOGIN;\n' "$service" | single postgres
        fi
        if ! printf 'SELECT datname FROM pg_database;\n' | postgres --single -D "$cluster" postgres | grep -q "\"$service\""; then
            printf 'CREATE DATABASE %s OWNER %s;\n' "$service" "$service" | single postgres
        fi
        printf "ALTER ROLE %s PASSWORD '%s';\nREVOKE ALL ON DATABASE %s FROM PUBLIC;\n" \
            "$service" "$password" "$service" | single postgres
        sync
        mv "$url.part" "$url"
    fi
done

# Two gateways' pools and MLflow's fit into the connections; the sizes suit the memory that compose gives.
exec postgres -D "$cluster" -c listen_addresses='*' -c unix_socket_directories=/tmp -c ssl=on \
    -c max_connections=200 -c shared_buffers=64MB -c log_timezone=UTC
