"""A stand-in for the Hugging Face Hub's HTTP interface, in memory, on 127.0.0.1.

It knows what an upload and a download of a model repository take: create, preupload, LFS, commit,
and then the list of a revision's files and their contents.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories, and the requests that were made.

    Attributes:
        repositories: name -> path -> content.
        objects: LFS objects by their SHA-256.
        requests: method and path of each request.
        refusing: status that every request gets; None: they are answered.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refusing: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server for the time of the context."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_PUT(self) -> None:
        content = self._body()
        self.server.objects[_digest(content)] = content
        self._send(b"")

    def do_POST(self) -> None:
        body, path = self._body(), self._path()
        if self.server.refusing is not None:
            self._json({"error": "refused"}, self.server.refusing)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else None
            name = name or asked["name"]
            self.server.repositories.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **entry,
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}},
                }
                for entry in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._json({"error": f"unknown {path}"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _get(self) -> None:
        path = self._path()
        if self.server.refusing is not None:
            self._json({"error": "refused"}, self.server.refusing)
            return
        if path == "/api/whoami-v2":
            self._json({"name": "user", "type": "user", "auth": {}})
            return
        for name, files in self.server.repositories.items():
            if path.startswith(f"/api/models/{name}/tree/"):
                self._json(
                    [
                        {
                            "type": "file",
                            "path": file,
                            "size": len(content),
                            "oid": _digest(content),
                        }
                        for file, content in sorted(files.items())
                    ]
                )
                return
            if path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file} for file in sorted(files)]
                self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
                return
            prefix = f"/{name}/resolve/"
            file = path.removeprefix(prefix).partition("/")[2]
            if path.startswith(prefix) and file in files:
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(files[file])}"'}
                self._send(files[file], headers=headers)
                return
        headers = {"X-Error-Code": "RepoNotFound"}
        self._send(b"{}", 404, {**headers, "Content-Type": "application/json"})

    def _path(self) -> str:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
