"stjepa_cache on folders and on a real object-store server; a cache in a bucket is written and read by the same code."
import dataclasses, json, os, shutil, socket, subprocess, sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pytest, torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from stjepa.build_cache import BuildConfig, build_cache
from stjepa.cache import Cache, Damaged, extend_cache, finish_extending, finished_shards, mark_name, unmark
from stjepa.cache_tool import CacheConfig, cache_tool, scan
from stjepa.core import InputError
from stjepa.storage import Storage
from test_cache import Rows, contents, flipped, make


@pytest.fixture
def small(tmp_path): return make(tmp_path/"c", failed=(6,))


def files(place): return {name: Storage(place).read(name) for name in Storage(place).files()}
def hurt(path, name, at=9): (path/name).write_bytes(flipped(path/name, at))


# -- a folder

def test_info(small, capsys):
    found = cache_tool(CacheConfig("info", str(small[0]), json=True)); said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps(found)) and (said["rows"], said["ok"], said["failed"], said["missing"], said["frames"], said["grid"], said["dim"]) == (10, 9, 1, 0, True, [3, 2, 2], 6)
    assert said["bytes"] == sum(p.stat().st_size for p in small[0].rglob("*") if p.is_file()) and said["teacher"]["name"] == "t" and said["fingerprint"] == Cache(small[0]).fingerprint
    unmark(small[0], [0]); cache_tool(CacheConfig("info", str(small[0]))); text = capsys.readouterr().out
    assert "missing        4\n" in text and "missing_shards 1\n" in text and "fingerprint" in text


@pytest.mark.parametrize("num_workers", [1, 2])
def test_verify_finds_what_is_bad_and_only_that(tmp_path, capsys, num_workers):
    path = make(tmp_path/"c", views=4)[0] # 10 shards
    assert cache_tool(CacheConfig("verify", str(path), num_workers=num_workers))["shards"] == 10
    hurt(path, "targets/c/1/0/0"); hurt(path, "frames/c/3/0/0/0/0", 8*(768 + 4) + 5); (path/"targets/c/4/0/0").unlink(); hurt(path, "status/c/5", 3); os.truncate(path/mark_name(6), 50); (path/mark_name(7)).unlink()
    bad = {s: [row for row, _ in rows] for s, rows in scan(str(path), num_workers).items()}
    assert bad == {1: [4], 3: [13], 4: [16, 17, 18, 19], 5: [None], 6: [None]}
    with pytest.raises(InputError, match=r"8 damaged in shards 1, 3, 4, 5, 6; run stjepa_cache repair .*, then build again$"): cache_tool(CacheConfig("verify", str(path), num_workers=num_workers))
    assert "shard 3, row 13: " in capsys.readouterr().out


def test_repair_drops_what_is_bad(tmp_path):
    path = make(tmp_path/"c", views=4)[0]; before = contents(path)
    assert cache_tool(CacheConfig("repair", str(path), num_workers=1)) == dict(dropped=[], restored=[], removed=[]) and contents(path) == before
    hurt(path, "targets/c/1/0/0"); hurt(path, "status/c/5", 3); (path/"frames/zarr.json").write_text("{}"); (path/"targets/c/2/0/.0.part").write_bytes(b"half"); os.utime(path/"targets/c/2/0/.0.part", (0, 0))
    assert cache_tool(CacheConfig("repair", str(path), num_workers=1)) == dict(dropped=[1, 5], restored=["frames"], removed=["targets/c/2/0/.0.part"])
    assert {n: d for n, d in before.items() if n in contents(path)} == contents(path)
    assert {n for n in before if n not in contents(path)} == {n for n in before for s in (1, 5) if f"/c/{s}/" in n or n.endswith(f"/c/{s}") or n == mark_name(s)}
    for s in finished_shards(path)[:5]: hurt(path, f"targets/c/{s}/0/0")
    with pytest.raises(InputError, match="5 of 8 shards are bad.*--force"): cache_tool(CacheConfig("repair", str(path), num_workers=1))
    assert len(finished_shards(path)) == 8


