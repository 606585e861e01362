"A folder or an address: files that appear whole or not at all, and errors in one line."
import errno, os, pickle, re, signal, subprocess, sys, threading, time

import pytest

from stjepa.core import InputError
from stjepa.storage import Storage, machine, reason


@pytest.fixture(params=["folder", "file url", "memory"])
def place(request, tmp_path):
    "The same tests on a folder, on a folder called by an address, and on a store."
    return Storage({"folder": tmp_path/"a b é", "file url": f"file://{tmp_path}/c", "memory": f"memory://{tmp_path.name}{id(request)}"}[request.param])


def test_what_is_written_is_read(place):
    for name, data in {"a": b"", "b/c/0/0": bytes(range(256)), "b/é x": b"1"}.items(): place.write(name, data); assert place.read(name) == data
    place.write("a", b"other"); assert place.read("a") == b"other"
    assert place.files() == {"a": 5, "b/c/0/0": 256, "b/é x": 1} and place.names() == ["a", "b"] and place.names("b") == ["c", "é x"] and place.names("none") == []
    assert place.read_all(["a", "none", "b/é x"]) == {"a": b"other", "b/é x": b"1"}
    place.remove("b"); place.remove("b"); assert place.names() == ["a"] and not place.exists("b") and place.exists()
    assert pickle.loads(pickle.dumps(place)).read("a") == b"other"


def test_ranges(place):
    place.write("x", bytes(range(100))); a, b, c = bytearray(10), bytearray(5), bytearray(10)
    assert place.read_into([("x", 20, [a, b]), ("x", 95, [c])]) == [15, 5]
    assert a + b == bytes(range(20, 35)) and c[:5] == bytes(range(95, 100))


def test_create_lets_one_win(place):
    won = []
    threads = [threading.Thread(target=lambda i=i: place.create("claim", str(i).encode()) and won.append(i)) for i in range(1 if not place.local else 8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(won) == 1 and place.read("claim") == str(won[0]).encode() and place.names() == ["claim"]


def test_two_remove_a_folder_while_a_third_writes_into_it(tmp_path):
    place, errors, stop = Storage(tmp_path), [], threading.Event()
    def often(f, expected=()):
        while not stop.is_set():
            try: f()
            except expected: pass
            except InputError as e: errors.append(e); return
    def write(): [place.write(f"fit/{i}", b"1") for i in range(8)]
    threads = [threading.Thread(target=often, args=a) for a in ((lambda: place.remove("fit"),), (lambda: place.remove("fit"),), (write, InputError))]
    for t in threads: t.start()
    time.sleep(.5); stop.set()
    for t in threads: t.join()
    place.remove("fit")
    assert not errors and not place.names()


@pytest.mark.parametrize("number,words", [(errno.ENOSPC, "the disk is full: free some space"), (errno.EDQUOT, "quota"), (errno.EACCES, "permission denied"), (errno.EROFS, "read-only")])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, number, words):
    place = Storage(tmp_path); place.write("x", b"old")
    def refuse(fd): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=rf"^{tmp_path}/x: .*{words}") as e: place.write("x", b"new")
    assert "\n" not in str(e.value) and os.listdir(tmp_path) == ["x"] and place.read("x") == b"old"


def test_a_file_the_system_refuses_to_grow(tmp_path):
    "A real refusal in the middle of a write: the limit on a file's size."
    code = f"import resource, signal; from stjepa.storage import Storage; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); Storage({str(tmp_path)!r}).write('x', bytes(10**6))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(f"stjepa.core.InputError: {tmp_path}/x: no file may become as large here: raise ulimit -f") and os.listdir(tmp_path) == []


def as_nobody(code):
    "Run code as a user without rights."
    lower = "import os, fsspec; from stjepa.core import InputError; from stjepa.storage import Storage; os.getuid() or os.setuid(65534)"
    return subprocess.run([sys.executable, "-c", f"{lower}\n{code}"], capture_output=True, text=True)


