"The four datasets in their packagings: records, labels, captions, and frames that are the same on every read."
import json, os, pickle, shutil
from pathlib import Path

import numpy as np, pytest, torch
from stjepa.captions import msrvtt, msvd
from stjepa.core import InputError
from stjepa.ssv2 import ssv2
from stjepa.ucf101 import ucf101
from stjepa.video import View, load_clip, loader, to_pixels, write_video

CLASSES = {"Moving something up": "2", "Moving something down": "0", "Taking one of many similar things on the table": "1"}
ROWS = [("1", "Moving [something] up"), ("22", "Moving [something] down"), ("-3", "Taking [one of many similar things on the table]")]

def clip(n=20, h=60, w=107, seed=0):
    rng = np.random.default_rng(seed); base = rng.integers(30, 220, (6, 11, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)[:h, :w]
    return np.stack([np.roll(base, 2*i, 1) for i in range(n)])

@pytest.fixture(scope="module")
def webm(tmp_path_factory): return write_video(tmp_path_factory.mktemp("source")/"clip.webm", np.pad(clip(w=106), ((0, 0), (0, 0), (0, 1), (0, 0)), mode="edge"))

def make_ssv2(root, webm, labels="", videos="", prefix="", suffix=".webm", newline="\n"):
    for folder in (labels, videos): (root/folder).mkdir(parents=True, exist_ok=True)
    def save(name, value): (root/labels/f"{prefix}{name}.json").write_bytes(json.dumps(value, indent=1, ensure_ascii=False).replace("\n", newline).encode())
    save("labels", CLASSES)
    for split in ("train", "validation"): save(split, [dict(id=id, label="x", template=t, placeholders=["é"]) for id, t in ROWS])
    save("test", [dict(id=id) for id, _ in ROWS])
    for id, _ in ROWS: shutil.copy(webm, root/videos/f"{id}{suffix}")
    return root

@pytest.mark.parametrize("layout", [dict(), dict(labels="labels", videos="20bn-something-something-v2"), dict(prefix="something-something-v2-", newline="\r\n"),
                                    dict(labels="labels", prefix="something-something-v2-", videos="a/b/c", suffix=".mp4")], ids=str)
def test_ssv2_packagings(tmp_path, webm, layout):
    root = make_ssv2(tmp_path/"ssv2", webm, **layout)
    data = ssv2(root)
    assert data.classes == ["Moving something down", "Taking one of many similar things on the table", "Moving something up"]
    assert [(r.id, r.label) for r in data.records] == [("1", 2), ("22", 0), ("-3", 1)] and not data.missing
    assert all(r.path.is_file() and r.path.is_relative_to(root) for r in data.records)
    assert [r.label for r in ssv2(root, "test").records] == [None]*3
    assert ssv2(root).fingerprint == data.fingerprint != ssv2(root, "validation").fingerprint
    assert ssv2(root, limit=2).records == data.records[:2]

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

def test_finding_files_does_not_stat_them(tmp_path, webm, monkeypatch):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="videos")
    for i in range(200): (root/f"videos/x{i}.webm").touch()
    calls, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: calls.append(a) or stat(*a, **k))
    assert len(ssv2(root)) == 3 and len(calls) < 20

def test_ids_never_leave_the_root(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm); shutil.copy(webm, tmp_path/"out.webm")
    ids = ["../out", str(tmp_path/"out"), "1", "1/../../out", "1.webm"]
    (root/"train.json").write_text(json.dumps([dict(id=i, template=ROWS[0][1]) for i in ids]))
    data = ssv2(root)
    assert [r.id for r in data.records] == ["1"] and data.missing == [i for i in ids if i != "1"]

def test_hidden_files_and_links(tmp_path, webm):
    root = make_ssv2(tmp_path/"ssv2", webm, videos="videos")
    (root/"videos/._1.webm").touch(); (root/"videos/loop").symlink_to(root); (root/".cache").mkdir(); shutil.copy(webm, root/".cache/1.webm")
    (tmp_path/"disk").mkdir(); shutil.move(root/"videos/1.webm", tmp_path/"disk/1.webm"); (root/"more").symlink_to(tmp_path/"disk")
    assert [r.path.relative_to(root).as_posix() for r in ssv2(root).records] == ["more/1.webm", "videos/22.webm", "videos/-3.webm"]

