"The four datasets in their packagings: records, labels, captions, what is refused, and frames that are the same on every read."
import csv, gc, gzip, io, json, os, pickle, shutil
from pathlib import Path

import numpy as np, pytest, torch
from stjepa.captions import msrvtt, msvd
from stjepa.core import InputError
from stjepa.records import read_skip, scan_files, skipped_rows, summary
from stjepa.ssv2 import ssv2
from stjepa.ucf101 import ucf101
from stjepa.video import View, load_clip, loader, to_pixels, write_video

CLASSES = {"Moving something up": "2", "Moving something down": "0", "Taking one of many similar things on the table": "1"}
ROWS = [("1", "Moving [something] up"), ("22", "Moving [something] down"), ("-3", "Taking [one of many similar things on the table]")]
BOM = b"\xef\xbb\xbf"

def clip(n=20, h=60, w=107, seed=0):
    rng = np.random.default_rng(seed); base = rng.integers(30, 220, (6, 11, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)[:h, :w]
    return np.stack([np.roll(base, 2*i, 1) for i in range(n)])

@pytest.fixture(scope="module")
def webm(tmp_path_factory): return write_video(tmp_path_factory.mktemp("source")/"clip.webm", np.pad(clip(w=106), ((0, 0), (0, 0), (0, 1), (0, 0)), mode="edge"))

def write(path, value, newline="\n", head=b""):
    "A list as some editor saves it: text, json, gzipped where the name says so."
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    raw = head + text.replace("\n", newline).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)

def refused(read, *contains):
    "The one line that `read` is refused with."
    with pytest.raises(InputError) as e: read()
    assert "\n" not in str(e.value) and all(c in str(e.value) for c in contains), str(e.value)

# -- SSv2

def make_ssv2(root, webm, labels="", videos="", prefix="", suffix=".webm", **text):
    def save(name, value): write(root/labels/f"{prefix}{name}.json", value, **text)
    save("labels", CLASSES)
    for split in ("train", "validation"): save(split, [dict(id=id, label="x", template=t, placeholders=["é"]) for id, t in ROWS])
    save("test", [dict(id=id) for id, _ in ROWS])
    (root/videos).mkdir(parents=True, exist_ok=True)
    for id, _ in ROWS: shutil.copy(webm, root/videos/f"{id}{suffix}")
    return root

@pytest.mark.parametrize("layout", [dict(), dict(labels="labels", videos="20bn-something-something-v2"), dict(prefix="something-something-v2-", newline="\r\n"), dict(head=BOM, suffix=".MP4"),
                                    dict(labels="labels", prefix="something-something-v2-", videos="a/b/c", suffix=".mp4", newline="\r\n", head=BOM)], ids=str)
def test_ssv2_packagings(tmp_path, webm, layout):
    root = make_ssv2(tmp_path/"ssv2", webm, **layout)
    data = ssv2(root)
    assert data.classes == ["Moving something down", "Taking one of many similar things on the table", "Moving something up"]
    assert [(r.id, r.label) for r in data.records] == [("1", 2), ("22", 0), ("-3", 1)] and not data.missing
    assert all(r.path.is_file() and r.path.is_relative_to(root) for r in data.records)
    assert [r.label for r in ssv2(root, "test").records] == [None]*3
    assert ssv2(root).fingerprint == data.fingerprint != ssv2(root, "validation").fingerprint
    assert ssv2(root, limit=2).records == data.records[:2]

def test_ssv2_mixed_packaging(tmp_path, webm):
    "Lists partly prefixed, partly in labels/, videos of both suffixes in two folders; the list at the root wins."
    root = make_ssv2(tmp_path/"ssv2", webm, labels="labels", videos="one")
    (root/"labels/labels.json").rename(root/"something-something-v2-labels.json"); (root/"two").mkdir(); (root/"one/22.webm").rename(root/"two/22.mp4")
    write(root/"train.json", [dict(id="22", template=ROWS[0][1])])
    assert [(r.label, r.path.name) for r in ssv2(root).records] == [(2, "22.mp4")] and len(ssv2(root, "validation")) == 3

