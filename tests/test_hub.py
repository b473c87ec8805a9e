"""checkpoints/hub.py against a small imitation of the hub on 127.0.0.1.

huggingface_hub reads its environment variables once, at import, so each case runs in a process of
its own. A dead proxy for every other address keeps the tests off the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from csm_studio.checkpoints import sources

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 4096

CLIENT = """
import json, sys, time
start = time.monotonic()
from csm_studio.checkpoints import hub
from csm_studio.errors import HubError
assert not [name for name in sys.modules if name.startswith("huggingface_hub")]
reports = []
def progress(done, total, name):
    reports.append([done, total, name])
{before}
answer = dict(paths=[], errors=[])
for call in {calls}:
    try:
        answer["paths"].append(str(eval(call)))
    except HubError as error:
        answer["errors"].append(str(error))
answer.update(reports=reports, elapsed_s=time.monotonic() - start)
print("ANSWER" + json.dumps(answer))
"""


class FakeHub(ThreadingHTTPServer):
    """Serves `files[repo_id][filename]` the way the hub's resolve addresses do."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.num_bytes_before_break: int | None = None
        self.declared_size: int | None = None
        self.statuses: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [path.rsplit("/", 1)[1] for verb, path in self.requests if verb == "GET"]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if match is None:
            # Not a file of a repository, such as the library's own housekeeping.
            self._refuse(404, "")
            return
        repo_id, filename = match.groups()
        self.server.requests.append((self.command, self.path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if repo_id in self.server.statuses:
            self._refuse(self.server.statuses[repo_id], "")
        elif repo_id not in self.server.files:
            self._refuse(401, "RepoNotFound")
        elif repo_id in self.server.gated:
            self._refuse(403, "GatedRepo")
        elif filename not in self.server.files[repo_id]:
            self._refuse(404, "EntryNotFound")
        else:
            self._send(self.server.files[repo_id][filename], with_body=with_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, *, with_body: bool) -> None:
        size = self.server.declared_size or len(content)
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if with_body:
            self.wfile.write(content[: self.server.num_bytes_before_break])
            self.close_connection = True


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    server = FakeHub()
    server.files["owner/model"] = {"model.safetensors": WEIGHTS}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def client(
    fake_hub: FakeHub, home: Path, *calls: str, before: str = "", **environment: str
) -> dict[str, Any]:
    """Evaluate `calls` in a new process; return paths, errors, progress reports and seconds.

    Where there is one call, its outcome is `path` or `error`.
    """
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "TEMP") if key in os.environ}
    nowhere = "http://127.0.0.1:9"
    code = CLIENT.format(before=before, calls=calls)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_ENDPOINT": fake_hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HTTP_PROXY": nowhere,
            "HTTPS_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ANSWER"), "the core prints nothing"
    answer: dict[str, Any] = json.loads(done.stdout.removeprefix("ANSWER"))
    answer["stderr"] = done.stderr
    if len(calls) == 1:
        answer.update(zip(["path"], answer["paths"], strict=False))
        answer.update(zip(["error"], answer["errors"], strict=False))
    return answer


FETCH = "hub.fetch('owner/model', 'model.safetensors', progress=progress)"


def test_download_reports_progress_and_is_cached(fake_hub: FakeHub, tmp_path: Path) -> None:
    weights = WEIGHTS * 24  # several of the library's blocks of 10 MiB
    fake_hub.files["owner/model"]["model.safetensors"] = weights
    first = client(fake_hub, tmp_path, FETCH, HF_TOKEN="hf_test")
    path = Path(first["path"])
    assert path.read_bytes() == weights
    assert path.name == "model.safetensors"
    assert tmp_path in path.parents
    assert first["stderr"] == ""
    assert first["reports"][-1] == [len(weights), len(weights), "model.safetensors"]
    done = [report[0] for report in first["reports"]]
    assert len(done) > 1
    assert done == sorted(done)
    assert fake_hub.tokens == {"Bearer hf_test"}
    num_requests = len(fake_hub.requests)

    fake_hub.statuses["owner/model"] = 500
    second = client(fake_hub, tmp_path, FETCH)
    assert second["path"] == first["path"]
    assert second["reports"] == []
    assert len(fake_hub.requests) == num_requests, "a cached file needs no network"