@pytest.mark.parametrize("name,text,message", [
    ("labels.json", "[]", "expected a json dict"), ("labels.json", '{"a": "1"}', "numbers 0 to 0"), ("labels.json", '{"a": "x"}', "expected digits"),
    ("labels.json", "<html>", "not json"), ("train.json", '{"videos": []}', "expected a json list"), ("train.json", "[1]", "record 0: expected an object"),
    ("train.json", '[{"id": "1", "template": "Eating [something]"}]', "record 1: template 'Eating something' is not among"),
    ("train.json", '[{"id": "1"}]', "expected a template in every record"), ("train.json", "[]", "no video found for any of the 0 records"),
    ("train.json", '[{"id": "77", "template": "Moving [something] up"}]', "no video found"),
    ("train.json", '[{"id": "1", "template": "Moving [something] up"}, {"id": "1", "template": "Moving [something] down"}]', "id 1 comes twice")])
def test_ssv2_refusals_name_the_file(tmp_path, webm, name, text, message):
    root = make_ssv2(tmp_path/"ssv2", webm); (root/name).write_text(text)
    with pytest.raises(InputError, match=message) as e: ssv2(root)
    assert str(root) in str(e.value)

@pytest.mark.parametrize("read,what", [(ssv2, "SSv2"), (ucf101, "UCF-101"), (msrvtt, "MSR-VTT"), (msvd, "MSVD")])
def test_wrong_roots(tmp_path, read, what):
    with pytest.raises(InputError, match=f"{what} root .*no such folder"): read(tmp_path/"gone")
    with pytest.raises(InputError, match=f"{what} root .*empty"): read(tmp_path)
    (tmp_path/"notes.txt").touch()
    with pytest.raises(InputError, match=f"{what}'s .* not found, expected"): read(tmp_path)
    with pytest.raises(InputError, match="not a folder"): read(tmp_path/"notes.txt")

