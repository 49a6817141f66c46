"The notebooks are the source: modules, metadata and layering follow from them."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/"pruning_bench"
NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
TEMPLATES = [p for p in NOTEBOOKS if p.parent.name == "benchmarks"]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")

def rel(path): return str(path.relative_to(ROOT))
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def exported(cell): return cell["cell_type"] == "code" and re.match(r"#\s*\|\s*exports?i?\b", source(cell))

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=rel)
each_template = pytest.mark.parametrize("notebook", TEMPLATES, ids=rel)
each_module = pytest.mark.parametrize("module", MODULES, ids=rel)
each_library_module = pytest.mark.parametrize(
    "module", [p for p in MODULES if "bench" not in p.relative_to(PACKAGE).parts], ids=rel)


# export and clean

@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the project whose modules are exported again from nothing, and whose notebooks are cleaned."
    copy = tmp_path_factory.mktemp("project")
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_*", ".last_checked")
    shutil.copy(ROOT/"settings.ini", copy)
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=skip)
    for init in PACKAGE.rglob("__init__.py"):
        (copy/init.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, copy/init.relative_to(ROOT))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent/command], cwd=copy, env=env, check=True)
    return copy

def test_modules_are_what_the_notebooks_export(fresh):
    def modules(root):
        return {p.relative_to(root): p.read_text(encoding="utf-8") for p in (root / "pruning_bench").rglob("*.py")}
    here, again = modules(ROOT), modules(fresh)
    assert not set(here) ^ set(again), "a module without a notebook, or a notebook not exported: run `make fix`"
    changed = [str(p) for p in here if here[p] != again[p]]
    assert not changed, f"differ from their notebooks: edit the notebook, then run `make fix`: {changed}"

def test_notebooks_are_clean(fresh):
    dirty = [rel(p) for p in NOTEBOOKS if p.read_bytes() != (fresh/p.relative_to(ROOT)).read_bytes()]
    assert not dirty, f"run `make fix`: {dirty}"


# notebooks

@each_notebook
def test_title_and_subtitle(notebook):
    first = cells(notebook)[0]
    assert first["cell_type"] == "markdown"
    lines = [line for line in source(first).splitlines() if line.strip()]
    assert lines[0].startswith("# ") and lines[1].startswith("> ")

@each_notebook
def test_exported_cells_are_short(notebook):
    sizes = [
        sum(bool(line.strip()) and not line.startswith("#|") for line in source(c).splitlines())
        for c in cells(notebook)
        if exported(c)]
    assert max(sizes, default=0) <= 40

@each_notebook
def test_lines_of_code_are_short(notebook):
    "The linter looks at modules and tests; cells of lessons are looked at here."
    code = [source(c) for c in cells(notebook) if c["cell_type"] == "code"]
    assert not [line for s in code for line in s.splitlines() if len(line) > 120]

@each_notebook
def test_notebook_is_light(notebook): assert notebook.stat().st_size <= 400_000

@each_notebook
def test_no_error_is_kept_as_output(notebook):
    assert not [o for c in cells(notebook) for o in c.get("outputs", []) if o["output_type"] == "error"]

@each_notebook
def test_what_a_slow_cell_shows_is_kept(notebook):
    "A cell that ends in an expression shows something; where it is slow, readers see what was stored."
    slow = [
        c
        for c in cells(notebook)
        if c["cell_type"] == "code" and re.match(r"(#\|.*\n)*#\| slow", source(c)) and "#| gpu" not in source(c)]
    assert not [source(c) for c in slow if not c["outputs"] and isinstance(ast.parse(source(c)).body[-1], ast.Expr)]

@each_notebook
def test_a_figure_that_a_lesson_draws_is_kept(notebook):
    "GitHub and the web pages show the stored figure; a notebook that was run without an inline backend loses it."
    drawn = [c for c in cells(notebook) if c["cell_type"] == "code" and not exported(c) and notebook not in TEMPLATES
             and re.search(r"^\S.*plt\.subplots\(", source(c), re.M)]
    for cell in drawn: assert any("image/png" in out.get("data", {}) for out in cell["outputs"]), cell["id"]

@each_template
def test_template_has_a_parameters_cell_and_no_outputs(notebook):
    tags = [c["metadata"].get("tags", []) for c in cells(notebook)]
    assert tags.count(["parameters"]) == 1
    assert not any(c.get("outputs") for c in cells(notebook))


# the book

def test_every_chapter_has_its_place_in_the_book():
    import yaml
    book = yaml.safe_load((ROOT/"nbs"/"toc.yml").read_text(encoding="utf-8"))
    chapters = [c["file"] for part in book["parts"] for c in part["chapters"]]
    assert len(chapters) == len(set(chapters)) and set(chapters) == {
        str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in NOTEBOOKS
    } - {"index"}
    assert all(c["minutes"] > 0 for part in book["parts"] for c in part["chapters"])
    for part in book["parts"]:
        for c in part["chapters"]:
            assert all(b in chapters and chapters.index(b) < chapters.index(c["file"]) for b in c.get("after", [])), c[
                "file"]


# modules

def imports(module, top=False):
    "Full names of what a module imports; with `top`, only outside functions."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)}
    package = module.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if top and id(node) in inside: continue
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module)
            yield from (f"{base}.{a.name}" for a in node.names)

METHODS = {"weight", "structured", "diffusion", "data", "inference"}
# layer -> what it may import
BELOW = {
    "core": set(),
    "graph": {"core"},
    "bench": {"core", "graph", *METHODS},
    **dict.fromkeys(METHODS, {"core", "graph"})}

def layer(name): return name.split(".")[1] if name.startswith("pruning_bench.") else None

@each_module
def test_layers_import_downwards_only(module):
    "core <- graph <- methods <- bench, and no method folder imports another."
    mine = module.relative_to(PACKAGE).parts[0]
    if mine not in BELOW: pytest.skip("the package itself, which imports its public names")
    allowed = BELOW[mine] | {mine}
    assert not [name for name in imports(module) if layer(name) in BELOW.keys() - allowed]

@each_module
def test_modules_are_short(module): assert len(module.read_text(encoding="utf-8").splitlines()) <= 300

@each_module
def test_no_development_tool_is_imported(module):
    assert not {name.split(".")[0] for name in imports(module)} & {"nbdev", "fastcore", "execnb", "ghapi", "pytest"}

@each_library_module
def test_library_needs_little_at_import(module):
    allowed = {"torch", "numpy", "safetensors", "tqdm", "pruning_bench"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imports(module, top=True)} <= allowed


# the tree

def test_the_linter_is_content():
    ruff = Path(sys.executable).parent/"ruff"
    ran = subprocess.run([ruff, "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]

def test_names_in_notebooks_are_defined():
    "Cells that are slow or not run are read as well: nothing else notices a name that they miss."
    ruff = Path(sys.executable).parent/"ruff"
    check = [ruff, "check", "--no-cache", "--isolated", "--select", "F821", "--output-format", "concise", "nbs"]
    ran = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]

def test_no_tracked_file_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    machine = re.compile(
        r"(?<![\w.:/-])/(?:root|home|Users|work|tmp/ipykernel\w*)/\w|https?://[^ \"']*(?:/simple/|registry\.)")
    texts = {
        f: (ROOT / f).read_text(encoding="utf-8", errors="ignore")
        for f in listed.stdout.split("\0")
        if f and (ROOT / f).is_file()}
    assert not {f: m.group() for f, t in texts.items() if (m := machine.search(t))}
