"""Remote shards: from a real HTTP server on loopback and moto's S3, through a cache that is bounded, shared, and believes hashes only."""

from __future__ import annotations

import functools
import hashlib
import http.server
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
from tiny_shards import make

from data_tools import ShardStream
from data_tools.shards import remote
from data_tools.shards.manifest import read_manifest
from data_tools.shards.reader import ShardReader
from data_tools.shards.remote import ShardCache
from data_tools.stream.training_set import TrainingSet
from runtime.errors import DataError
from runtime.files import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
fork = multiprocessing.get_context("fork")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `server.faults` says what becomes of the next requests for a file, `server.requests` counts them."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        faults = self.server.faults.get(name) or self.server.faults.get(Path(name).name)
        fault = faults.pop(0) if faults else None
        if fault == "busy":
            return self.send_error(503)
        if fault == "held":
            self.server.reached.set()
            self.server.released.wait(20)
        if fault in ("cut", "altered", "held"):
            content = bytearray(Path(self.translate_path(self.path)).read_bytes())
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            content[700] ^= fault == "altered"
            self.wfile.write(content[: 900 if fault == "cut" else None])
            self.close_connection = True
            return None
        return super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("remote") / "shards", "r", 20, shard_samples=4)


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """Two folders with shards of the same names: /one and /two."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    root = tmp_path / "www"
    shutil.copytree(folder, root / "one")
    make(root / "two", "s", 20, shard_samples=4)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    server.requests, server.faults, server.root = Counter(), {}, root
    server.reached, server.released = threading.Event(), threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache")


def keys_of(stream: ShardStream, batches: int) -> list[str]:
    return [key for batch in itertools.islice(stream, batches) for key in batch["keys"]]


def tars(counter: Counter) -> dict[str, int]:
    return {name: count for name, count in counter.items() if name.endswith(".tar")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_folder_streams_as_the_same_folder_on_a_disk(folder, server, cache, workers):
    here = ShardStream(folder, 5, block=0)
    there = ShardStream(TrainingSet(f"{server.address}/one", cache=cache), 5, workers=workers)
    assert keys_of(there, 8) == keys_of(here, 8)
    assert there.state_dict() == here.state_dict()
    assert tars(server.requests) == {f"one/shard-00000{n}.tar": 1 for n in range(5)}
    assert not list(cache.folder.glob("*.partial"))


def test_a_second_run_on_the_node_requests_only_the_manifest(server, cache):
    for _ in range(2):
        keys_of(ShardStream(TrainingSet(f"{server.address}/one", cache=cache), 5), 4)
        requests = dict(server.requests)
        server.requests.clear()
    assert requests == {"one/manifest.json": 1}


def test_files_of_one_name_in_two_folders_are_two_files(server, cache):
    """The webdataset library's cache goes by the last part of the name."""
    data = TrainingSet([f"{server.address}/one", f"{server.address}/two"], cache=cache)
    found = keys_of(ShardStream(data, 10), 4)
    assert sorted(found) == sorted(f"{letter}{n:02}" for letter in "rs" for n in range(20))


@pytest.mark.parametrize("fault", ["busy", "cut", "altered"])
def test_failed_and_damaged_downloads_are_requested_again(server, cache, tmp_path, fault):
    server.faults = {
        "one/shard-000001.tar": [fault] * 2,
        "one/shard-000002.parquet": [fault],
        "one/manifest.json": ["busy"],
    }
    stream = ShardStream(TrainingSet(f"{server.address}/one", cache=cache), 5, quarantine=tmp_path / "q.jsonl")
    assert sorted(keys_of(stream, 4)) == [f"r{n:02}" for n in range(20)]
    assert server.requests["one/shard-000001.tar"] == 3 and server.requests["one/shard-000002.parquet"] == 2
    assert not (tmp_path / "q.jsonl").exists()


@pytest.mark.parametrize(("fault", "told"), [("altered", "sha256"), ("busy", "in 5 attempts"), ("gone", "missing")])
def test_a_shard_that_never_arrives_whole_costs_its_own_samples(server, cache, tmp_path, fault, told):
    if fault == "gone":
        (server.root / "one" / "shard-000001.tar").unlink()
    server.faults = {"one/shard-000001.tar": [fault] * 99} if fault != "gone" else {}
    data = TrainingSet(f"{server.address}/one", cache=cache)
    stream = ShardStream(data, 5, quarantine=tmp_path / "q.jsonl", max_bad_share=0.9)
    assert {f"r{n:02}" for n in range(20)} - set(keys_of(stream, 4)) == {"r04", "r05", "r06", "r07"}
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(told in line for line in lines)
    assert server.requests["one/shard-000001.tar"] == (1 if fault == "gone" else remote.RETRIES)
    assert not list(cache.folder.glob("*.partial"))


