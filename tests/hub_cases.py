"""A stand-in of the Hugging Face hub's API on 127.0.0.1, which the real client writes to."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import yaml

TOKEN = "hf_a_token_that_may_write"


class Hub:
    """What the hub holds: repositories, with the content of their files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.denied = ""
        """An owner for which the token may not write."""
        self.fails = ""
        """A path that the hub answers with a server error, which the client does not retry."""
        self.url = ""
        self.commits = 0

    @property
    def commit(self) -> str:
        """The hash of the newest commit, by which the client caches files."""
        return f"{self.commits:040x}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self._answer({"name": "owner", "type": "user"} if self._may() else None, 401)
        elif "/tree/main" in self.path:
            files = self.hub.repos[self.path.split("/tree/")[0].removeprefix("/api/models/")]
            self._answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files.items()
                ]
            )
        else:
            self._answer_file(with_body=True)

    def do_HEAD(self) -> None:
        self._answer_file(with_body=False)

    def do_PUT(self) -> None:
        content = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        hub = self.hub
        if not self._may():
            self._answer(None, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            # As the hub does: a base_model that is a path is refused.
            wrong = str(metadata.get("base_model", "a/b")).count("/") != 1
            errors = {"errors": [{"message": "base_model is not a model id"}]}
            self._answer(errors if wrong else {"warnings": []}, 400 if wrong else 200)
        elif "/preupload/main" in self.path:
            files = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
                objects.append(wanted | {"actions": upload})
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/main" in self.path and not hub.fails:
            repo = self.path.split("/commit/")[0].removeprefix("/api/models/")
            self._commit(repo, body)
        else:
            self._answer({"error": "the disk of the hub is full"}, 400)

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if wanted["organization"] == self.hub.denied:
            self._answer({"error": "You don't have the rights"}, 403)
            return
        if repo in self.hub.repos:
            self._answer(url, 409)
            return
        self.hub.repos[repo] = {".gitattributes": b""}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(repo)
        self._answer(url)

    def _commit(self, repo: str, body: bytes) -> None:
        files = self.hub.repos[repo]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits += 1
        url = f"{self.hub.url}/{repo}/commit/{self.hub.commit}"
        self._answer({"commitUrl": url, "commitOid": self.hub.commit})

    def _answer_file(self, *, with_body: bool) -> None:
        repo, _, name = self.path.removeprefix("/").partition("/resolve/main/")
        content = self.hub.repos.get(repo, {}).get(name)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            content = b""
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content or {}).encode()
        self.send_response(200 if content is not None and status == 401 else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """The stand-in, while it runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def environment(hub: Hub) -> dict[str, str]:
    """The variables by which a program's client finds the stand-in."""
    # Xet has a protocol of its own, which the client speaks in compiled code.
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def use(hub: Hub, monkeypatch: Any, cache: Any) -> None:
    """Let the client of this process use the stand-in; it has read its variables already."""
    constants = huggingface_hub.constants
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "no-tokens"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
