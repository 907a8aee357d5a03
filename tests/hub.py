"""A stand-in of the hub's HTTP API, in memory: repositories are made, committed to and read from.

Files that the hub keeps outside of git (weights) take the way that they take there: asked for, uploaded, then named in
the commit. `HF_HUB_DISABLE_XET=1` makes the client go it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"
LARGE = (".safetensors", ".bin")


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.files["owner/name"]` is what was committed there."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, object] = {}
        self.messages: list[tuple[str, str]] = []
        self.unauthorised: list[str] = []
        self.uploaded: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
                self.send_response(code)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("content-length", 0)))

            def do_PUT(self) -> None:
                content = self.body()
                hub.uploaded[self.path.rpartition("/")[2]] = content
                self.answer(b"")

            def do_POST(self) -> None:
                body, path = self.body(), self.path.split("?")[0]
                if self.headers.get("authorization") != "Bearer hf_none":
                    hub.unauthorised.append(path)
                self.answer(json.dumps(hub.post(path, body)).encode(), content_type="application/json")

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
                    content = hub.files.get(match[1], {}).get(match[2])
                    if content is None:
                        self.answer(b"", 404, x_error_code="EntryNotFound", x_repo_commit=COMMIT)
                        return
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self.answer(content, etag=etag, x_repo_commit=COMMIT)
                elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/.*)?", path):
                    names = sorted(hub.files.get(match[1], {}))
                    facts = {
                        "id": match[1],
                        "sha": COMMIT,
                        "tags": [],
                        "siblings": [{"rfilename": name} for name in names],
                    }
                    tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
                    self.answer(json.dumps(tree if "/tree/" in path else facts).encode())
                else:
                    self.answer(b"{}", 404)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def post(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.private[repository] = asked.get("private", asked.get("visibility"))
            self.files.setdefault(repository, {})
            return {"url": f"{self.url}/{repository}", "name": repository}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [
                    {**each, "actions": {"upload": {"href": f"{self.url}/upload/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ],
            }
        repository, verb = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/.+", path).groups()
        if verb == "preupload":
            modes = {each["path"]: each["path"].endswith(LARGE) for each in json.loads(body)["files"]}
            return {
                "files": [
                    {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                    for name, large in modes.items()
                ]
            }
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append((repository, value["summary"]))
            elif entry["key"] == "file":
                self.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.uploaded[value["oid"]]
                if hashlib.sha256(content).hexdigest() != value["oid"] or len(content) != value["size"]:
                    raise ValueError(f"{value['path']} is not what was uploaded")
                self.files[repository][value["path"]] = content
            elif entry["key"] == "deletedFile":
                del self.files[repository][value["path"]]
        return {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{repository}/commit/{COMMIT}"}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
