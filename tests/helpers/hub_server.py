"""A hub on 127.0.0.1 that speaks the paths of Hugging Face and of ModelScope, and misbehaves as it is told."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

MODEL = "somebody/tiny-chatglm3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_FROM_BYTES = 100_000  # what a hub keeps in LFS, with a sha256


@dataclass
class Request:
    """One request for a file's content, and how much was sent."""

    method: str
    file: str
    range: str | None
    sent_bytes: int = 0


@dataclass
class Hub:
    """What the hub holds, how it misbehaves, and what it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    cut_after_bytes: dict[str, int] = field(default_factory=dict)
    """Close the connection of the next request for a file after so many bytes."""
    status: dict[str, int] = field(default_factory=dict)
    """Answer requests for a file with an error."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Send this in place of what the listing says."""
    listed: dict[str, dict] = field(default_factory=dict)
    """Lines of the listing (Hugging Face's form) to add or to replace."""
    token: str | None = None
    """Only who has it gets in."""
    requests: list[Request] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def asked_for(self, file: str) -> list[Request]:
        return [request for request in self.requests if request.file == file and request.method == "GET"]

    def listing(self) -> list[dict]:
        entries = {}
        for name, content in self.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if len(content) >= LARGE_FROM_BYTES:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries[name] = entry
        return list({**entries, **self.listed}.values())


def cut_into_shards(source: Path, target: Path) -> None:
    """Copy a checkpoint, its weights in two files with an index, as hubs publish large models."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors", "recipe"), dirs_exist_ok=True)
    save_torch_state_dict(load_file(source / "model.safetensors"), target, max_shard_size=3_000_000)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub until the block ends."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.hub.paths.append(url.path)
        is_allowed = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if url.path in (f"/api/models/{MODEL}", f"/api/models/{MODEL}/revision/main"):
            self._json({"id": MODEL, "sha": COMMIT, "siblings": []})
        elif url.path == f"/api/models/{MODEL}/tree/{COMMIT}":
            self._json(self.hub.listing()) if is_allowed else self._error(403, "GatedRepo")
        elif (match := re.fullmatch(f"/{MODEL}/resolve/(?:{COMMIT}|main)/(.+)", url.path)) and is_allowed:
            self._file(match[1])
        elif url.path == f"/api/v1/models/{MODEL}/repo/files":
            self._json({"Code": 200, "Success": True, "Data": {"Files": [_modelscope(e) for e in self.hub.listing()]}})
        elif url.path == f"/api/v1/models/{MODEL}/repo":
            self._file(query["FilePath"])
        elif url.path == "/api/v1/repos/internalAccelerationInfo":
            self._json({"Data": {}})
        else:
            self._error(404, "RepoNotFound")

    def _json(self, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str) -> None:
        request = Request(self.command, name, self.headers.get("Range"))
        self.hub.requests.append(request)
        if name in self.hub.status and self.command == "GET":
            self._error(self.hub.status[name], "Broken")
            return
        if name not in self.hub.files:
            self._error(404, "EntryNotFound")
            return
        content = self.hub.files[name]
        body = self.hub.served.get(name, content)
        start = int(re.fullmatch(r"bytes=(\d+)-", request.range)[1]) if request.range else 0
        self.send_response(206 if request.range else 200)
        if request.range:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        is_large = len(content) >= LARGE_FROM_BYTES
        self.send_header("ETag", f'"{(hashlib.sha256 if is_large else hashlib.sha1)(content).hexdigest()}"')
        if is_large:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.cut_after_bytes.pop(name, len(body))
        request.sent_bytes = end - start
        self.wfile.write(body[start:end])
        if end < len(body):
            self.wfile.flush()
            self.close_connection = True


def _modelscope(entry: dict) -> dict:
    """A line of Hugging Face's listing in ModelScope's form."""
    return {
        "Path": entry["path"],
        "Name": entry["path"],
        "Size": entry["size"],
        "Sha256": entry.get("lfs", {}).get("oid", ""),
        "Type": "tree" if entry["type"] == "directory" else "blob",
    }
