"""The download script against a hub of its own on 127.0.0.1, with shards of a few thousand tokens."""

import contextlib
import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from senano_jax.data.fineweb import CHECKSUMS, Published, read_published
from senano_jax.data.shards import write_shard

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "scripts" / "download_fineweb.py"
SMALL_CHUNKS = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 500"  # not 10 MB
PREFIX = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
COMMIT = "0123456789" * 4
VAL, TRAIN_1, TRAIN_2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a download sees: HEAD with size and ETag, GET with Range."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.etags = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.gets: list[tuple[str, int]] = []  # name and first byte of every GET
        self.cut_once_at: dict[str, int] = {}  # byte at which the next connection for this file is cut
        self.stall_at: dict[str, int] = {}  # byte at which nothing more comes, until cleared
        self.status: int | None = None  # answer to everything, where set

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def published(self, name: str) -> Published:
        """What a client should record of the file."""
        return Published(self.endpoint + PREFIX.replace("main", COMMIT) + name, self.etags[name])


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.removeprefix(PREFIX)
        if self.server.status or name not in self.server.files:
            self.send_response(self.server.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.server.files[name]
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(requested[1]) if requested else 0
        self.send_response(206 if requested else 200)
        if requested:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", f'"{self.server.etags[name]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.server.gets.append((name, first))
            stall_at = self.server.stall_at.get(name)
            end = self.server.cut_once_at.pop(name, stall_at)
            self.wfile.write(content[first:end])
            if stall_at:
                wait_for(lambda: not self.server.stall_at)
            self.close_connection = True

    def log_message(self, *args):
        pass


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shard(tmp_path, seed):
    path = tmp_path / "made.bin"
    write_shard(path, np.random.default_rng(seed).integers(50257, size=20_000))
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def hub(tmp_path):
    server = Hub({name: shard(tmp_path, seed) for seed, name in enumerate((VAL, TRAIN_1, TRAIN_2))})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    with contextlib.closing(server.socket):
        yield server
        server.shutdown()
    thread.join()


class Download:
    """Runs the script on `folder`, after the statements `code`; further keywords are environment variables."""

    def __init__(self, endpoint: str, home: Path, folder: Path):
        self.environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        self.folder = folder

    def start(self, *args, code="pass", **environment):
        run_script = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        return subprocess.Popen(
            [sys.executable, "-c", f"{code}\n{run_script}", *args, "--dir", self.folder],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args, **options):
        with self.start(*args, **options) as process:
            stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


@pytest.fixture
def download(hub, tmp_path):
    return Download(hub.endpoint, tmp_path / "home", tmp_path / "shards")


def held(tmp_path):
    """The shards, whole and partial."""
    return {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir() if path.name != CHECKSUMS}


def assert_one_line_error(result, *words):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(lines) == 1
    assert result.stderr.endswith(lines[0] + "\n")
    for word in words:
        assert word in lines[0]


def test_validation_and_the_first_training_shards_arrive(hub, download, tmp_path):
    result = download("1")
    assert result.returncode == 0, result.stderr
    assert held(tmp_path) == {name: hub.files[name] for name in (VAL, TRAIN_1)}
    assert "2 shards, 40,000 tokens" in result.stdout
    assert read_published(tmp_path / "shards") == {name: hub.published(name) for name in (VAL, TRAIN_1)}


def test_whole_shards_are_kept_and_broken_ones_replaced(hub, download, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / VAL).write_bytes(hub.files[VAL])
    (tmp_path / "shards" / TRAIN_1).write_bytes(hub.files[TRAIN_1][:-100])
    result = download("2")
    assert result.returncode == 0, result.stderr
    assert hub.gets == [(TRAIN_1, 0), (TRAIN_2, 0)]
    assert held(tmp_path) == hub.files
    assert f"{TRAIN_1} is cut short" in result.stderr
    assert read_published(tmp_path / "shards") == {name: hub.published(name) for name in hub.files}


def test_a_sound_shard_that_is_not_the_published_one_is_replaced(hub, download, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / VAL).write_bytes(hub.files[TRAIN_2])
    result = download("1")
    assert result.returncode == 0, result.stderr
    assert held(tmp_path) == {name: hub.files[name] for name in (VAL, TRAIN_1)}
    assert f"{VAL} has SHA-256 {hub.etags[TRAIN_2]}" in result.stderr


def test_without_network_whole_shards_are_kept_without_checksums(hub, download, tmp_path):
    (tmp_path / "shards").mkdir()
    for name in (VAL, TRAIN_1):
        (tmp_path / "shards" / name).write_bytes(hub.files[name])
    result = download("1", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 0
    assert result.stderr.count("kept without comparing checksums: no answer from") == 1
    assert read_published(tmp_path / "shards") == {}


def test_an_interrupted_download_is_continued_by_the_next_run(hub, download, tmp_path):
    """Ctrl-C in the middle of a shard: what had come is on the disk, and is not fetched again."""
    hub.stall_at[TRAIN_1] = 30_000
    # A suite in the background of a shell ignores SIGINT, and so would all that it starts.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    with download.start("1", code=f"{SMALL_CHUNKS}\n{heed}") as process:
        wait_for(lambda: sum(path.stat().st_size for path in tmp_path.glob(f"shards/.{TRAIN_1}.*")))
        process.send_signal(signal.SIGINT)
        hub.stall_at.clear()
        _, stderr = process.communicate(timeout=30)
    assert stderr.endswith("error: interrupted: run the same command again to continue\n")
    [(partial, kept)] = ((name, content) for name, content in held(tmp_path).items() if TRAIN_1 in name)
    assert partial.startswith(f".{TRAIN_1}.")
    hub.gets.clear()
    result = download("1")
    assert result.returncode == 0, result.stderr
    assert hub.gets == [(TRAIN_1, len(kept))]
    assert held(tmp_path) == {name: hub.files[name] for name in (VAL, TRAIN_1)}


def test_a_cut_connection_is_continued_in_the_same_run(hub, download, tmp_path):
    hub.cut_once_at[VAL] = 2000
    result = download("1", code=SMALL_CHUNKS)
    assert result.returncode == 0, result.stderr
    assert [first for name, first in hub.gets if name == VAL] == [0, 2000]
    assert held(tmp_path)[VAL] == hub.files[VAL]


@pytest.mark.parametrize("etag_is_sha256", [True, False])
def test_a_file_that_is_no_shard_is_refused_and_not_kept(hub, download, tmp_path, etag_is_sha256):
    hub.files[VAL] = b"\0" * 5000
    hub.etags[VAL] = hashlib.sha256(hub.files[VAL]).hexdigest() if etag_is_sha256 else "abc"
    assert_one_line_error(download("1"), VAL, "damaged", "is not a shard")
    assert held(tmp_path) == {}


def test_a_header_that_disagrees_with_the_size_is_refused(hub, download, tmp_path):
    hub.files[VAL] = hub.files[VAL][:-10]
    hub.etags[VAL] = "abc"
    assert_one_line_error(download("1"), VAL, "is cut short")
    assert held(tmp_path) == {}


def test_a_changed_token_is_refused_by_its_sha256(hub, download, tmp_path):
    hub.files[VAL] = hub.files[VAL][:-2] + b"\0\0"
    assert_one_line_error(download("1"), VAL, "SHA-256")
    assert held(tmp_path) == {}


def test_a_missing_file_is_named(hub, download):
    del hub.files[TRAIN_2]
    assert_one_line_error(download("2"), TRAIN_2, "404")


def test_a_refusing_server_is_named(hub, download):
    hub.status = 403
    assert_one_line_error(download("1"), VAL, "403")


def test_no_network_is_one_line(download):
    result = download("1", HF_ENDPOINT="http://127.0.0.1:9")  # the discard port: nothing listens
    assert_one_line_error(result, "no answer", "check the network")


@pytest.mark.parametrize("endpoint", ["http://[x", "http://127.0.0.1:99999", "x"])
def test_an_endpoint_that_is_no_address_is_one_line(download, endpoint):
    assert_one_line_error(download("1", HF_ENDPOINT=endpoint), endpoint, "HF_ENDPOINT")


def test_a_full_disk_is_one_line_and_its_beginning_is_kept(hub, download, tmp_path):
    """A limit on the file size stands in for a full disk: both fail the write with an OSError."""
    result = download("1", code="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))")
    assert_one_line_error(result, VAL, "File too large", "run the same command again")
    assert VAL not in held(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(download, tmp_path):
    (tmp_path / "shards").write_text("in the way")
    assert_one_line_error(download("1"), "shards", "--dir")


@pytest.mark.parametrize("count", ["0", "104"])
def test_a_count_that_the_dataset_lacks_is_refused(download, count):
    assert_one_line_error(download(count), f"N is {count}", "103")


def test_without_the_package_the_command_to_install_it_is_told(download):
    result = download("1", code="import sys; sys.modules['huggingface_hub'] = None")
    assert_one_line_error(result, "pip install 'huggingface_hub>=1.0'")
