#!/usr/bin/env bash
# Runs nginx with the services' present addresses and certificates, and lets it take new ones without a restart.
#
# nginx looks names up once, at its start, and refuses to start on one that does not exist. So the addresses are looked up
# here: a service that is away is "down" in the configuration until it is back, and the others are served.
set -euo pipefail

GATEWAY_ADDRESS=${GATEWAY_ADDRESS:-gateway:8000}
FLEET_ADDRESS=${FLEET_ADDRESS:-fl-server:9093}
MLFLOW_ADDRESS=${MLFLOW_ADDRESS:-mlflow:5000}
MLFLOW_METRICS_ADDRESS=${MLFLOW_METRICS_ADDRESS:-${MLFLOW_ADDRESS%:*}:9464}
CERTIFICATE=${TLS_CERT_FILE:-/handout/proxy.crt}
KEY=${TLS_KEY_FILE:-/handout/proxy.key}
LOOK_S=2
CONFIGURATION=/tmp/nginx.conf

unreadable() { # the first file that cannot be read
    local file
    for file in "$CERTIFICATE" "$KEY" /handout/proxy.crt /handout/proxy.key /handout/ca.crt /handout/mlflow-reader; do
        if [ ! -r "$file" ]; then
            echo "$file"
            return
        fi
    done
}

file=$(unreadable)
if [ -n "$file" ]; then
    echo "error: cannot read $file; the gateway makes it at its first start, TLS_CERT_FILE and TLS_KEY_FILE name your own." >&2
    exit 1
fi

upstream() { # NAME:PORT -> ADDRESS:PORT, or a place where nobody answers
    local address
    address=$(getent ahostsv4 "${1%:*}" | awk 'NR == 1 {print $1}') || true
    if [ -n "$address" ]; then echo "$address:${1##*:}"; else echo "127.0.0.1:1"; fi
}

write_configuration() {
    local reader
    reader=$(printf 'reader:%s' "$(cat /handout/mlflow-reader)" | base64 -w0)
    (umask 077 && sed -e "s|@GATEWAY@|$(upstream "$GATEWAY_ADDRESS")|" -e "s|@FLEET@|$(upstream "$FLEET_ADDRESS")|" \
        -e "s|@MLFLOW@|$(upstream "$MLFLOW_ADDRESS")|" \
        -e "s|@MLFLOW_METRICS@|$(upstream "$MLFLOW_METRICS_ADDRESS")|" -e "s|@CERTIFICATE@|$CERTIFICATE|" -e "s|@KEY@|$KEY|" \
        -e "s|@READER@|$reader|g" /opt/medhive/nginx.conf.in >"$CONFIGURATION.new")
    mv "$CONFIGURATION.new" "$CONFIGURATION"
}

state() {
    sha256sum "$CONFIGURATION" "$CERTIFICATE" "$KEY" /handout/proxy.crt /handout/ca.crt | sha256sum
}

write_configuration
if ! nginx -e stderr -t -q -c "$CONFIGURATION"; then
    echo "error: nginx does not start with $CERTIFICATE and $KEY (above is why); TLS_CERT_FILE and TLS_KEY_FILE name your own." >&2
    exit 1
fi
nginx -e stderr -c "$CONFIGURATION" &
nginx=$!
trap 'kill -TERM "$nginx"; wait "$nginx"; exit 0' TERM INT
echo "listening on 8443, MLflow on 8080"
served=$(state)
told=
while kill -0 "$nginx" 2>/dev/null; do
    sleep "$LOOK_S" &
    wait $! || true
    # A certificate that is just being replaced, or whose new files this user may not read, ends nothing.
    file=$(unreadable)
    if [ -n "$file" ] && [ "$file" != "$told" ]; then
        echo "error: cannot read $file; what was read before is shown until it can be read." >&2
    fi
    told=$file
    if [ -n "$file" ]; then continue; fi
    write_configuration
    found=$(state) || continue
    if [ "$found" != "$served" ]; then
        served=$found
        if nginx -e stderr -t -q -c "$CONFIGURATION"; then kill -HUP "$nginx"; fi
    fi
done
wait "$nginx"