@pytest.mark.parametrize("text", [dict(), dict(newline="\r\n"), dict(head=BOM)], ids=str)
def test_ssv2_answers(tmp_path, webm, text):
    root = make_ssv2(tmp_path/"ssv2", webm, labels="labels")
    answers = [f"{id};{t.replace('[', '').replace(']', '')}\n" for id, t in ROWS]
    write(root/"labels/test-answers.csv", "".join(answers), **text)
    assert [r.label for r in ssv2(root, "test").records] == [2, 0, 1]
    write(root/"labels/test-answers.csv", "".join(answers[:2])); refused(lambda: ssv2(root, "test"), "test.json record -3", "an answer in test-answers.csv")
    write(root/"labels/test-answers.csv", "1;Eating something\n"); refused(lambda: ssv2(root, "test"), "test-answers.csv line 1", "'Eating something'")

@pytest.mark.parametrize("named", [True, False])
def test_ssv2_csv_lists(tmp_path, webm, named):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="mp4s", suffix=".mp4")
    for name in ("train", "validation", "test", *(() if named else ("labels",))): (root/f"{name}.json").unlink()
    write(root/"lists/train.csv", "1.mp4 2\n22.mp4 0\n", newline="\r\n"); write(root/"lists/val.csv", "/data/my disk/-3.mp4 1\n"); write(root/"lists/test.csv", "../../1.webm 1")
    assert [(r.id, r.label, r.path.name) for r in ssv2(root).records] == [("1", 2, "1.mp4"), ("22", 0, "22.mp4")]
    assert [(r.id, r.label) for s in ("validation", "test") for r in ssv2(root, s).records] == [("-3", 1), ("1", 1)]
    assert ssv2(root).classes[1] == ("Taking one of many similar things on the table" if named else "class 1") and len(ssv2(root).classes) == (3 if named else 174)
    write(root/"lists/train.csv", "1.mp4 0\n22.mp4 174\n"); refused(lambda: ssv2(root), "train.csv line 2", "class 174, expected 0 to")
    write(root/"lists/train.csv", "1.mp4,0\n"); refused(lambda: ssv2(root), "train.csv line 1", "expected '<id>.mp4 <class>'")

