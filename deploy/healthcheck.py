"""Exits 0 if the server on this machine is ready: GET /health, directly, without any proxy.

With TLS the certificate is not verified: it names the host that clients use, not 127.0.0.1.
"""

import http.client
import os
import ssl
import sys

PORT = int(os.environ.get("ADAPLEX_HTTP_PORT") or 9400)


def main() -> int:
    """Returns 0 if /health responds with 200, else 1 with the reason on standard error."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=4)
    if os.environ.get("ADAPLEX_TLS_CERT"):
        unverified = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", PORT, timeout=4, context=unverified)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError as error:
        print(f"no answer on port {PORT}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    print(f"/health: {status}", file=sys.stderr)
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
