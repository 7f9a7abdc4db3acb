"""A stand-in for the Hugging Face Hub on 127.0.0.1, for the real `datasets` and `huggingface_hub` clients.

By hand: `python tests/hub.py ROOT [--token T] [--gated] [--port P]` serves until Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PORTAL = b"<html><body>Welcome! Log in to use this network.</body></html>"
ALLOWANCE = {"RateLimit": '"resolvers";r=900;t=90', "RateLimit-Policy": '"window";"resolvers";q=5000;w=300'}
TEXT = {".md", ".json", ".txt", ".yaml", ".py", ""}
FAULTS = ("reset", "short", "stall")  # no answer; half of a file, then no more; half, then silence for a while
LIES = ("other range", "false range", "other size", "no range", "long", "whole", "416", "html", "elsewhere")
ENDLESS = re.compile(r"endless (\d+)")  # as a fault: this status, and a body that never ends
PLAIN = re.compile(r"says (.*)")  # as a fault: this as plain text, with status 200
FLIP = "flip"  # one bit in the middle of what is sent is wrong
SLOW = ("trickle", "trickled head", "silence")
STALL_SECONDS = 5.0
TRICKLE_SECONDS = 0.05  # between two bytes
WAIT = re.compile(r"wait (\d+)")  # as a fault: refused with the request to wait so many seconds
GATED_CALLS = {"auth-check", "paths-info", "resolve"}


@dataclass(frozen=True)
class Request:
    """One answered request: its `Range` header or None, the status, the size of the answer's body in bytes, and whether
    its range reached the end of the file, where parquet keeps the footer.
    """

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    at_end: bool = False


class Refused(Exception):
    """Answered with `status`, X-Error-Message and, unless it is empty, X-Error-Code `code`."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Repo:
    """The files below `folder` as they were when this was made; `sha` is a 40-hex digest of all of them."""

    def __init__(self, folder: Path) -> None:
        self.id, self.folder = f"{folder.parent.name}/{folder.name}", folder
        entries = [_entry(local, local.relative_to(folder).as_posix()) for local in sorted(folder.rglob("*"))]
        self.entries = {entry["path"]: entry for entry in entries}
        self.sha = hashlib.sha1(json.dumps(entries).encode()).hexdigest()

    def info(self, gated: bool) -> dict[str, Any]:
        """The repository's metadata, as /api/datasets/ID and /api/models/ID answer."""
        siblings = [{"rfilename": path} for path, entry in self.entries.items() if entry["type"] == "file"]
        gate = "auto" if gated else False
        return {"id": self.id, "sha": self.sha, "private": False, "gated": gate, "tags": [], "siblings": siblings}

    def file(self, path: str) -> dict[str, Any]:
        if self.entries.get(path, {}).get("type") != "file":
            raise self._missing(path)
        return self.entries[path]

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What lies below `folder` ("" is the root). Raises Refused when there is nothing."""
        prefix = f"{folder}/" if folder else ""
        below = [entry for path, entry in self.entries.items() if path.startswith(prefix)]
        if not below:
            raise self._missing(folder)
        return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]

    def _missing(self, path: str) -> Refused:
        return Refused(404, "EntryNotFound", f"{path} does not exist on {self.sha}", **{"X-Repo-Commit": self.sha})


def _entry(local: Path, path: str) -> dict[str, Any]:
    """A file or folder as /tree and /paths-info list it; all but small text files carry the SHA-256 of Git LFS."""
    if local.is_dir():
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    data = local.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(data), "oid": blob} | ({} if local.suffix in TEXT else lfs)


class Hub:
    """Serves root/datasets/<org>/<name>/... and root/models/<org>/<name>/... while used as a context manager.

    A `token` makes the datasets private, or with `gated` public in name and metadata only; the models stay open. Any
    other token is refused everywhere, as on the Hub. `accepted` says whether its owner accepted the gated licence.
    With `redirect` large files are answered by a redirect to another server, `elsewhere`, and the allowance of requests
    is told, as on the Hub. `fault`, if given, says of each request (its method and path) how it fails: by a status, or
    as in `FAULTS`, `LIES`, `FLIP`, `SLOW`, `ENDLESS`, `PLAIN` and `WAIT`. A `mirror` lacks some of the Hub's calls. All
    paths begin with `prefix`.
    """

    def __init__(
        self,
        root: Path,
        *,
        token: str | None = None,
        gated: bool = False,
        accepted: bool = True,
        port: int = 0,
        redirect: bool = False,
        mirror: bool = False,
        prefix: str = "",
        fault: Callable[[str, str], int | str | None] = lambda method, path: None,
    ) -> None:
        self.redirect, self.mirror, self.prefix = redirect, mirror, prefix
        self.token, self.gated, self.accepted, self.fault = token, gated, accepted, fault
        self.closed = threading.Event()
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.shifts = itertools.cycle(range(1, 50))  # by which a wrong range lies beside the right one
        folders = [folder for kind in ("datasets", "models") for folder in sorted((root / kind).glob("*/*"))]
        self.repos = {(folder.parts[-3], "/".join(folder.parts[-2:])): Repo(folder) for folder in folders}
        self._servers = [_Server(self, port), _Server(self, 0)]
        own, self.elsewhere = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self.url = own + prefix

    def __enter__(self) -> "Hub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def env(self) -> dict[str, str]:
        """What to put in a client's environment before it imports huggingface_hub; HF_HOME is the caller's to set."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}

    def find(self, kind: str, repo_id: str, call: str, revision: str, token: str | None) -> Repo:
        """The repository, if this token may make this call. Raises Refused."""
        if token not in (None, self.token) and (self.token or self.gated):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        repo = self.repos.get((kind, repo_id))
        if token is None and self.token and (repo is None or (kind == "datasets" and not self.gated)):
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        if self.gated and kind == "datasets" and call in GATED_CALLS:
            self._check_licence(repo_id, token)
        if revision not in ("main", repo.sha):
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    def _check_licence(self, repo_id: str, token: str | None) -> None:
        restricted = f"Access to dataset {repo_id} is restricted"
        if token is None:
            message = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
            raise Refused(401, "GatedRepo", message)
        if not self.accepted:
            visit = f"Visit https://huggingface.co/datasets/{repo_id} to ask for access."
            raise Refused(403, "GatedRepo", f"{restricted} and you are not in the authorized list. {visit}")


