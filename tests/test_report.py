"One page of several runs: everything known is on it, nothing is fetched, nothing unknown is passed over."
import base64, json, re, shutil
from html.parser import HTMLParser
import pytest
from stjepa.core import InputError
from stjepa.report import ReportConfig, gather, is_headline, leaves, names, page, report, search, show_value

UCF = lambda student: dict(ucf101=dict(linear_top1=dict(chance=.25, mean_pixel=.3, student=student), strength=dict(mean_pixel=.1, student=1e-4)), row="student")
RETRIEVAL = dict(retrieval=dict(msvd=dict(t2v=dict(r1=dict(chance=.1, student=.4), mdr=dict(chance=5.5, student=2)), v2t=dict(r1=dict(chance=.1, student=.5)))))

def write(folder, summary):
    folder.mkdir(parents=True, exist_ok=True); (folder/"summary.json").write_text(json.dumps(summary))
    return folder

@pytest.fixture
def runs(tmp_path, run_dir):
    for name, score in (("a", .41), ("b<i>", .52)):
        write(tmp_path/name/"ucf101", UCF(score)); shutil.copytree(run_dir, tmp_path/name/"pretrain", ignore=shutil.ignore_patterns("*.pt"))
    write(tmp_path/"a"/"retrieval", RETRIEVAL)
    return [tmp_path/"a", tmp_path/"b<i>"]

class Reader(HTMLParser):
    "Tags that are open at the end, and the tables' cells."
    def __init__(self, text): super().__init__(); self.open, self.cells = [], []; self.feed(text)
    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "li", "p"): self.open.append(tag)
        if tag in ("td", "th"): self.cells.append("")
    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"): self.cells[-1] += data
    def handle_endtag(self, tag):
        if tag not in ("li", "p"): assert self.open.pop() == tag, tag

def test_the_page_holds_every_score_of_every_run(runs, tmp_path):
    out = report(ReportConfig(",".join(map(str, runs)), out=str(tmp_path/"out"/"page.html"), title="a & b"))
    text = out.read_text(encoding="utf-8"); read = Reader(text)
    assert not read.open
    for value in ("41.0", "52.0", "25.0", "0.0001", "40.0", "5.5", "2", "50.0", "a", "b<i>"): assert value in read.cells, value
    assert "<title>a &amp; b</title>" in text and "<i>" not in text
    for words in ("Pretraining", "UCF-101", "Text-video retrieval"): assert f"<h2>{words}</h2>" in text

def test_the_page_needs_no_other_file(runs):
    text = page(gather(runs), "t")
    assert "<script" not in text and not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', text) and "http" not in text
    pictures = re.findall(r'base64,([^"]+)"', text)
    assert len(pictures) == 4 and all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)

def test_scores_are_found_wherever_they_hang():
    assert leaves(dict(a=dict(b=dict(student=.1, note="x"), c=3), d=dict(chance=.2))) == {"a.b": dict(student=.1), "d": dict(chance=.2)}
    assert leaves(3) == {} and leaves(dict(student="x")) == {}
    assert show_value("msvd.t2v.mdr")(2.) == "2" and show_value("linear_top1")(.415) == "41.5"
    assert is_headline("msvd.t2v.r1") and is_headline("linear.action.refitted") and not is_headline("msvd.t2v.r10")

def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    assert names(["x/a/ucf101", "x/b/ucf101"]) == ["a/ucf101", "b/ucf101"] and names(["x/a", "y/b"]) == ["a", "b"] and names(["x/a"]) == ["a"]
    with pytest.raises(InputError, match="named twice"): names(["x/a", "x/../x/a"])

def test_two_of_a_kind_in_one_folder_keep_apart(tmp_path):
    write(tmp_path/"run"/"first", UCF(.1)); write(tmp_path/"run"/"second", UCF(.2))
    assert list(gather([tmp_path/"run"])["ucf101"]) == ["run/first", "run/second"]

def test_a_summary_of_summaries_is_not_counted_twice(tmp_path):
    write(tmp_path/"demo", UCF(.1) | RETRIEVAL); write(tmp_path/"demo"/"seed0"/"ucf101", UCF(.2))
    assert {k: list(v) for k, v in gather([tmp_path/"demo"]).items()} == dict(ucf101=["demo"], retrieval=["demo"])

def test_training_runs_are_found_at_any_depth(run_dir):
    assert [f.kind for f in search(run_dir)] == ["pretrain"] and [f.kind for f in search(run_dir.parent)] == ["pretrain"]

@pytest.mark.parametrize("make, says", [
    (lambda p: None, "no such folder"), (lambda p: p.mkdir(), "the folder is empty"), (lambda p: write(p, dict(dataset="ucf101", splits=[])), "holds neither"),
    (lambda p: write(p, [1]), "holds neither"), (lambda p: (write(p, {})/"summary.json").write_text("{"), "not json"), (lambda p: (write(p, {})/"summary.json").unlink() or (p/"metrics.jsonl").write_text(""), "holds neither")])
def test_folders_that_hold_nothing_known_are_named(tmp_path, runs, make, says):
    make(tmp_path/"odd")
    with pytest.raises(InputError, match=says) as e: report(ReportConfig(f"{runs[0]},{tmp_path/'odd'}", out=str(tmp_path/"page.html")))
    assert "odd" in str(e.value) and not (tmp_path/"page.html").exists()

def test_the_command_takes_several_words(runs, tmp_path, command):
    done = command("stjepa_report", *runs, "--out", tmp_path/"page.html")
    assert done.returncode == 0 and not done.stderr and "ucf101 of 2 runs" in done.stdout, done.stderr
    assert (tmp_path/"page.html").stat().st_size > 20_000
    done = command("stjepa_report", tmp_path/"nowhere")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no such folder" in done.stderr
    assert command("stjepa_report").returncode == 2
