"""The pages of the browser's tests. ``127.0.0.1`` and ``localhost`` are two sites."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from harness_ipc.browser.helpers import goto_url, wait_for_load
from tests.support.processes import PATIENCE

FORM = """<!doctype html><title>A form</title>
<form onsubmit="document.title = 'sent ' + new FormData(this).get('word'); return false">
<input id=word name=word style="position:absolute;left:20px;top:20px;width:200px;height:30px">
<button id=send style="position:absolute;left:20px;top:80px;width:200px;height:40px">Send</button></form>
<div style="height:3000px;width:50px"></div>"""

DIALOG = """<!doctype html><title>Asks</title>
<style>button {position: absolute; left: 0; width: 100px; height: 50px}</style>
<button style="top:0" onclick="document.title = 'said ' + confirm('Sure?')">confirm</button>
<button style="top:60px" onclick="document.title = prompt('Who?', 'me')">prompt</button>
<button style="top:120px" onclick="alert('Look')">alert</button>"""

KEYS = """<!doctype html><title>Keys</title>
<textarea id=text style="position:absolute;left:0;top:0;width:300px;height:100px"></textarea>
<input id=next style="position:absolute;left:0;top:150px;width:300px;height:30px">
<script>const keys = [], clicks = [], modifiers = e => e.altKey + 2 * e.ctrlKey + 4 * e.metaKey + 8 * e.shiftKey;
for (const kind of ["keydown", "keyup"])
  addEventListener(kind, e => keys.push([e.type, e.key, e.code, e.keyCode, modifiers(e)]));
for (const kind of ["click", "dblclick", "contextmenu", "auxclick"])
  addEventListener(kind, e => clicks.push([e.type, e.button, e.clientX, e.clientY]))</script>"""

NOISE = """<!doctype html><title>Noise</title><canvas id=canvas width=2800 height=2800></canvas>
<script>const context = canvas.getContext("2d"), image = context.createImageData(2800, 2800), size = 65536;
for (let i = 0; i < image.data.length; i += size) crypto.getRandomValues(image.data.subarray(i, i + size));
for (let i = 3; i < image.data.length; i += 4) image.data[i] = 255;
context.putImageData(image, 0, 0)</script>"""

# It has scrollbars, and records its events.
TALL = """<!doctype html><title>Tall</title><style>body {margin: 0} body > div {height: 1000px}</style>
<div style="background: rgb(200, 0, 0); height: 100vh"></div><div style="background: rgb(0, 200, 0)"></div>
<div id=box style="overflow: auto; height: 100px; width: 50%"><div style="height: 500px"></div></div>
<div style="position: fixed; right: 0; top: 0; width: 9px; height: 9px; background: black"></div>
<script>const seen = [], root = document.documentElement;
for (const kind of ["scroll", "visibilitychange"]) addEventListener(kind, event => seen.push(event.type));
onresize = () => document.body.dataset.width = root.clientWidth;
onresize();
new ResizeObserver(() => seen.push("other size")).observe(document.body);
const layout = () => [scrollX, scrollY, innerWidth, innerHeight, devicePixelRatio, box.scrollTop,
  ...[root, document.body, box].flatMap(e => [e.scrollWidth, e.scrollHeight, e.clientWidth, e.clientHeight])];
</script>"""

# The Authorization header of the user "Ada" with the password "secret".
LOGIN = "Basic QWRhOnNlY3JldA=="

PAGES = {
    "/": "<!doctype html><title>Home</title><h1>Home</h1>",
    "/form": FORM,
    "/dialog": DIALOG,
    "/keys": KEYS,
    "/noise": NOISE,
    "/tall": TALL,
    # It has not loaded before its picture has.
    "/picture": "<!doctype html><title>Picture</title><img src=/slow-picture>",
    "/leave": "<!doctype html><title>Leave</title><input style='position:absolute;left:0;top:0;width:200px;height:40px'>"
    "<script>addEventListener('beforeunload', event => event.preventDefault())</script>",
    # One iframe of the same site and one of another site.
    "/frames": "<!doctype html><title>Frames</title><iframe id=near src=/inner?near></iframe><iframe id=far></iframe>"
    "<script>far.src = `http://localhost:${location.port}/inner?far`</script>",
    # Its form and its link lead to slow pages.
    "/start": "<!doctype html><title>Start</title><style>* {position: absolute; left: 0; height: 40px; width: 200px}</style>"
    "<form action=/slow-answer><input style='top: 0'><button style='top: 60px'>Send</button></form>"
    "<a href=/slow-link style='top: 120px'>Go</a><a href=/slow-tab target=_blank style='top: 180px'>Open</a>"
    "<a href='javascript:void 0' style='top: 240px'>Do nothing</a>",
    "/refresh": "<!doctype html><meta http-equiv=refresh content='0; url=/form'><title>Refresh</title>",
    "/inner": "<!doctype html><title>Inner</title><p id=here>inside</p>",
    "/strict": "<!doctype html><meta http-equiv=Content-Security-Policy content=\"default-src 'none'; script-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'\"><title>Strict</title>",
    "/many": "<!doctype html><title>Many</title><script>"
    "const all = document.createDocumentFragment();"
    "for (let i = 0; i < 100000; i++) all.append(document.createElement('i')); document.documentElement.append(all)</script>",
}


class LocalServer:
    """A local HTTP server at `url`. Waiting requests end when `release` is set, at the latest by `close`."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def serve(self, handler: type[BaseHTTPRequestHandler]) -> None:
        """Answer requests with `handler`, each in a thread."""
        # No access log in the output of the tests.
        handler.log_message = lambda *_: None  # type: ignore[method-assign]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class Site(LocalServer):
    """A server of `PAGES`. ``/slow…`` waits until `release` is set, ``/endless`` ends then, ``/private…`` requires a login.

    ``/empty`` has no content. `paths` are the requested paths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pages = dict(PAGES)
        self.paths: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                site.paths.append(path)
                if path == "/empty":
                    self.send_response(204)
                    self.end_headers()
                    return
                if path.startswith("/slow"):
                    site.release.wait()
                if path == "/endless":
                    self.send_response(200)
                    self.send_header("Content-Disposition", "attachment")
                    self.end_headers()
                    self.wfile.write(b"x" * 65536)
                    site.release.wait()
                    return
                page = site.pages.get(path, "<!doctype html><title>Late</title>" if path.startswith("/slow") else None)
                if path.startswith("/private"):
                    page = "<!doctype html><title>Private</title>" if self.headers["Authorization"] == LOGIN else None
                body = (page or "<!doctype html><title>Nothing here</title>").encode()
                if page is None and path.startswith("/private"):
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", f'Basic realm="{path}"')
                else:
                    self.send_response(404 if page is None else 200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.serve(Handler)
        self.other_url = f"http://localhost:{self.port}"


def visit(url: str) -> None:
    """Go to a URL, and wait until the page has loaded."""
    goto_url(url, timeout=PATIENCE)
    assert wait_for_load(PATIENCE)