def test_a_missing_manifest_gives_a_one_line_error_after_one_request(server, cache):
    with pytest.raises(DataError, match=r"/none/manifest\.json; copy a whole shard folder") as error:
        TrainingSet(f"{server.address}/none", cache=cache)
    assert "\n" not in str(error.value) and server.requests["none/manifest.json"] == 1


def test_an_unknown_protocol_gives_a_one_line_error():
    with pytest.raises(DataError, match=r"\.\[remote\]"):
        TrainingSet("nosuch://bucket/shards")


# -- The cache's bounds and neighbours ------------------------------------------------------------------------------------


def held_bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder) if not entry.name.startswith("."))


def test_the_cache_stays_within_its_bounds_and_drops_what_was_used_longest_ago(server, tmp_path, monkeypatch):
    shards = read_manifest(server.root / "one").shards
    index = max((server.root / "one" / shard.index).stat().st_size for shard in shards)
    bound = 3 * shards[0].bytes + 4 * index
    cache = ShardCache(tmp_path / "cache", gigabytes=bound / 1e9)
    highest, load = [], remote._download

    def download(*told) -> None:
        load(*told)
        highest.append(held_bytes(cache.folder))

    monkeypatch.setattr(remote, "_download", download)
    reader = ShardReader(f"{server.address}/one", cache)
    for sample in (0, 4, 8):
        reader[sample]
    ShardReader(f"{server.address}/one", cache)[0]
    reader[12]
    assert max(highest) <= bound
    server.requests.clear()
    again = ShardReader(f"{server.address}/one", cache)
    for sample in (0, 8, 12, 4):
        again[sample]
    assert tars(server.requests) == {"one/shard-000001.tar": 1}
    deleted = [os.readlink(f"/proc/self/fd/{tar.descriptor}") for tar in reader._tars.values()]
    reader[16]
    kept = [os.readlink(f"/proc/self/fd/{tar.descriptor}") for tar in reader._tars.values()]
    assert any(name.endswith("(deleted)") for name in deleted) and not any(name.endswith("(deleted)") for name in kept)


def test_a_shard_larger_than_the_cache_gives_a_one_line_error(server, tmp_path):
    reader = ShardReader(f"{server.address}/one", ShardCache(tmp_path / "cache", gigabytes=1e-5))
    with pytest.raises(DataError, match=r"raise data\.cache\.gigabytes") as error:
        reader[0]
    assert "\n" not in str(error.value)


def test_downloads_that_fit_one_at_a_time_do_not_deadlock(tmp_path, monkeypatch):
    """Both have asked before either is granted room. Two that died, their room granted, had the same addresses."""
    wanted = []
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 600)
        wanted.append((f"file://{tmp_path / name}", sha256_of(tmp_path / name), 600))
    cache, all_asked = ShardCache(tmp_path / "cache", gigabytes=1000 / 1e9), threading.Barrier(2)
    make_room, load, highest = ShardCache._make_room, remote._download, []

    def ask(*told):
        all_asked.wait(60)
        return make_room(*told)

    def download(*told) -> None:
        load(*told)
        highest.append(held_bytes(cache.folder))

    cache.folder.mkdir()
    for address, sha256, size in wanted:
        key = hashlib.sha256(f"{address}\n{sha256}".encode()).hexdigest()[:40]
        (cache.folder / f"{key}.{size}.partial").write_bytes(b"dead" * 100)
        (cache.folder / f".{key}").touch()
    monkeypatch.setattr(ShardCache, "_make_room", ask)
    monkeypatch.setattr(remote, "_download", download)
    results = queue.SimpleQueue()
    for one in wanted:
        threading.Thread(target=lambda one=one: results.put(os.pread(cache.open(*one), 600, 0)), daemon=True).start()
    assert {results.get(timeout=60) for _ in wanted} == {b"a" * 600, b"b" * 600}
    assert highest == [600, 600]


