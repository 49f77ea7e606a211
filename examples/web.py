"""A web application on the index of index.py: a WSGI app for any server, or `python web.py [PORT]` and `GET /?word=fox`.

One client serves all threads and forked workers, and starts the daemon if it is absent. Unlike the daemon, the port has no
authentication: any user of this machine can use it.
"""

import json
import os
import sys
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIServer, make_server

from harness_ipc import Busy, Client, DaemonTimeout, HarnessIPCError, InvalidParams

STATUS = {InvalidParams: "400 Bad Request", Busy: "503 Service Unavailable", DaemonTimeout: "504 Gateway Timeout"}

index = Client("index", start=[sys.executable, os.path.join(os.path.dirname(__file__), "index.py"), "--serve"])


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    try:
        status, answer = "200 OK", index.call("search", dict(parse_qsl(environ["QUERY_STRING"])), timeout=5)
    except HarnessIPCError as error:
        status, answer = STATUS.get(type(error), "500 Internal Server Error"), {"error": str(error)}
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


if __name__ == "__main__":
    with make_server("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8000, app, Server) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