def test_a_damaged_projection_is_found_and_not_dropped(small):
    hurt(small[0], "projection.safetensors", -9); before = contents(small[0])
    for action in ("verify", "repair"):
        with pytest.raises(InputError, match="projection.safetensors: hash .*restore that file"): cache_tool(CacheConfig(action, str(small[0]), num_workers=1))
    assert contents(small[0]) == before


def test_trouble_with_reading_is_not_damage(small, monkeypatch):
    "A store that does not answer must not make repair throw good shards away."
    def refuse(self, pieces): raise InputError("s3://b/c: ConnectionError: no answer")
    monkeypatch.setattr(Storage, "read_into", refuse)
    with pytest.raises(InputError, match="no answer"): cache_tool(CacheConfig("repair", str(small[0])))
    assert finished_shards(small[0]) == [0, 1, 2]


def test_stats(small, tmp_path):
    cache_tool(CacheConfig("stats", str(small[0]), out=str(tmp_path/"looks"), clips=5)); out = tmp_path/"looks"
    found = json.loads((out/"stats.json").read_text())
    assert found["rows"] == 5 and len(found["mean"]) == len(found["std"]) == 6 and {p.name for p in out.iterdir()} == {"stats.json", "stats.png", "clips.png"}
    assert all((out/n).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for n in ("stats.png", "clips.png"))
    with pytest.raises(InputError, match="needs --out"): cache_tool(CacheConfig("stats", str(small[0])))


def test_export(small, tmp_path):
    path, truth, _ = small
    cache_tool(CacheConfig("export", str(path), out=str(tmp_path/"x.npy"))); ok = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert np.load(tmp_path/"x.npy").tobytes() == truth[ok].tobytes()
    cache_tool(CacheConfig("export", str(path), out=str(tmp_path/"x.safetensors"), rows="7-9, 0", ids="é4"))
    with safe_open(tmp_path/"x.safetensors", "np") as f:
        assert f.get_tensor("targets").tobytes() == truth[[7, 8, 9, 0, 4]].tobytes() and f.get_tensor("rows").tolist() == [7, 8, 9, 0, 4] and f.get_tensor("labels").tolist() == [6, 7, 8, -1, 3]
        assert json.loads(f.metadata()["ids"]) == ["é7", "é8", "é9", "é0", "é4"]
    for options, message in ((dict(rows="1-"), "expected numbers and ranges"), (dict(rows="3-1"), "rows from 0 to 9"), (dict(rows="10"), "rows from 0 to 9"), (dict(ids="x"), "no clip 'x'"), (dict(rows="6"), "row 6 .é6. has no target")):
        with pytest.raises(InputError, match=message): cache_tool(CacheConfig("export", str(path), out=str(tmp_path/"y.npy"), **options))
    with pytest.raises(InputError, match="safetensors or .npy"): cache_tool(CacheConfig("export", str(path), out=str(tmp_path/"y.pt")))
    assert not any(p.name.startswith((".", "y")) for p in tmp_path.iterdir())
    (tmp_path/"file").write_text("")
    for action, out in (("export", "x.npy"), ("export", "x.safetensors"), ("stats", "looks")):
        with pytest.raises(InputError, match=f"^{tmp_path}/file/{out}: a file stands where a folder is expected$"): cache_tool(CacheConfig(action, str(path), out=str(tmp_path/"file"/out)))


def test_the_command(small, tmp_path, command):
    done = command("stjepa_cache", "info", small[0])
    assert done.returncode == 0 and done.stdout.startswith("path ") and not done.stderr
    hurt(small[0], "targets/c/1/0/0"); done = command("stjepa_cache", "verify", small[0])
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"stjepa_cache: error: {small[0]}: 1 damaged in shards 1; run stjepa_cache repair {small[0]}, then build again"
    with pytest.raises(InputError, match=f"^cache {tmp_path}/none: no such folder$"): cache_tool(CacheConfig("info", str(tmp_path/"none")))


# -- a bucket

@pytest.fixture(scope="module")
def bucket():
    "An S3 server of this machine's own, found as a user's would be: by the environment."
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False); server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as env:
        for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]: env.delenv(name)
        for name, value in dict(AWS_ACCESS_KEY_ID="me", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=f"http://{host}:{port}").items(): env.setenv(name, value)
        import s3fs
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    server.stop(); s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return contents(make(tmp_path_factory.mktemp("whole")/"c")[0])