def test_a_full_cache_keeps_the_selections_that_lie_in_it(server, tmp_path):
    shard = read_manifest(server.root / "one").shards[0].bytes
    data = TrainingSet(f"{server.address}/one", "all", cache=ShardCache(tmp_path / "cache", (shard + 30_000) / 1e9))
    assert {key[0] for key in keys_of(ShardStream(data, 5), 8)} == {"r"}
    server.requests.clear()
    keys_of(ShardStream(data, 5), 8)
    assert server.requests, "nothing had to leave"
    assert len(list((tmp_path / "cache" / "selections").glob("*/items.bin"))) == 1


def read_all(address: str, folder: Path, gigabytes: float, sent) -> None:
    try:
        reader = ShardReader(address, ShardCache(folder, gigabytes))
        sent.put(sorted(reader[sample].key for sample in range(20)))
    except BaseException as error:
        sent.put(repr(error))  # a test that waits for this process is told
        raise


@pytest.mark.parametrize("roomy", [True, False])
def test_processes_of_a_node_share_the_cache(server, tmp_path, roomy):
    """Four of them at once: with room, every file comes once; without, all of them still get what they ask for."""
    size = read_manifest(server.root / "one").shards[0].bytes
    gigabytes, results = 1.0 if roomy else (size + 30_000) / 1e9, fork.SimpleQueue()
    arguments = (f"{server.address}/one", tmp_path / "cache", gigabytes, results)
    others = [fork.Process(target=read_all, args=arguments) for _ in range(4)]
    for other in others:
        other.start()
    found = [results.get() for _ in others]
    for other in others:
        other.join()
    assert found == [[f"r{n:02}" for n in range(20)]] * 4
    if roomy:
        assert set(tars(server.requests).values()) == {1}


def test_a_download_killed_in_the_middle_starts_again(server, tmp_path):
    server.faults = {"one/shard-000000.tar": ["held"]}
    folder = tmp_path / "cache"
    victim = fork.Process(target=read_all, args=(f"{server.address}/one", folder, 1.0, fork.SimpleQueue()))
    victim.start()
    assert server.reached.wait(20)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert len(list(folder.glob("*.partial"))) == 1  # it held the lock, and left the file
    server.released.set()
    reader = ShardReader(f"{server.address}/one", ShardCache(folder))
    assert [reader[sample].key for sample in (0, 4)] == ["r00", "r04"]
    assert not list(folder.glob("*.partial"))


def test_a_cache_that_cannot_be_written_gives_a_one_line_error(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache\.folder"):
        ShardReader(f"{server.address}/one", ShardCache(tmp_path / "file" / "cache"))[0]
    with pytest.raises(DataError, match="a variable in it is not set"):
        ShardCache("$NO_SUCH_VARIABLE/shards")


# -- Staging, S3 --------------------------------------------------------------------------------------------------------


def test_staging_takes_a_slow_disk_to_a_fast_one_and_checks_hashes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    slow = shutil.copytree(folder, tmp_path / "slow")
    with open(slow / "shard-000003.tar", "r+b") as tar:
        tar.seek(1000)  # inside an image's bytes or after it: no header shows it
        byte = tar.read(1)
        tar.seek(1000)
        tar.write(bytes([byte[0] ^ 1]))
    data = TrainingSet(str(slow), cache=ShardCache(tmp_path / "fast", stage=True))
    stream = ShardStream(data, 5, quarantine=tmp_path / "q.jsonl", max_bad_share=0.9)
    assert {f"r{n:02}" for n in range(20)} - set(keys_of(stream, 4)) == {"r12", "r13", "r14", "r15"}
    assert "sha256" in (tmp_path / "q.jsonl").read_text()
    shutil.rmtree(slow)
    assert len(keys_of(stream, 4)) == 20  # from the fast one


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of moto's S3 server -> its client; the addresses of this machine's real clouds are out of reach."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="pairs")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bucket_streams_as_the_same_folder_on_a_disk(folder, bucket, tmp_path, workers):
    for path in folder.iterdir():
        if path.is_file():
            bucket.upload_file(str(path), "pairs", f"train/{path.name}")
    cache = ShardCache(tmp_path / "cache")
    there = ShardStream(TrainingSet("s3://pairs/train", cache=cache), 5, workers=workers)
    assert keys_of(there, 6) == keys_of(ShardStream(folder, 5, block=0), 6)
    bucket.delete_object(Bucket="pairs", Key="train/shard-000000.tar")
    assert len(keys_of(ShardStream(TrainingSet("s3://pairs/train", cache=cache), 5), 4)) == 20  # it is here already
    with pytest.raises(DataError, match=r"no s3://pairs/nothing/manifest\.json"):
        TrainingSet("s3://pairs/nothing", cache=cache)
