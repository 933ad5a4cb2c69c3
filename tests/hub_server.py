"""A small Hub on this machine: the endpoints that huggingface_hub's upload and download call.

with Hub() as hub:
    HfApi(endpoint=hub.url, token=hub.token).upload_folder(...)
    hub.files["owner/name"]["README.md"]

A dataset's name is datasets/owner/name. Large files go over the LFS protocol; the Hub's newer Xet
storage, which is a service of its own, cannot be here, so those who upload switch it off.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40
LARGE = (".safetensors", ".zip", ".png")


class Hub:
    """Repositories in memory, one user, one token.

    Every request's path is in `asked`, its Authorization in `authorizations`, its Cookie in
    `cookies`; with `set_cookie`, every answer sets it.
    """

    def __init__(self) -> None:
        self.token = "hf_" + "x" * 34
        self.user: dict[str, Any] = {
            "type": "user",
            "name": "me",
            "orgs": [{"name": "studio"}],
            "auth": {"accessToken": {"displayName": "here", "role": "write"}},
        }
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []
        self.cookies: list[str | None] = []
        self.set_cookie: str | None = None
        self.refuse: dict[str, int] = {}  # status by a part of the path
        self.codes: dict[str, str] = {}  # the Hub's name of that error, by the same part
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def use(self, monkeypatch: Any, cache: Path) -> None:
        """Puts this Hub in the place of the real one, for the client's functions too."""
        from huggingface_hub import constants

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", self.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.token", self.token)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON, or a file's bytes."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            return self._dataset("/".join(parts[1:4]), parts[4:])
        if parts[0] == "datasets":
            held = self.files.get("/".join(parts[:3]), {}).get("/".join(parts[5:]))
            return (200, held) if held is not None else (404, {"error": "Entry not found"})
        return self._answer(method, path, body)

    def _dataset(self, name: str, parts: list[str]) -> tuple[int, Any]:
        """Its files, in one of two ways."""
        if name not in self.files:
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        if parts[1:] and unquote(parts[1]) not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id", "code": "RevisionNotFound"}
        if parts[:1] == ["tree"]:
            return 200, [
                {"type": "file", "path": path, "size": len(data), "oid": "1" * 40}
                for path, data in self.files[name].items()
            ]
        siblings = [{"rfilename": p, "size": len(data)} for p, data in self.files[name].items()]
        return 200, {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings}

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any] | bytes]:
        """Status and JSON, or a file's bytes."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/whoami-v2":
            return 200, self.user
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
            self.files.setdefault(name, {})
            self.private.setdefault(name, asked.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.startswith("/large/"):
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self._large[parts[1]] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.files:
                return 404, {"error": "Repository not found"}
            return self._repository(name, parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve":
            held = self.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            return (200, held) if held is not None else (404, {"error": "Entry not found"})
        return 404, {"error": path}

    def _repository(self, name: str, parts: list[str], body: bytes) -> tuple[int, dict[str, Any]]:
        if not parts or parts[0] == "revision":
            siblings = [{"rfilename": path} for path in self.files[name]]
            return 200, {"id": name, "sha": COMMIT, "siblings": siblings}
        if parts[0] == "preupload":
            kinds = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return 200, {"files": kinds}
        assert parts[0] == "commit", parts
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[name][value["path"]] = self._large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self) -> None:
                path = urlsplit(self.path).path
                if path != "/api/agent-harnesses":  # the library's own, once a day
                    hub.asked.append(path)
                hub.authorizations.append(self.headers.get("Authorization"))
                hub.cookies.append(self.headers.get("Cookie"))
                body = self._body()
                writes = self.command in ("POST", "PUT") or path.startswith("/api/whoami")
                known = self.headers.get("Authorization") == f"Bearer {hub.token}"
                refused = [code for part, code in hub.refuse.items() if part in path]
                if refused:
                    code = next((each for part, each in hub.codes.items() if part in path), "")
                    heard = self.headers.get("Authorization")  # as a chatty proxy would
                    status = refused[0]
                    answer = {"error": f"refused {heard}", "code": code}
                elif writes and not known and not path.startswith("/large/"):
                    status, answer = 401, {"error": "Invalid credentials"}
                else:
                    status, answer = hub.answer(self.command, path, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", COMMIT)
                if isinstance(answer, dict) and answer.get("code"):
                    self.send_header("X-Error-Code", answer["code"])
                if hub.set_cookie:
                    self.send_header("Set-Cookie", hub.set_cookie)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            do_GET = do_POST = do_PUT = do_HEAD = _do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
