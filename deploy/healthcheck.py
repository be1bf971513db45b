"""Exit 0 when a service of this container answers well over TLS: `python -I -S healthcheck.py PORT PATH CA_FILE`.

An engine asks every few seconds, on a machine that has better things to do: only `ssl` is imported.
"""

import socket
import ssl
import sys

TIMEOUT_S = 5

if __name__ == "__main__":
    port, path, ca = sys.argv[1:]
    context = ssl.create_default_context(cafile=ca)
    plain = socket.create_connection(("127.0.0.1", int(port)), TIMEOUT_S)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        status = connection.recv(64).split(b" ")
    sys.exit(0 if status[1:2] == [b"200"] else 1)