@pytest.mark.parametrize("num_workers", [0, 2])
def test_ssv2_loader_sampling_is_deterministic_and_shaped(tmp_path, webm, num_workers):
    data, view = ssv2(make_ssv2(tmp_path/"ssv2", webm)), View()
    first, second = (list(loader(data.records, view, batch_size=2, num_workers=num_workers)) for _ in range(2))
    assert [b["frames"].shape for b in first] == [(2, 16, 224, 224, 3), (1, 16, 224, 224, 3)]
    for a, b in zip(first, second):
        assert a["frames"].dtype == torch.uint8 and (a["frames"] == b["frames"]).all() and a["errors"] == []
        assert a["rows"].tolist() == b["rows"].tolist() and (a["num_frames"] == 20).all()
        assert (a["indices"] == torch.tensor([(2*i + 1)*20 // 32 for i in range(16)])).all() and (a["indices"] == b["indices"]).all()
    pixels = to_pixels(first[0]["frames"], view)
    assert pixels.shape == (2, 16, 3, 224, 224) and pixels.dtype == torch.float32 and pixels.isfinite().all()

UP = '[{"id": "1", "template": "Moving [something] up"}'
@pytest.mark.parametrize("name,text,message", [
    ("labels", '["a"]', "expected a json dict, found list"), ("labels", "{}", "the dict is empty"), ("labels", "<html>", "not json"),
    ("labels", '{"a": "1"}', "none has the number 0"), ("labels", '{"a": "0", "b": "0"}', "both have the number 0"), ("labels", '{"a": "0", "b": "00"}', "none has the number 1"),
    ("labels", '{"a": "x"}', "digits in quotes"), ("labels", '{"a": 0}', "has the number 0, expected digits in quotes"), ("labels", '{"a": ["0"]}', "digits in quotes"),
    ("labels", '{"Moving [something] up": "0"}', "has brackets"), ("labels", '{"0": "Moving something up"}', "has the number 'Moving something up'"),
    ("labels", f'{{"a": "{"9"*9999}"}}', "none has the number 0"), ("train", "["*99_999, "not json"), ("train", "[]", "the list is empty"), ("train", "", "not json"),
    ("train", '{"videos": []}', "expected a json list, found dict"), ("train", "[1]", "record 0: expected an object with an id"), ("train", '[{"id": 1}]', "record 0: expected an object with an id"),
    ("train", '[{"id": ""}]', "with an id"), ("train", '[{"id": "a\\nb"}]', "with an id"), ("train", '[{"id": "\\ud800"}]', "with an id"), ("train", '[{"id": "1\\u0000"}]', "with an id"),
    ("train", '[{"id": "1", "template": "Eating [something]"}]', "record 1: template 'Eating [something]', expected one of labels.json"),
    ("train", '[{"id": "1", "template": 7}]', "record 1: template 7"), ("train", '[{"id": "1"}]', "record 1: template None"),
    ("train", '[{"id": "77", "template": "Moving [something] up"}]', "no video found for any of the 1 records"), ("train", UP + "," + UP[1:] + "]", "id 1 comes twice")])
def test_ssv2_refusals_name_the_file(tmp_path, webm, name, text, message):
    root = make_ssv2(tmp_path/"ssv2", webm); write(root/f"{name}.json", text)
    refused(lambda: ssv2(root), message, str(root) if "no video" in message else str(root/f"{name}.json"))

# -- files and ids

class Entry:
    "A directory entry that notes when it is asked for a stat."
    def __init__(self, entry, calls): self.entry, self.calls = entry, calls
    def __getattr__(self, name):
        if name == "stat": self.calls.append(self.entry.path)
        return getattr(self.entry, name)

def test_finding_files_does_not_stat_them(tmp_path, webm, monkeypatch):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="videos")
    for i in range(100, 2100): (root/f"videos/{i}.webm").touch()
    write(root/"train.json", [dict(id=str(i), template=ROWS[0][1]) for i in range(100, 2100)])
    calls, real = [], {name: getattr(os, name) for name in ("stat", "lstat", "scandir", "open")}
    for name in ("stat", "lstat", "open"): monkeypatch.setattr(os, name, lambda *a, _name=name, **k: calls.append(a) or real[_name](*a, **k))
    monkeypatch.setattr(os, "scandir", lambda path: [Entry(e, calls) for e in real["scandir"](path)])
    data = ssv2(root)
    monkeypatch.undo()
    assert len(data) == 2000 and len(calls) < 50

def test_ids_never_leave_the_root(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm); shutil.copy(webm, tmp_path/"out.webm")
    ids = ["../out", str(tmp_path/"out"), "1", "1/../../out", "1.webm", "..\\out", "~/out", "file:///out"]
    write(root/"train.json", [dict(id=i, template=ROWS[0][1]) for i in ids])
    data = ssv2(root)
    assert [r.id for r in data.records] == ["1"] and data.missing == [i for i in ids if i != "1"]

ODD = ["-4w", "--help", "_a", "a b", " a", "it's", 'a"b', "a&b?c=d+e%20f", "a;b,c|d$e`f*[g]", "v1.5", "CASE", "case", "😀", "ü" , "é", "①"]
def test_odd_names_are_read_as_they_are(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="videos")
    for i in ODD: shutil.copy(webm, root/f"videos/{i}.webm")
    write(root/"train.json", [dict(id=i, template=ROWS[0][1]) for i in ODD])
    data = ssv2(root)
    assert [r.id for r in data.records] == ODD == [r.path.name[:-5] for r in data.records]
    batches = list(loader(data.records, View(num_frames=2, size_px=32), batch_size=len(ODD)))
    assert batches[0]["errors"] == [] and len(batches[0]["rows"]) == len(ODD)

def test_accents_written_in_two_ways(tmp_path, webm):
    "macOS unpacks é as e and an accent: the same name, but never two of them for one id."
    root = make_ssv2(tmp_path/"ssv2", webm); composed, parts = "caf\u00e9", "cafe\u0301"
    shutil.copy(webm, root/f"{parts}.webm"); write(root/"train.json", [dict(id=composed, template=ROWS[0][1])])
    assert [(r.id, r.path.stem) for r in ssv2(root).records] == [(composed, parts)]
    shutil.copy(webm, root/f"{composed}.webm"); refused(lambda: ssv2(root), "two videos for")
    write(root/"train.json", [dict(id=i, template=ROWS[0][1]) for i in (composed, parts)]); refused(lambda: ssv2(root), "accents")

def test_two_files_for_one_id(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="webm"); (root/"mp4").mkdir(); shutil.copy(webm, root/"mp4/22.mp4")
    refused(lambda: ssv2(root), "two videos for 22: mp4/22.mp4 and webm/22.webm")

def test_hidden_files_and_links(tmp_path, webm):
    "A link out of the root is followed, as whoever made it wants; one that leads nowhere is no video."
    root = make_ssv2(tmp_path/"ssv2", webm, videos="videos")
    (root/"videos/._1.webm").touch(); (root/"videos/loop").symlink_to(root); (root/".cache").mkdir(); shutil.copy(webm, root/".cache/1.webm")
    (tmp_path/"disk").mkdir(); shutil.move(root/"videos/1.webm", tmp_path/"disk/1.webm"); (root/"more").symlink_to(tmp_path/"disk")
    (root/"videos/22.webm").unlink(); (root/"videos/22.webm").symlink_to(tmp_path/"gone.webm"); os.mkfifo(root/"videos/9.webm"); (root/"-3.webm").mkdir()
    data = ssv2(root)
    assert [r.path.relative_to(root).as_posix() for r in data.records] == ["more/1.webm", "videos/-3.webm"] and data.missing == ["22"]

def test_a_folder_that_cannot_be_read(tmp_path, webm, monkeypatch):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="videos"); real = os.scandir
    def scandir(path):
        if str(path).endswith("videos"): raise PermissionError(13, "Permission denied")
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    refused(lambda: ssv2(root), f"{root}/videos: Permission denied")

def test_what_is_missing_is_counted_and_named(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm); (root/"22.webm").unlink(); (root/"-3.webm").unlink()
    assert str(data := ssv2(root)) == "ssv2 train: 3 listed, 1 with a video, 2 without (22, -3)"
    assert summary(data, tmp_path/"out/missing.txt") == dict(dataset="ssv2", split="train", listed=3, with_video=1, missing=2, classes=3, captions=0)
    assert (tmp_path/"out/missing.txt").read_text() == "22\n-3\n"

@pytest.mark.parametrize("head", [b"", BOM])
def test_skip_lists(tmp_path, webm, head):
    data = ssv2(make_ssv2(tmp_path/"ssv2", webm, videos="a, b"))
    (rows := csv.writer(text := io.StringIO())).writerows([("file", "reason"), ("a, b/22.webm", 'bad "moov"\nand worse'), ("22.webm", "elsewhere")])
    (tmp_path/"skip.csv").write_bytes(head + text.getvalue().encode())
    assert skipped_rows(data, read_skip(tmp_path/"skip.csv")) == {1: 'bad "moov"\nand worse'}
    write(tmp_path/"skip.csv", "file,reason\na.webm,x,y\n"); refused(lambda: read_skip(tmp_path/"skip.csv"), "skip.csv line 2: expected file,reason")
    refused(lambda: read_skip(tmp_path/"gone.csv"), "gone.csv: No such file")

def test_the_collector_runs_again_afterwards(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm); ssv2(root)
    refused(lambda: ssv2(tmp_path/"gone"), "no such folder")
    assert gc.isenabled()

@pytest.mark.parametrize("read,what", [(ssv2, "SSv2"), (ucf101, "UCF-101"), (msrvtt, "MSR-VTT"), (msvd, "MSVD")])
def test_wrong_roots(tmp_path, read, what):
    refused(lambda: read(tmp_path/"gone"), f"{what} root", "no such folder")
    refused(lambda: read(tmp_path), f"{what} root", "empty")
    (tmp_path/"notes.txt").touch()
    refused(lambda: read(tmp_path), f"{what}'s", "not found, expected")
    refused(lambda: read(tmp_path/"notes.txt"), "not a folder")

# -- UCF-101

def make_ucf101(root, webm, suffix=".avi", videos="", lists="ucfTrainTestlist", newline="\r\n", **text):
    names = {"Archery": "Archery", "HandstandPushups": "HandStandPushups"}; save = lambda name, value: write(root/lists/name, value, newline=newline, **text)
    save("classInd.txt", "1 Archery\n2 HandstandPushups\n")
    for split in (1, 2, 3):
        for subset, groups in (("train", (8, 25)), ("test", (split,))):
            rows = [(i, f"{c}/v_{names[c]}_g{g:02}_c01.avi") for i, c in enumerate(names) for g in groups]
            save(f"{subset}list{split:02}.txt", "".join(f + (f" {i + 1}" if subset == "train" else "") + "\n" for i, f in rows))
            for _, f in rows: (p := root/videos/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(webm, p.with_suffix(suffix))
    return root

@pytest.mark.parametrize("layout", [dict(), dict(videos="UCF-101", newline="\n"), dict(lists="", videos="data/videos", suffix=".mp4", head=BOM)], ids=str)
def test_ucf101_packagings(tmp_path, webm, layout):
    root = make_ucf101(tmp_path/"ucf", webm, **layout)
    train, tests = ucf101(root, split=2), [ucf101(root, split=s, subset="test") for s in (1, 2, 3)]
    assert train.classes == tests[0].classes == ["Archery", "HandstandPushups"]
    assert [(r.id, r.label, r.group) for r in train.records] == [("v_Archery_g08_c01", 0, "g08"), ("v_Archery_g25_c01", 0, "g25"),
                                                                 ("v_HandStandPushups_g08_c01", 1, "g08"), ("v_HandStandPushups_g25_c01", 1, "g25")]
    assert [[(r.label, r.group) for r in t.records] for t in tests] == [[(0, f"g0{s}"), (1, f"g0{s}")] for s in (1, 2, 3)] and train.fingerprint != tests[1].fingerprint

def test_the_same_name_in_two_classes_is_two_videos(tmp_path, webm):
    root = make_ucf101(tmp_path/"ucf", webm)
    write(root/"ucfTrainTestlist/trainlist02.txt", "Archery/v_x_g05_c01.avi 1\nHandstandPushups/v_x_g05_c01.avi 2\n")
    for c in ("Archery", "HandstandPushups"): shutil.copy(webm, root/c/"v_x_g05_c01.avi")
    assert [r.path.parent.name for r in ucf101(root, split=2).records] == ["Archery", "HandstandPushups"]

ONE = "Archery/v_Archery_g01_c01.avi"
@pytest.mark.parametrize("name,text,message", [
    ("classInd", "", "the list is empty"), ("classInd", "0 Archery\n", "line 1: expected '1 ClassName'"), ("classInd", "1 Archery\n\n3 HandstandPushups\n", "line 3: expected '2 ClassName'"),
    ("classInd", "1 Archery\n2 Archery\n", "line 2: class Archery comes twice"), ("classInd", "Archery\n", "line 1: expected"), ("classInd", "1 Archery\n2 Hand stand\n", "line 2: expected"),
    ("trainlist01", f"{ONE} 2\n", "line 1: label 2 contradicts folder Archery, which is 1"), ("trainlist01", f"\n{ONE} 0\n", "line 2: label 0 contradicts"),
    ("trainlist01", "HandStandPushups/v_HandStandPushups_g08_c01.avi 2\n", "line 1: folder 'HandStandPushups' is not a class"), ("trainlist01", "v_Archery_g01_c01.avi 1\n", "line 1: folder ''"),
    ("trainlist01", f"../{ONE} 1\n", "line 1: folder '../Archery'"), ("trainlist01", f"/{ONE} 1\n", "line 1: folder '/Archery'"), ("trainlist01", "Archery/bow.avi 1\n", "line 1: expected a name like"),
    ("trainlist01", f"{ONE} 1\n{ONE} 1\n", "line 2: Archery/v_Archery_g01_c01 comes twice"), ("trainlist01", "Archery/v_Archery_g08_c01.avi 1 1\n", "line 1: label 1 1 contradicts"),
    ("trainlist01", f"Archery/v_Archery_g08_c01.avi 1\n{ONE} 1\n", "line 2 and "), ("testlist01", f"{ONE} 2\n", "line 1: label 2 contradicts folder Archery")])
def test_ucf101_refusals_name_file_and_line(tmp_path, webm, name, text, message):
    root = make_ucf101(tmp_path/"ucf", webm); write(path := root/f"ucfTrainTestlist/{name}.txt", text)
    refused(lambda: ucf101(root), str(path), message)

# -- MSR-VTT

CAPTIONS = {"video1": ["a man runs", "running"], "video9": ["a dog, barking"], "video12": ["two people talk"], "video7": ["cooking"]}
OFFICIAL = {"video1": "train", "video12": "train", "video7": "validate", "video9": "test"}

def hub(ids, one): return [{"video_id": i, "video": f"{i}.mp4", "caption": CAPTIONS[i][0] if one else CAPTIONS[i], "category": 1, "start time": 0., "end time": 9.5, "id": k} for k, i in enumerate(ids)]
def original(ids): return dict(info={}, videos=[{"video_id": i, "split": OFFICIAL[i], "start time": 0., "id": k} for k, i in enumerate(ids)],
                               sentences=[dict(caption=c, video_id=i, sen_id=0) for i in reversed(ids) for c in CAPTIONS[i]])

LISTS = { # packaging -> files
    "test json": {"msrvtt_test_1k.json": hub(["video9"], True)}, "test csv": {"MSRVTT_JSFUSION_test.csv": 'key,vid_key,video_id,sentence\nret0,msr9,video9,"a dog, barking"\n'},
    "9k json": {"msrvtt_train_9k.json": hub(["video1", "video12", "video7"], False)}, "data": {"MSRVTT_data.json": original(["video1", "video12", "video7", "video9"])},
    "9k csv": {"MSRVTT_train.9k.csv": "video_id\nvideo1\nvideo12\nvideo7\n", "MSRVTT_data.json.gz": original(list(OFFICIAL))},
    "9k csv and videodatainfo": {"MSRVTT_train.9k.csv": "video_id\nvideo1\nvideo12\nvideo7\n", "annotation/train_val_videodatainfo.json": original(["video1", "video12", "video7"]),
                                 "annotation/test_videodatainfo.json": original(["video9"])},
    "7k json": {"msrvtt_train_7k.json": hub(["video1", "video12"], False)}, "7k csv": {"MSRVTT_train.7k.csv": "video_id\nvideo1\nvideo12\n", "MSRVTT_data.json": original(list(OFFICIAL))},
    "videodatainfo.gz": {"train_val_videodatainfo.json.gz": original(["video1", "video12", "video7"]), "test_videodatainfo.json.gz": original(["video9"])}}

def make_msrvtt(root, webm, *packagings, **text):
    for p in packagings:
        for name, value in LISTS[p].items(): write(root/name, value, **text)
    (root/"videos/all").mkdir(parents=True)
    for i in CAPTIONS: shutil.copy(webm, root/f"videos/all/{i}.mp4")
    return root

def captions(data): return {r.id: list(r.captions) for r in data.records}
def some(*ids): return {i: CAPTIONS[i] for i in ids}

@pytest.mark.parametrize("text", [dict(), dict(newline="\r\n", head=BOM)], ids=str)
@pytest.mark.parametrize("train", ["9k json", "9k csv", "9k csv and videodatainfo", "data", "7k json", "7k csv"])
@pytest.mark.parametrize("test", ["test json", "test csv"])
def test_msrvtt_packagings(tmp_path, webm, train, test, text):
    root = make_msrvtt(tmp_path/"msrvtt", webm, train, test, **text); split = "1k-A-7k" if train.startswith("7k") else "1k-A"
    assert captions(msrvtt(root)) == captions(msrvtt(root, split=split)) == some("video9")
    assert captions(msrvtt(root, "train", split=split)) == some("video1", "video12", *(() if split == "1k-A-7k" else ("video7",)))
    assert all(r.path.is_file() for r in msrvtt(root).records)

@pytest.mark.parametrize("packaging", ["data", "videodatainfo.gz"])
def test_msrvtt_official_split(tmp_path, webm, packaging):
    root = make_msrvtt(tmp_path/"msrvtt", webm, packaging)
    assert [captions(msrvtt(root, s, split="full")) for s in ("train", "val", "test")] == [some("video1", "video12"), some("video7"), some("video9")]
    assert msrvtt(root, "test", split="full").split == "full test"
    refused(lambda: msrvtt(root), "1k-A test list not found")

@pytest.mark.parametrize("packaging,name,value,read,message", [
    (("test json",), "msrvtt_test_1k.json", [], msrvtt, "the list is empty"), (("test json",), "msrvtt_test_1k.json", ["video9"], msrvtt, "record 0: expected an object"),
    (("test json",), "msrvtt_test_1k.json", [dict(caption="a")], msrvtt, "record 0: expected a video"), (("test json",), "msrvtt_test_1k.json", [dict(video="\nvideo9.mp4", caption="a")], msrvtt, "record 0: expected the id"),
    *[(("test json",), "msrvtt_test_1k.json", [dict(video_id="video9", caption=c)], msrvtt, "record 0: expected a caption") for c in ("", [], None, [7], {"a": 1})],
    (("test csv",), "MSRVTT_JSFUSION_test.csv", "video9,a dog\n", msrvtt, "expected the header video_id,sentence"), (("test csv",), "MSRVTT_JSFUSION_test.csv", "video_id,sentence\n", msrvtt, "the list is empty"),
    (("test csv",), "MSRVTT_JSFUSION_test.csv", "video_id,sentence\nvideo9,a dog, barking\n", msrvtt, "line 2: expected video_id,sentence"),
    (("test json",), "msrvtt_train_9k.json", hub(["video1", "video9"], False), lambda root: msrvtt(root, "train"), "1 videos are in the test list too, e.g. video9"),
    (("test json", "data"), "MSRVTT_train.9k.csv", "video_id\nvideo99\n", lambda root: msrvtt(root, "train"), "video99 has no caption"),
    (("test json",), "MSRVTT_data.json", dict(sentences=[]), lambda root: msrvtt(root, "train"), "expected the lists 'videos' and 'sentences'"),
    (("test json",), "MSRVTT_data.json", dict(videos=[dict(id=1)], sentences=[]), lambda root: msrvtt(root, "train"), "videos 0: expected a video_id"),
    (("videodatainfo.gz",), "test_videodatainfo.json", original(["video9", "video7"]), lambda root: msrvtt(root, "val", split="full"), "video7 is in train_val_videodatainfo.json.gz too")])
def test_msrvtt_refusals_name_the_file(tmp_path, webm, packaging, name, value, read, message):
    root = make_msrvtt(tmp_path/"msrvtt", webm, *packaging); write(root/name, value)
    refused(lambda: read(root), name, message)

def test_msrvtt_subsets(tmp_path, webm):
    root = make_msrvtt(tmp_path/"msrvtt", webm, "test json", "videodatainfo.gz")
    refused(lambda: msrvtt(root, "val"), "expected train or test"); refused(lambda: msrvtt(root, "all", split="full"), "train or val or test"); refused(lambda: msrvtt(root, split="1kA"), "expected 1k-A")
    refused(lambda: msrvtt(root, "train", split="1k-A-7k"), "MSRVTT_train.7k.csv")
    (root/"test_videodatainfo.json.gz").unlink(); refused(lambda: msrvtt(root, split="full"), "no video of MSR-VTT's official split 'test', only train, validate")
    (root/"train_val_videodatainfo.json.gz").write_bytes(gzip.compress(b"{}")[:9]); refused(lambda: msrvtt(root, split="full"), "train_val_videodatainfo.json.gz: ")

# -- MSVD

SAID = {"-4wsu_1_2": ["a man runs", "running"], "_Ua-_3_4": ["a dog"]}
@pytest.mark.parametrize("packaging", ["hub", "Hub", "avi ids", "text", "pickle", "pickle of sentences"])
def test_msvd_packagings(tmp_path, webm, packaging):
    root = tmp_path/"msvd"; (root/"YouTubeClips").mkdir(parents=True)
    rows = [dict(video_id=i, video=f"{i}.avi", caption=c) if packaging.lower() == "hub" else dict(id=f"{i}.avi", caption=c) for i, c in SAID.items()]
    if packaging in ("hub", "avi ids", "Hub"): write(root/("MSVD_test.json" if packaging == "Hub" else "msvd_test.json"), rows)
    else: write(root/"test_list.txt", "\n".join(SAID)); write(root/"train_list.txt", "other", newline="\r\n")
    if packaging == "text": write(root/"AllVideoDescriptions.txt", "# about\n\n" + "".join(f"{i} {c}\n" for i, cs in SAID.items() for c in cs), newline="\r\n")
    if packaging.startswith("pickle"): (root/"raw-captions.pkl").write_bytes(pickle.dumps({i: [c.split() if packaging == "pickle" else c for c in cs] for i, cs in SAID.items()}, protocol=2))
    for i in SAID: shutil.copy(webm, root/f"YouTubeClips/{i}.avi")
    data = msvd(root)
    assert captions(data) == SAID and load_clip(data.records[0].path, View(size_px=32)).num_frames == 20
    if "train_list.txt" in os.listdir(root): write(root/"train_list.txt", "-4wsu_1_2"); refused(lambda: msvd(root), "train_list.txt", "1 videos are in the test list too, e.g. -4wsu_1_2")

def make_pickled(root, webm, raw):
    write(root/"test_list.txt", "a_0_1"); (root/"raw-captions.pkl").write_bytes(raw); shutil.copy(webm, root/"a_0_1.avi")
    return root

@pytest.mark.parametrize("raw,words", [ # as Python 2 wrote them: protocol 0 and 2, text as bytes
    (b"(dp0\nS'a_0_1'\np1\n(lp2\n(lp3\nS'a'\np4\naS'caf\\xe9'\np5\naas.", "a café"), (b"(dp0\nS'a_0_1'\np1\n(lp2\n(lp3\nS'a'\np4\naS'caf\\xc3\\xa9'\np5\naas.", "a café"),
    (b"\x80\x02}q\x00U\x05a_0_1q\x01]q\x02]q\x03(U\x01aq\x04X\x05\x00\x00\x00caf\xc3\xa9q\x05eas.", "a café")])
def test_old_pickles(tmp_path, webm, raw, words): assert captions(msvd(make_pickled(tmp_path, webm, raw))) == {"a_0_1": [words]}

class Boom:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))

