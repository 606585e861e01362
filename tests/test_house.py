"The rules of the house: what imports what, what a command and a script look like, what a notebook may hold."
import ast, dataclasses, importlib, json, os, re, shutil, subprocess
import pytest
from conftest import ENTRIES, ROOT
from stjepa.core import parse_config

NOTEBOOKS = sorted(p for p in (ROOT/"nbs").glob("*.ipynb"))
SCRIPTS = sorted((ROOT/"scripts").glob("*.sh"))
RECIPES = [p for p in SCRIPTS if p.name not in ("launch.sh", "venv.sh")]
name = lambda p: p.name

def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def module(path): return re.sub(r"^\d+_", "", path.stem)

# -- imports

def loaded(python, statement, *names):
    "Which of the modules `names` are loaded after `statement` in a fresh interpreter."
    return python(f"import sys; {statement}; print(' '.join(n for n in {names} if n in sys.modules))").split()

def test_the_package_imports_nothing_heavy(python):
    assert loaded(python, "import stjepa", "numpy", "torch", "fastcore", "matplotlib") == []
    assert loaded(python, "import stjepa.core", "torch", "transformers", "zarr", "matplotlib") == []

def test_training_needs_no_teacher(python):
    assert loaded(python, "import stjepa.pretrain", "transformers", "stjepa.teacher", "matplotlib") == []

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[0].isdigit()], ids=name)
def test_imports_point_downwards(path):
    "A notebook imports modules of lower-numbered notebooks alone."
    order = {module(p): p.stem for p in NOTEBOOKS}
    code = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "code" and not source(c).startswith(("%", "!")))
    used = set(re.findall(r"^\s*from stjepa\.(\w+) import", code, flags=re.M)) | set(re.findall(r"\bimport stjepa\.(\w+)", code))
    used |= {n for line in re.findall(r"^\s*from stjepa import (.+)$", code, flags=re.M) for n in re.findall(r"\w+", line)} & order.keys()
    for other in used - {module(path)}: assert order.get(other, "~") < path.stem, f"{path.name} imports stjepa.{other}"

def test_every_module_comes_from_a_notebook():
    made = {p.stem for p in (ROOT/"stjepa").glob("*.py")} - {"__init__", "_modidx"}
    assert made <= {module(p) for p in NOTEBOOKS}

# -- notebooks

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_holds_what_it_may(path):
    assert path.stat().st_size < 1_000_000, "a notebook stays under 1 MB"
    head = source(cells(path)[0])
    assert re.match(r"# .+\n\n> .+", head), "the first cell is a title and a > line"
    for cell in cells(path):
        outputs = cell.get("outputs", [])
        assert not any(o["output_type"] == "error" for o in outputs), f"an error is stored: {source(cell)[:80]}"
        text = json.dumps([{k: v for k, v in o.get("data", {}).items() if k.startswith("text/")} or o.get("text", "") for o in outputs])
        assert not (found := re.search(r"(/tmp|/home|/root|/work|/var/folders)/\S+", text)), f"a path of one machine: {found[0]}"
        assert "Warning" not in text, f"a warning is stored: {source(cell)[:80]}"

# -- commands

@pytest.mark.parametrize("entry", ENTRIES)
def test_help_shows_every_option(entry, command):
    done = command(entry, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    if entry == "stjepa": return
    config = config_of(ENTRIES[entry])
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in done.stdout or field.name.upper() in done.stdout, f"{field.name} is not in {entry} --help"

def config_of(target):
    "The config dataclass that a command's `main` hands to `console`."
    mod = importlib.import_module(target.split(":")[0])
    call = next(n for n in ast.walk(ast.parse(open(mod.__file__).read())) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "console")
    return getattr(mod, call.args[0].id)

def test_stjepa_lists_the_commands(command):
    done = command("stjepa")
    assert done.returncode == 0
    for entry in ENTRIES: assert re.search(rf"^  {entry} +\w", done.stdout, flags=re.M), f"{entry} is not listed"

# -- scripts

@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_script_is_strict(path):
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", path], check=True)

@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_is_one_command(path):
    "A header that says the five things, then one command that passes everything on."
    text = path.read_text(encoding="utf-8")
    for word in ("What:", "Hardware:", "Time:", "Leaves:", "Again:"): assert f"# {word}" in text
    body = text.split("set -euo pipefail\n")[1].strip()
    found = re.fullmatch(r'(\w+="" )?exec "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/launch\.sh" (stjepa_\w+) [^;&|]*"\$@"', body)
    assert found and found[2] in ENTRIES, body

@pytest.fixture
def machine(tmp_path):
    "A copy of the scripts on a machine of `gpus` GPUs; `run(gpus, script, ..., **env)` -> the words it would start."
    shutil.copytree(ROOT/"scripts", tmp_path/"scripts")
    (tmp_path/".venv/bin").mkdir(parents=True); (tmp_path/"elsewhere").mkdir()
    def tool(name, body): (tmp_path/".venv/bin"/name).write_text(f"#!/bin/sh\n{body}\n"); (tmp_path/".venv/bin"/name).chmod(0o755)
    for name in [*ENTRIES, "torchrun"]: tool(name, f'echo {name} "$@"')
    def run(gpus, *words, **env):
        tool("nvidia-smi", "\n".join(f"echo 'GPU {i}: one'" for i in range(gpus)) or "exit 9")
        keep = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE")}
        return subprocess.run(["../scripts/" + words[0], *words[1:]], cwd=tmp_path/"elsewhere", env=keep | env, capture_output=True, text=True, check=True).stdout.strip()
    return run

@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_passes_everything_on_from_anywhere(path, machine):
    words = machine(0, path.name, "here", "there", "--seed", "3").split()
    assert words[0] in ENTRIES and words[-4:] == ["here", "there", "--seed", "3"]

@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_names_real_options(path, machine):
    "What a recipe sets are fields of its command, with values that its parser takes."
    command, *words = machine(0, path.name).split()
    config = config_of(ENTRIES[command])
    needed = [w for f in dataclasses.fields(config) if f.default is dataclasses.MISSING for w in (f"--{f.name.replace('_', '-')}", "x")]
    parse_config(config, words + needed, prog=command)

def test_launch_counts_the_visible_gpus(machine):
    def run(gpus, **env): return machine(gpus, "launch.sh", "stjepa", "a b", "--c", **env)
    alone, many = "stjepa a b --c", "torchrun --standalone --nproc-per-node {} --no-python stjepa a b --c"
    assert run(0) == alone and run(1) == alone and run(4) == many.format(4)
    assert run(4, CUDA_VISIBLE_DEVICES="2") == alone and run(4, CUDA_VISIBLE_DEVICES="") == alone and run(4, CUDA_VISIBLE_DEVICES="-1") == alone
    assert run(4, CUDA_VISIBLE_DEVICES="1,3") == many.format(2)
    assert run(4, WORLD_SIZE="4") == alone
    assert machine(4, "launch.sh", "stjepa", "--help") == "stjepa --help"

# -- readme

def test_readme_maps_every_notebook():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        if path.stem != "index": assert f"nbs/{path.name}" in text, f"{path.name} is not in the map: run nbs/index.ipynb, then make readme"

def test_readme_links_lead_somewhere():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not re.match(r"https?:|mailto:", link): assert (ROOT/link).exists(), link