def test_permission_denied_is_one_line(tmp_path):
    place = Storage(tmp_path/"c"); place.write("x", b"1")
    for folder in [tmp_path, *tmp_path.parents][:3]: folder.chmod(0o755) # pytest's own are closed to others
    try:
        (tmp_path/"c/x").chmod(0); (tmp_path/"c").chmod(0o555)
        calls = "s.read('x'); s.write('y', b'1'); s.read_into([('x', 0, [bytearray(1)])]); s.create('z', b'1')".split("; ")
        done = as_nobody(f"""s = Storage({str(tmp_path/'c')!r})
for call in {calls}:
    try: eval(call)
    except InputError as e: print(e)""")
        assert done.stdout.splitlines() == [f"{tmp_path}/c/{name}: permission denied" for name in "xyxz"], done.stderr
    finally: (tmp_path/"c").chmod(0o755)


WRITER = "import sys, time, os; from stjepa.storage import Storage; os.fsync = lambda fd: (print('writing', flush=True), time.sleep(60)); Storage(sys.argv[1]).write('a/x', b'half')"

def test_partials_of_a_killed_writer_are_removed_and_of_a_live_one_kept(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "writing\n"
        [part] = [p.name for p in (tmp_path/"a").iterdir()]
        assert re.fullmatch(rf"\.x\.{machine()}-{writer.pid}-\d+\.part", part)
        assert Storage(tmp_path).clean_partials(max_age_s=0) == [] # alive, however old
        writer.send_signal(signal.SIGKILL); writer.wait()
        assert Storage(tmp_path).clean_partials() == [f"a/{part}"] and not any((tmp_path/"a").iterdir())
    finally: writer.kill(); writer.wait()


@pytest.mark.parametrize("name", [".x.0123abcd-77-1.part", ".x.part", "0.abc.partial", ".x.77.part"])
def test_partials_of_other_machines_are_removed_by_age(tmp_path, name):
    (tmp_path/name).write_bytes(b"half"); place = Storage(tmp_path)
    assert place.clean_partials() == []
    os.utime(tmp_path/name, (time.time() - 3700,)*2)
    assert place.clean_partials() == [name]


@pytest.mark.parametrize("url,words", [("nothing://x/y", "Protocol not known: nothing"), ("gs://x/y", "pip install gcsfs"), ("s3://x/y", "pip install s3fs")])
def test_addresses_that_cannot_be_used(url, words, monkeypatch):
    import fsspec.registry
    for name, protocol in (("gcsfs", "gs"), ("s3fs", "s3")):
        monkeypatch.setitem(sys.modules, name, None); monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(InputError, match=words) as e: Storage(url).read("zarr.json")
    assert "\n" not in str(e.value)


def test_reasons_are_one_line():
    assert reason(ValueError("a\nb")) == "ValueError: a" and reason(KeyError()) == "KeyError: no message"


# -- past the system's cache

LARGE = [bytes([i]) * n for i, n in enumerate((9_000_001, 3, 1_204_224, 4))]

@pytest.mark.parametrize("where", ["open", "write"])
def test_a_file_system_without_direct_writing(tmp_path, monkeypatch, where):
    "Some refuse such a file, some the first write to it: the bytes are the same."
    import errno, fcntl
    real, refusals = getattr(os, where), []
    def refusing(x, *args):
        if (args[0] if where == "open" else fcntl.fcntl(x, fcntl.F_GETFL)) & getattr(os, "O_DIRECT", 0):
            refusals.append(x); raise OSError(errno.EINVAL, "Invalid argument")
        return real(x, *args)
    monkeypatch.setattr(os, where, refusing)
    Storage(tmp_path).write("large", LARGE)
    assert (tmp_path/"large").read_bytes() == b"".join(LARGE) and len(refusals) == (1 if getattr(os, "O_DIRECT", 0) else 0)

def test_a_disk_that_fills_up_under_a_large_file(tmp_path, monkeypatch):
    import errno
    storage, real, written = Storage(tmp_path), os.write, []
    storage.write("large", LARGE[:1])
    def full(fd, data):
        written.append(len(data))
        if len(written) > 1: raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match="the disk is full"): storage.write("large", LARGE)
    assert len(written) == 2 and storage.names() == ["large"] and (tmp_path/"large").read_bytes() == LARGE[0]