@pytest.mark.parametrize("raw,message", [
    (lambda path: pickle.dumps(Boom(path)), "it asks for"), (lambda path: pickle.dumps({"a_0_1": [["a", Boom(path)]]}, protocol=0), "it asks for"),
    (lambda path: b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(path), "it asks for os.system"), (lambda path: b"\x80\x02\x82\x01.", "not a pickle of plain"), (lambda path: pickle.dumps({"a_0_1": [["a"]]})[:-4], "not a pickle"),
    (lambda path: b"\x80\x02}X\x01\x00\x00\x00\xff]s.", "text that is no text"), (lambda path: b"", "not a pickle"), (lambda path: b"<html>", "not a pickle"), (lambda path: pickle.dumps(np.zeros(2)), "it asks for"), (lambda path: b"\x80\x02Pmodule\n.", "not a pickle"),
    (lambda path: pickle.dumps([["a"]]), "expected id -> list"), (lambda path: pickle.dumps({"a_0_1": "a dog"}), "each a list of words"), (lambda path: pickle.dumps({"a_0_1": [[b"a"]]}), "each a list of words"),
    (lambda path: pickle.dumps({"a_0_1": []}), "expected a caption"), (lambda path: pickle.dumps({b"a_0_1\n": [["a"]]}), "has no caption")])
