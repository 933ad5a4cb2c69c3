"""A small W&B server on this machine: what wandb-core asks of one, and with whose key.

with WandB() as server:
    os.environ["WANDB_BASE_URL"] = server.url
    wandb.init(...)
    server.keys    of all requests so far
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandB:
    """Takes every run and file. `keys` are those of all requests that carried one."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.bodies: list[bytes] = []
        self.waiting = 0  # requests that are not answered yet
        self.answers = threading.Event()  # cleared, no request is answered
        self.answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who hangs up
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandB":
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL query."""
        if "viewer" in query:
            teams: dict[str, Any] = {"edges": []}
            who = {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}"}
            return {"viewer": {**who, "teams": teams}}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "cats", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": variables.get("name"), "displayName": "first"}
            more = {"config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket | more, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/file"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.bodies.append(body)
                server.waiting += 1
                server.answers.wait()
                server.waiting -= 1
                kind, _, value = self.headers.get("Authorization", "").partition(" ")
                if kind == "Basic":
                    server.keys.append(base64.b64decode(value).decode().partition(":")[2])
                elif kind:
                    server.keys.append(value)
                reply: dict[str, Any] = {}
                if self.path == "/graphql":
                    asked = json.loads(body)
                    data = server.answer(asked["query"], asked.get("variables") or {})
                    reply = {"data": data}
                content = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