def make_ucf101(root, webm, suffix=".avi", videos="", lists="ucfTrainTestlist"):
    names = {"Archery": "Archery", "HandstandPushups": "HandStandPushups"}; (root/lists).mkdir(parents=True, exist_ok=True)
    (root/lists/"classInd.txt").write_bytes(b"1 Archery\r\n2 HandstandPushups\r\n")
    for subset, groups in (("train", (8, 25)), ("test", (1,))):
        rows = [(i, f"{c}/v_{names[c]}_g{g:02}_c01.avi") for i, c in enumerate(names) for g in groups]
        (root/lists/f"{subset}list02.txt").write_bytes("".join(f + (f" {i + 1}" if subset == "train" else "") + "\r\n" for i, f in rows).encode())
        for _, f in rows: (p := root/videos/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(webm, p.with_suffix(suffix))
    return root

@pytest.mark.parametrize("layout", [dict(), dict(videos="UCF-101"), dict(lists="", videos="data/videos", suffix=".mp4")], ids=str)
def test_ucf101_packagings(tmp_path, webm, layout):
    root = make_ucf101(tmp_path/"ucf", webm, **layout)
    train, test = ucf101(root, split=2), ucf101(root, split=2, subset="test")
    assert train.classes == test.classes == ["Archery", "HandstandPushups"]
    assert [(r.id, r.label, r.group) for r in train.records] == [("v_Archery_g08_c01", 0, "g08"), ("v_Archery_g25_c01", 0, "g25"),
                                                                 ("v_HandStandPushups_g08_c01", 1, "g08"), ("v_HandStandPushups_g25_c01", 1, "g25")]
    assert [(r.label, r.group) for r in test.records] == [(0, "g01"), (1, "g01")] and train.fingerprint != test.fingerprint

def test_the_same_name_in_two_classes_is_two_videos(tmp_path, webm):
    root = make_ucf101(tmp_path/"ucf", webm)
    (root/"ucfTrainTestlist/trainlist02.txt").write_text("Archery/v_x_g02_c01.avi 1\nHandstandPushups/v_x_g02_c01.avi 2\n")
    for c in ("Archery", "HandstandPushups"): shutil.copy(webm, root/c/"v_x_g02_c01.avi")
    assert [r.path.parent.name for r in ucf101(root, split=2).records] == ["Archery", "HandstandPushups"]

CAPTIONS = {"video1": ["a man runs", "running"], "video9": ["a dog, barking"], "video12": ["two people talk"]}

def make_msrvtt(root, webm, train, test):
    (root/"videos/all").mkdir(parents=True)
    hub = lambda ids, one: [{"video_id": i, "video": f"{i}.mp4", "caption": CAPTIONS[i][0] if one else CAPTIONS[i], "category": 1, "start time": 0., "id": k} for k, i in enumerate(ids)]
    if test == "json": (root/"msrvtt_test_1k.json").write_text(json.dumps(hub(["video9"], True)))
    else: (root/"MSRVTT_JSFUSION_test.csv").write_bytes(b'key,vid_key,video_id,sentence\r\nret0,msr9,video9,"a dog, barking"\r\n')
    if train == "data": (root/"MSRVTT_data.json").write_text(json.dumps(dict(info={}, videos=[], sentences=[dict(caption=c, video_id=i, sen_id=0) for i, cs in CAPTIONS.items() for c in cs])))
    else: (root/f"msrvtt_train_{train}.json").write_text(json.dumps(hub(["video1", "video12"], False)))
    for i in CAPTIONS: shutil.copy(webm, root/f"videos/all/{i}.mp4")
    return root

@pytest.mark.parametrize("train", ["9k", "7k", "data"])
@pytest.mark.parametrize("test", ["json", "csv"])
def test_msrvtt_packagings(tmp_path, webm, train, test):
    root = make_msrvtt(tmp_path/"msrvtt", webm, train, test)
    assert [(r.id, r.captions) for r in msrvtt(root).records] == [("video9", ("a dog, barking",))]
    assert [(r.id, r.captions) for r in msrvtt(root, "train").records] == [("video1", ("a man runs", "running")), ("video12", ("two people talk",))]

@pytest.mark.parametrize("packaging", ["hub", "avi ids", "text", "pickle"])
def test_msvd_packagings(tmp_path, webm, packaging):
    root = tmp_path/"msvd"; (root/"YouTubeClips").mkdir(parents=True)
    captions = {"-4wsu_1_2": ["a man runs", "running"], "_Ua-_3_4": ["a dog"]}
    rows = [dict(video_id=i, video=f"{i}.avi", caption=c) if packaging == "hub" else dict(id=f"{i}.avi", caption=c) for i, c in captions.items()]
    if packaging in ("hub", "avi ids"): (root/"msvd_test.json").write_text(json.dumps(rows))
    else: (root/"test_list.txt").write_text("\n".join(captions))
    if packaging == "text": (root/"AllVideoDescriptions.txt").write_text("# about\n\n" + "".join(f"{i} {c}\r\n" for i, cs in captions.items() for c in cs))
    if packaging == "pickle": (root/"raw-captions.pkl").write_bytes(pickle.dumps({i: [c.split() for c in cs] for i, cs in captions.items()}, protocol=2))
    for i in captions: shutil.copy(webm, root/f"YouTubeClips/{i}.avi")
    data = msvd(root)
    assert {r.id: list(r.captions) for r in data.records} == captions and load_clip(data.records[0].path, View(size_px=32)).num_frames == 20

def test_a_pickle_is_not_executed(tmp_path, webm):
    class Boom:
        def __reduce__(self): return (Path.touch, (tmp_path/"executed",))
    (tmp_path/"test_list.txt").write_text("a"); (tmp_path/"raw-captions.pkl").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(InputError, match="not a pickle of plain captions"): msvd(tmp_path)
    assert not (tmp_path/"executed").exists()