def test_a_pickle_is_not_executed(tmp_path, webm, raw, message):
    root = make_pickled(tmp_path, webm, raw(tmp_path/"executed"))
    refused(lambda: msvd(root), message)
    assert not (tmp_path/"executed").exists()

@pytest.mark.parametrize("name,text,message", [
    ("test_list.txt", "", "the list is empty"), ("test_list.txt", "a_0_1\n../b\n", "line 2: ../b has no caption"), ("AllVideoDescriptions.txt", "# nothing\n", "the list is empty"),
    ("AllVideoDescriptions.txt", "a_0_1\n", "line 1: expected a caption"), ("msvd_test.json", "[{}]", "record 0: expected a video")])
def test_msvd_refusals_name_the_file(tmp_path, webm, name, text, message):
    root = make_pickled(tmp_path, webm, b""); write(root/"AllVideoDescriptions.txt", "a_0_1 a dog"); write(root/name, text)
    refused(lambda: msvd(root), name, message)

# -- lists that are no text

@pytest.mark.parametrize("raw", [b"\xff\xfe1\x00", b"\x89PNG\r\n\x1a\n\xff"])
def test_lists_that_are_no_text(tmp_path, webm, raw):
    root = make_ucf101(tmp_path, webm); (root/"ucfTrainTestlist/trainlist01.txt").write_bytes(raw); refused(lambda: ucf101(root), "trainlist01.txt: not UTF-8 text")

def test_a_list_that_is_a_folder(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm); (root/"train.json").unlink(); (root/"train.json").mkdir(); refused(lambda: ssv2(root), "train list not found")
    assert "train.json" not in scan_files(root)
