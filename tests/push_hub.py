"""A stand-in for the part of the Hub that takes uploads, on 127.0.0.1, for the real `huggingface_hub` client."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "Canary0" * 5


class PushHub:
    """Keeps what is committed: `files` by path, while used as a context manager.

    `requests` are the method and path of every request; `private` tells of each repository what was asked for. With
    `status`, everything is refused with it, and with `open_already` repositories are public, whatever is asked for.
    """

    def __init__(self, port: int, status: int = 0, open_already: bool = False) -> None:
        self.status, self.open_already = status, open_already
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # large files by their SHA-256
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "PushHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]


def _handler_of(hub: PushHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if path.startswith("/store/"):
                assert hashlib.sha256(body).hexdigest() == path[7:]
                hub.stored[path[7:]] = body
                self._answer({})
            elif hub.status:
                self._answer({"error": f"refused, {TOKEN}"}, hub.status)
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer({"error": "Invalid credentials"}, 401)
            else:
                self._api(path, body)

        do_GET = do_HEAD = do_PUT = do_POST

        def _api(self, path: str, body: bytes) -> None:
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                private = asked.get("visibility") == "private" or bool(asked.get("private"))
                hub.private[name] = private and not hub.open_already
                self._answer({"url": f"{hub.url}/{name}", "id": "1", "name": name})
            elif path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                named = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": one, "uploadMode": "regular" if one.endswith((".md", ".json")) else "lfs"} for one in named
                ]
                self._answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
            elif path.endswith(".git/info/lfs/objects/batch"):
                told = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(body)["objects"]]
                actions = [{"actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}} for one in told]
                self._answer(
                    {"transfer": "basic", "objects": [a | b for a, b in zip(told, actions, strict=True)]},
                    kind="application/vnd.git-lfs+json",
                )
            elif "/commit/" in path:
                hub.commit([json.loads(line) for line in body.splitlines()])
                self._answer(
                    {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/me/birds/commit/{1:040}"}
                )
            elif path.startswith("/api/models/"):
                name = "/".join(path.split("/")[3:5])
                sha = "0" * 40
                self._answer({"id": name, "sha": sha, "private": hub.private[name], "tags": [], "siblings": []})
            else:
                self._answer({"error": f"no such page: {path}"}, 404)

        def _answer(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")  # so that a closed hub answers nobody
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