def test_a_bucket_holds_what_a_folder_holds(bucket, tmp_path):
    url = f"{bucket}/é/same"; _, truth, frames = make(url, failed=(6,)); make(tmp_path/"c", failed=(6,))
    assert files(url) == contents(tmp_path/"c")
    for verify in ("always", "first", "never"):
        cache = Cache(url, verify=verify)
        assert cache.targets_of([9, 0, 4]).numpy().tobytes() == truth[[9, 0, 4]].tobytes() and (cache.frames(5).numpy() == frames[5]).all() and cache.targets(3).numpy().tobytes() == truth[3].tobytes()
    with pytest.raises(InputError, match="row 6 .é6. has no target: 6.webm: no video"): cache.targets(6)
    with pytest.raises(InputError, match="no such folder"): Cache(f"{bucket}/none")
    import zarr
    assert zarr.open_group(url, mode="r")["targets"][4].tobytes() == truth[4].tobytes()


def test_forked_workers_read_a_bucket(bucket):
    url = f"{bucket}/workers"; _, truth, _ = make(url); cache = Cache(url); cache.targets(0)
    found = [x for x, _ in DataLoader(Rows(cache), batch_size=5, num_workers=2, multiprocessing_context=get_context("fork"))]
    assert torch.cat(found).numpy().tobytes() == truth.tobytes()


@pytest.mark.parametrize("change,message", [
    (lambda p: p.write("targets/c/1/0/0", flipped_bytes(p.read("targets/c/1/0/0"), 77)), "shard 1, row 4: its checksum does not match"),
    (lambda p: p.write("targets/c/1/0/0", p.read("targets/c/1/0/0")[:200]), "length is not what was written"),
    (lambda p: p.write("targets/c/1/0/0", p.read("targets/c/1/0/0") + b"x"), "length is not what was written"),
    (lambda p: p.write("targets/c/1/0/0", p.read("targets/c/0/0/0")), "shard 1, row 4: its checksum does not match"),
    (lambda p: p.remove("targets/c/1/0/0"), "targets/c/1/0/0: no such file, though its shard is marked done"),
    (lambda p: p.remove("status/c/1"), "status/c/1: missing"), (lambda p: p.write(mark_name(1), b"{"), "shard-00001.json: missing or torn")])
def test_damage_in_a_bucket_is_refused(bucket, whole, change, message):
    place = Storage(f"{bucket}/hurt"); place.remove("")
    for name, data in whole.items(): place.write(name, data)
    change(place)
    with pytest.raises(Damaged, match=message + ".*run stjepa_cache repair s3://bucket/hurt, then build again"): Cache(place).targets(4)
    assert cache_tool(CacheConfig("repair", str(place), num_workers=1))["dropped"] == [1] and Cache(place, partial=True).missing_shards == [1]


def flipped_bytes(data, at): return data[:at] + bytes([data[at] ^ 4]) + data[at + 1:]


def test_a_build_into_a_bucket(bucket, toy, tmp_path):
    "The job itself, once into a folder and once into a bucket; then the command line on it."
    config = BuildConfig(str(toy/"ssv2"), str(tmp_path/"c"), teacher=str(toy/"teacher"), dim=16, num_workers=0, shard_rows=8, device="cpu", dtype="int8")
    build_cache(config); url = f"{bucket}/built"; build_cache(dataclasses.replace(config, cache_dir=url))
    assert files(url) == contents(tmp_path/"c")
    unmark(url, [1]); assert build_cache(dataclasses.replace(config, cache_dir=url))["clips"] == 8 and files(url) == contents(tmp_path/"c")


