"What is committed is what the notebooks say: outputs clean, modules exported, README written. `make test` runs this first."
import runpy, shutil, subprocess
from pathlib import Path
import pytest
from conftest import BIN, ROOT

PARTS = ["nbs", "stjepa", "settings.ini", "setup.py", "pyproject.toml", "README.md"]

def _files(root):
    "Relative path -> bytes of what nbdev reads and writes under `root`."
    paths = [p for part in PARTS for p in ([root/part] if (root/part).is_file() else sorted((root/part).rglob("*")))]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths if p.suffix in (".py", ".ipynb", ".toml", ".md")
            and not {"__pycache__", ".ipynb_checkpoints", "assets"} & set(p.parts)}

@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    "A copy of the project after nbdev_clean and a fresh nbdev_export."
    copy = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "images", "assets")
    for part in PARTS: (shutil.copytree if (ROOT/part).is_dir() else shutil.copy2)(ROOT/part, copy/part, **(dict(ignore=ignore) if (ROOT/part).is_dir() else {}))
    for step in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run([BIN/step], cwd=copy, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return _files(copy)

def _changed(remade, suffix):
    here = {k: v for k, v in _files(ROOT).items() if k.endswith(suffix)}
    there = {k: v for k, v in remade.items() if k.endswith(suffix)}
    return sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))

def test_notebooks_are_clean(remade): assert not _changed(remade, ".ipynb"), "run nbdev_clean"

def test_modules_are_exported(remade): assert not _changed(remade, (".py", ".toml")), "run nbdev_export (modules are never edited by hand)"

def test_readme_is_written_from_index():
    text, images = runpy.run_path(str(ROOT/"scripts/readme.py"))["render"](ROOT/"nbs/index.ipynb")
    assert (ROOT/"README.md").read_text(encoding="utf-8") == text, "run make readme"
    assert {str(p.relative_to(ROOT)): p.read_bytes() for p in (ROOT/"nbs/images").glob("readme*.png")} == images, "run make readme"
