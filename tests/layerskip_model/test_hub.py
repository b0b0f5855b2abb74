"""Repositories that the hub does not give: one line that says why, and names the token variable where one helps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from layerskip_model.formats.hub import is_hub_name

MESSAGES = """
import sys
from layerskip_model.errors import UserError
from layerskip_model.formats.heads import heads_directory
from layerskip_model.formats.huggingface import load_config, load_model, load_tokenizer

for name in sys.argv[1:]:
    for load in (load_config, load_model, load_tokenizer, heads_directory):
        try:
            print(load(name))
        except UserError as error:
            print(error)
"""
FILES = ("config.json", "medusa_lm_head.pt", "README.md")


class Hub(BaseHTTPRequestHandler):
    """A hub with a repository that is closed, one that is open and a third that it does not have."""

    def do_GET(self) -> None:
        path = self.path.removeprefix("/api/models")
        content = b""
        if path.startswith("/owner/missing"):
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
        elif self.path.startswith("/api/"):  # of what is gated everybody may see the names
            tree = [{"type": "file", "path": name, "size": 2, "oid": 40 * "b"} for name in FILES]
            answer = tree if "/tree/" in path else {"id": path[1:12], "sha": 40 * "a", "siblings": []}
            content = json.dumps(answer).encode()
            self.send_response(200)
        elif path.startswith("/owner/gated"):
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
        elif path.rsplit("/", 1)[-1] not in FILES:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            content = b"{}"
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", 40 * "a")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The cache of those who use it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield tmp_path / "hub"
    server.shutdown()


def messages(*names: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", MESSAGES, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-4 * len(names) :]


def test_what_is_gated_and_what_is_missing_name_the_token_variable(hub: Path) -> None:
    found = messages("owner/gated", "owner/missing")
    assert [line.split(" ", 1)[0] for line in found] == [*3 * ["model"], "heads"] * 2
    for line in found[:4]:
        assert line.endswith(
            "'owner/gated' is gated: ask for access on its page on the hub, then set HF_TOKEN to a token of yours"
        )
    for line in found[4:]:
        assert "'owner/missing': no such directory, and on the hub missing or private; check the name" in line
        assert line.endswith("set HF_TOKEN to a token that may read it")


def test_of_heads_only_their_files_are_had_and_again_without_the_hub(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        directory = Path(messages("owner/heads")[-1])
        assert sorted(path.name for path in directory.iterdir()) == ["config.json", "medusa_lm_head.pt"]
    assert messages("owner/other")[-1].endswith("check the name, the connection and HF_HUB_OFFLINE")


def test_names() -> None:
    assert is_hub_name("owner/name")
    assert not any(is_hub_name(name) for name in ("name", "a/b/c", "./name", "/name", "~/name", "../name"))