def test_the_command_on_a_bucket(bucket, tmp_path):
    url = f"{bucket}/command"; _, truth, _ = make(url)
    done = subprocess.run([sys.executable, "-c", "from stjepa.cache_tool import main; main()", "verify", url], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{url}: every row is what was written\n"), done.stderr
    assert cache_tool(CacheConfig("info", url))["ok"] == 10
    cache_tool(CacheConfig("export", url, out=str(tmp_path/"x.npy"), rows="2-4")); assert np.load(tmp_path/"x.npy").tobytes() == truth[2:5].tobytes()
    cache_tool(CacheConfig("stats", url, out=str(tmp_path/"looks"))); assert (tmp_path/"looks/stats.json").exists()


def test_a_bucket_of_google(toy, tmp_path, monkeypatch):
    "The same through gcsfs: a build, another read of it, a lost object, and what mends it."
    from gcp_storage_emulator.server import create_server
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"); server.start()
    try:
        for name, value in dict(STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{port}", NO_GCE_CHECK="true", GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false").items(): monkeypatch.setenv(name, value)
        import gcsfs
        config, url = BuildConfig(str(toy/"ssv2"), str(tmp_path/"c"), teacher=str(toy/"teacher"), dim=16, num_workers=0, limit=4, shard_rows=2, device="cpu", store_frames=True), "gs://bucket/é/c"
        build_cache(config); build_cache(dataclasses.replace(config, cache_dir=url)); here, there = Cache(tmp_path/"c"), Cache(url)
        assert files(url) == contents(tmp_path/"c") and torch.equal(there.targets_of(range(4)), here.targets_of(range(4))) and torch.equal(there.frames(3), here.frames(3))
        Storage(url).remove("targets/c/1/0/0")
        with pytest.raises(Damaged, match="gs://bucket/é/c/targets/c/1/0/0: no such file, though its shard is marked done; run stjepa_cache repair gs://bucket/é/c, then build again"): Cache(url).targets(2)
        assert cache_tool(CacheConfig("repair", url, num_workers=1))["dropped"] == [1] and build_cache(dataclasses.replace(config, cache_dir=url))["clips"] == 2 and files(url) == contents(tmp_path/"c")
        with pytest.raises(InputError, match="cache gs://bucket/none: no such folder"): Cache("gs://bucket/none")
    finally: server.stop(); gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_store_that_cannot_be_read_is_one_line(bucket, tmp_path, monkeypatch):
    import fsspec.config, s3fs
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name, value in dict(AWS_EC2_METADATA_DISABLED="true", AWS_MAX_ATTEMPTS="1", AWS_SHARED_CREDENTIALS_FILE=str(tmp_path/"no"), AWS_CONFIG_FILE=str(tmp_path/"no")).items(): monkeypatch.setenv(name, value)
    def refused(url, **env):
        with monkeypatch.context() as m:
            for name, value in env.items(): m.delenv(name) if value is None else m.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            with pytest.raises(InputError) as e: Cache(url)
        s3fs.S3FileSystem.clear_instance_cache()
        assert "\n" not in str(e.value)
        return str(e.value)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); closed = f"http://127.0.0.1:{s.getsockname()[1]}"
    assert refused("s3://bucket/x", AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None) == "s3://bucket/x: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your store"
    assert "Could not connect to the endpoint" in refused("s3://bucket/x", AWS_ENDPOINT_URL=closed)
    monkeypatch.setattr(fsspec.config, "conf", conf := {}); fsspec.config.set_conf_env(conf, {"FSSPEC_S3_ENDPOINT_URL": endpoint})
    assert refused("s3://bucket/x", AWS_ENDPOINT_URL=closed) == "cache s3://bucket/x: no such folder" # fsspec's own name for the endpoint


def test_a_cache_that_was_extended(cache_dir, tmp_path, capsys):
    "`info` says from how many rows; `repair` finishes what was broken off; an edited plan is refused."
    path = shutil.copytree(cache_dir, tmp_path/"c"); old = Cache(path); more = [*old.ids, "new"], [*old.labels, None], old.meta["dataset"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("stjepa.cache.finish_extending", lambda path: None); extend_cache(path, *more) # killed before it did anything
    assert len(Cache(path)) == len(old), "still the old one"
    plan = json.loads((path/"extend.json").read_text())
    (path/"extend.json").write_text(json.dumps(plan | dict(labels=[])))
    with pytest.raises(InputError, match="extend.json: not what was written; remove it"): finish_extending(path)
    (path/"extend.json").write_text(json.dumps(plan))
    cache_tool(CacheConfig("repair", str(path)))
    assert cache_tool(CacheConfig("info", str(path)))["grown_from"] == [len(old)] and not (path/"extend.json").exists()
    assert f"grown_from     [{len(old)}]" in capsys.readouterr().out and len(Cache(path, partial=True)) == len(old) + 1
