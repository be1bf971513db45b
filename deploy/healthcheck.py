"""Exit 0 when a service of this container answers over TLS: `healthcheck.py URL CA_FILE`."""

import ssl
import sys
import urllib.request

TIMEOUT_S = 5

if __name__ == "__main__":
    context = ssl.create_default_context(cafile=sys.argv[2])
    urllib.request.urlopen(sys.argv[1], timeout=TIMEOUT_S, context=context).close()  # noqa: S310 - the address is the image's own
