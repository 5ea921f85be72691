"""Exits 0 when the server on this machine takes work: GET /health, straight, past any proxy."""

import http.client
import os
import sys

PORT = int(os.environ.get("ADAPLEX_HTTP_PORT") or 9400)


def main() -> int:
    """0 if /health answers 200, else 1 with the reason on stderr."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=4)
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