def test_offline_variable_with_and_without_cache(fake_hub: FakeHub, tmp_path: Path) -> None:
    answer = client(fake_hub, tmp_path, FETCH, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in answer["error"]
    assert f"{fake_hub.url}/owner/model/resolve/main/model.safetensors" in answer["error"]
    assert "--model DIR" in answer["error"]
    assert str(tmp_path / "hub") in answer["error"]
    assert "models--owner--model" in answer["error"]
    assert fake_hub.requests == []

    online = client(fake_hub, tmp_path, FETCH)
    offline = client(fake_hub, tmp_path, FETCH, HF_HUB_OFFLINE="1")
    assert offline["path"] == online["path"]


def test_refusals_of_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.files["sesame/csm-1b"] = {"model.safetensors": WEIGHTS}
    fake_hub.gated.add("sesame/csm-1b")
    gated, no_file, no_repo, no_name = client(
        fake_hub,
        tmp_path,
        "hub.fetch('sesame/csm-1b', 'model.safetensors')",
        "hub.fetch('owner/model', 'other.bin')",
        "hub.fetch('owner/nothing', 'a.json')",
        "hub.fetch('not a name', 'a.json')",
    )["errors"]
    assert f"Accept the licence at {fake_hub.url}/sesame/csm-1b" in gated
    assert "hf auth login" in gated
    assert no_file.startswith("other.bin of owner/model: the repository has no such file")
    assert "There is no repository" in no_repo
    assert no_name.startswith("'not a name' is not the name of a repository")


def test_unreachable_hub_is_reported_quickly(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.server_close()
    answer = client(fake_hub, tmp_path, FETCH)
    assert f"{fake_hub.url} cannot be reached" in answer["error"]
    assert answer["elapsed_s"] < 10


def test_hub_in_trouble_is_reported_quickly(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.statuses = {"an/overload": 503, "an/imposter": 404, "a/portal": 200}
    calls = [f"hub.fetch({repo_id!r}, 'a.json')" for repo_id in fake_hub.statuses]
    answer = client(fake_hub, tmp_path, *calls)
    overload, imposter, portal = answer["errors"]
    assert "answered with HTTP status 503. Try again later" in overload
    assert "answered with HTTP status 404. Check the proxy settings" in imposter
    assert f"{fake_hub.url} cannot be reached" in portal
    assert answer["elapsed_s"] < 10


def test_broken_off_download_leaves_nothing_that_looks_whole(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.num_bytes_before_break = 1000
    # The library waits between its attempts to go on.
    no_waiting = "import time; time.sleep = lambda seconds: None"
    answer = client(fake_hub, tmp_path, FETCH, before=no_waiting)
    assert "The download broke off" in answer["error"]
    assert not list(tmp_path.rglob("snapshots/*/*"))

    fake_hub.num_bytes_before_break = None
    again = client(fake_hub, tmp_path, FETCH)
    assert Path(again["path"]).read_bytes() == WEIGHTS


def test_full_disk_is_noticed_before_the_download(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.declared_size = 10**18
    answer = client(fake_hub, tmp_path, FETCH)
    assert "It takes 1000000000.00 GB" in answer["error"]
    assert fake_hub.fetched() == []


def test_disk_that_fills_up_during_the_download(fake_hub: FakeHub, tmp_path: Path) -> None:
    full = (
        "import errno, huggingface_hub\n"
        "def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "huggingface_hub.hf_hub_download = full"
    )
    answer = client(fake_hub, tmp_path, FETCH, before=full)
    assert "is full. Free some space" in answer["error"]


def test_cache_that_cannot_be_written(fake_hub: FakeHub, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    answer = client(fake_hub, tmp_path, FETCH, HF_HUB_CACHE=str(blocked / "hub"))
    assert "The cache cannot be used" in answer["error"]
    assert str(blocked) in answer["error"]


def test_error_from_the_progress_callback_stops_the_download(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    stop = "def progress(*report): raise HubError('stopped by the user')"
    answer = client(fake_hub, tmp_path, FETCH, before=stop)
    assert answer["error"] == "stopped by the user"
    assert not list(tmp_path.rglob("snapshots/*/*"))


def test_model_folder_holds_what_is_loaded_and_no_pickle(fake_hub: FakeHub, tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    fake_hub.files["unsloth/csm-1b"] = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        shards[0]: b"first",
        shards[1]: b"second",
        "ckpt.pt": b"pickle",
        "pytorch_model.bin": b"pickle",
    }
    default = sources.DEFAULT_CSM.repo_id
    fake_hub.files[default] = {"ckpt.safetensors": WEIGHTS, "other.safetensors": b""}
    calls = ("hub.fetch_model('unsloth/csm-1b')", f"hub.fetch_model({default!r})")
    folder, default_folder = map(Path, client(fake_hub, tmp_path, *calls)["paths"])
    assert [path.name for path in default_folder.iterdir()] == ["ckpt.safetensors"]
    held = {path.name for path in folder.iterdir()}
    assert held == {"config.json", "model.safetensors.index.json", *shards}
    assert (folder / shards[1]).read_bytes() == b"second"

    num_requests = len(fake_hub.requests)
    assert client(fake_hub, tmp_path, *calls)["paths"] == [str(folder), str(default_folder)]
    assert len(fake_hub.requests) == num_requests, "absent files are remembered"


def test_weights_brought_by_hand_serve_offline(fake_hub: FakeHub, tmp_path: Path) -> None:
    only_weights = client(fake_hub, tmp_path, FETCH)
    offline = client(fake_hub, tmp_path, "hub.fetch_model('owner/model')", HF_HUB_OFFLINE="1")
    assert Path(offline["path"]) == Path(only_weights["path"]).parent


def test_models_that_are_refused(fake_hub: FakeHub, tmp_path: Path) -> None:
    name = "model.safetensors.index.json"
    indexes: dict[str, Any] = {
        "bad/outside": {"weight_map": {"a": "../../outside.safetensors"}},
        "bad/pickle": {"weight_map": {"a": "model.bin"}},
        "bad/list": ["not an index"],
    }
    for repo_id, index in indexes.items():
        fake_hub.files[repo_id] = {name: json.dumps(index).encode(), "model.bin": b"pickle"}
    fake_hub.files["bad/pickles"] = {"pytorch_model.bin": b"pickle"}
    calls = [f"hub.fetch_model({repo_id!r})" for repo_id in (*indexes, "bad/pickles")]
    outside, pickle, no_index, only_pickles = client(fake_hub, tmp_path, *calls)["errors"]
    assert "'../../outside.safetensors', which is no safetensors file beside it" in outside
    assert "'model.bin', which is no safetensors file beside it" in pickle
    assert "not an index of safetensors shards" in no_index
    assert only_pickles.startswith("bad/pickles: the repository has none of")
    assert set(fake_hub.fetched()) == {name}


def test_no_source_is_a_pickle() -> None:
    for source in sources.SOURCES.values():
        assert re.fullmatch(r"[\w-]+/[\w.-]+", source.repo_id)
        assert all(name.endswith((".safetensors", ".json")) for name in source.filenames)