class _Answered(Exception):
    """The request has had its answer."""


class _BrokenOff(Exception):
    """The connection is to be reset."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self._accepted: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._accepted.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        """Also cuts the kept-alive connections, so that a closed hub answers nobody."""
        super().server_close()
        for connection in self._accepted:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent about clients that went away, as killed ones do."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    at_end = False

    def do_GET(self) -> None:
        self.at_end = False
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.server.hub.fault(self.command, self.path)
        try:
            self._fail()
            self._route()
        except _BrokenOff:
            self._break_off()
        except _Answered:
            pass
        except Refused as refused:
            self._send_json({"error": str(refused)}, refused.status, refused.headers)

    do_HEAD = do_POST = do_GET

    def _fail(self) -> None:
        """Fails before anything is looked up, if it is to fail so."""
        wait = WAIT.fullmatch(str(self.fault))
        if wait:
            told = {"Retry-After": wait[1], "RateLimit": f'"resolvers";r=0;t={wait[1]}'}
            raise Refused(429, "", "Too many requests", **told)
        if isinstance(self.fault, int):
            raise Refused(self.fault, "", "Injected fault", **{"Retry-After": "0"})
        if endless := ENDLESS.fullmatch(str(self.fault)):
            self._start(int(endless[1]), 10**15, {"Content-Type": "application/json"})
            while not self.server.hub.closed.wait(0.001):
                self.wfile.write(b" " * 2**16)
            raise _BrokenOff
        if says := PLAIN.fullmatch(str(self.fault)):
            self._start(200, len(says[1]), {"Content-Type": "text/plain"})
            self.wfile.write(b"" if self.command == "HEAD" else says[1].encode())
            raise _Answered
        if self.fault == "reset":
            raise _BrokenOff
        if self.fault == "416":
            raise Refused(416, "", "Range not satisfiable")
        if self.fault == "silence":
            self.server.hub.closed.wait()
            raise _BrokenOff
        if self.fault == "elsewhere" and "expired" not in self.path:
            self._redirect("expired", {})
            raise _Answered
        if "expired" in self.path:
            raise Refused(403, "", "Request has expired")
        if self.fault == "html":
            self._start(200, len(PORTAL), {"Content-Type": "text/html"})
            self.wfile.write(PORTAL)
            raise _Answered

    def _redirect(self, query: str, headers: dict[str, str]) -> None:
        self._start(302, 0, headers | {"Location": f"{self.server.hub.elsewhere}{self.path.partition('?')[0]}?{query}"})

    def _route(self) -> None:
        """Answers /api/KIND/ORG/NAME[/CALL[/REV[/PATH]]] and [/datasets]/ORG/NAME/resolve/REV/PATH."""
        fields = parse_qs(self.body.decode())
        url = urlsplit(self.path.removeprefix(self.server.hub.prefix))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        api = parts[0] == "api"
        if parts == ["api", "whoami-v2"] and not self.server.hub.mirror:
            self._tell_who()
            return
        parts = parts[1:] if api else parts
        kind = parts.pop(0) if parts[:1] and parts[0] in ("datasets", "models") else "models"
        if len(parts) < 2 or not self.path.startswith(self.server.hub.prefix):
            raise Refused(404, "", f"No such page: {url.path}")
        repo_id, call, revision = "/".join(parts[:2]), "".join(parts[2:3]), (parts[3:4] or ["main"])[0]
        path = "/".join(parts[4:]).strip("/")
        token = self.headers.get("Authorization", "").partition("Bearer ")[2] or None
        if url.query == "signed":
            assert token is None, "a token was sent elsewhere"
            token = self.server.hub.token
        repo = self.server.hub.find(kind, repo_id, call, revision, token)
        if not api and call == "resolve":
            self._send_file(repo, path)
        elif api and call in ("", "revision"):
            self._send_json(repo.info(self.server.hub.gated and kind == "datasets"))
        elif api and call == "tree":
            self._send_json(repo.tree(path, parse_qs(url.query).get("recursive") == ["true"]))
        elif api and call == "paths-info" and not self.server.hub.mirror:
            self._send_json([repo.entries[path] for path in fields.get("paths", []) if path in repo.entries])
        elif api and call == "auth-check" and not self.server.hub.mirror:
            self._send_json({})
        else:
            raise Refused(404, "", f"No such page: {url.path}")

    def _tell_who(self) -> None:
        """Answers /api/whoami-v2. Raises Refused."""
        token = self.headers.get("Authorization", "").partition("Bearer ")[2]
        if not token or token != self.server.hub.token:
            raise Refused(401, "", "Invalid username or password.")
        self._send_json({"type": "user", "name": "someone"})

    def _send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._start(status, len(body), {"Content-Type": "application/json; charset=utf-8"} | (headers or {}))
        if self.command != "HEAD":
            self._write(body)

    def _send_file(self, repo: Repo, path: str) -> None:
        file = repo.file(path)
        hub = self.server.hub
        size, etag = file["size"], f'"{file.get("lfs", file)["oid"]}"'
        headers = {"X-Repo-Commit": repo.sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if "lfs" in file:
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": etag}
        if hub.redirect and "lfs" in file and not self.path.endswith("?signed"):
            self._redirect("signed", headers | ({} if hub.mirror else ALLOWANCE))
            return
        asked = _byte_span(self.headers.get("Range"), size) if self.fault != "whole" else None
        span = self._misplaced(asked, size) if asked else None
        first, end = span or (0, size)
        if asked and self.fault != "no range":
            named = asked if self.fault in ("false range", "long") else (first, end)
            total = size + (self.fault == "other size")
            headers["Content-Range"] = f"bytes {named[0]}-{named[1] - 1}/{total}"
        self.at_end = span is not None and end == size
        self._start(206 if span else 200, end - first, headers | {"Content-Type": "application/octet-stream"})
        if self.command != "HEAD" and end > first:
            self._send_bytes(repo.folder / path, first, end)

    def _misplaced(self, asked: tuple[int, int], size: int) -> tuple[int, int]:
        """The range that is sent in place of the one asked for, according to the fault."""
        first, end = asked
        if self.fault in ("other range", "false range"):
            shift = next(self.server.hub.shifts)
            shift = min(shift, size - end) or -min(shift, first)
            return first + shift, end + shift
        if self.fault == "long":
            return first, min(size, end + 10) if end < size else end
        return asked

    def _send_bytes(self, path: Path, first: int, end: int) -> None:
        broken = self.fault in ("short", "stall")
        with path.open("rb") as data:
            if self.fault in ("trickle", FLIP):
                data.seek(first)
                body = bytearray(data.read(end - first))
                body[len(body) // 2] ^= self.fault == FLIP
                self._write(bytes(body))
            elif count := (end - first) // (2 if broken else 1):
                self.connection.sendfile(data, first, count)
        if self.fault == "stall":
            self.server.hub.closed.wait(STALL_SECONDS)
        if broken:
            self._break_off()

    def _write(self, data: bytes) -> None:
        """Writes a body, as slowly as the fault wants it."""
        if self.fault != "trickle":
            self.wfile.write(data)
            return
        for byte in data:
            self.wfile.write(bytes([byte]))
            if self.server.hub.closed.wait(TRICKLE_SECONDS):
                return

    def _start(self, status: int, length: int, headers: dict[str, str]) -> None:
        """Notes the request, then sends the head; so a client that has its answer finds it in the list."""
        sent = 0 if self.command == "HEAD" else length
        hub = self.server.hub
        with hub.lock:
            hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), status, sent, self.at_end))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        if self.fault == "trickled head":
            self.flush_headers()
            self.wfile.write(b"X-Slow: ")
            while not hub.closed.wait(TRICKLE_SECONDS):
                self.wfile.write(b"x")
        self.end_headers()

    def _break_off(self) -> None:
        """Resets the connection, so that the client finds it broken and not ended."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _byte_span(header: str | None, size: int) -> tuple[int, int] | None:
    """The [first, end) that a Range header asks for, `bytes=A-[B]` or `bytes=-LAST`. Raises Refused (416).

    None is everything.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None:
        return None
    if match[1]:
        first, end = int(match[1]), min(size, int(match[2] or size) + 1)
    else:
        first, end = max(0, size - int(match[2])), size
    if first >= end:
        raise Refused(416, "", "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
    return first, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--token", help="the one token that is accepted; the datasets are private")
    parser.add_argument("--gated", action="store_true", help="the datasets are gated instead")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with Hub(args.root, token=args.token, gated=args.gated, port=args.port) as hub:
        print(f"serving {', '.join(repo_id for _, repo_id in hub.repos)} at {hub.url}")
        print(*(f"export {name}={value}" for name, value in hub.env().items()), sep="\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
