"What a user installs: the wheel is complete, and imports without the tools that develop it."
import configparser, email, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]

def project(requirement): return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT/"pruning_bench", source/"pruning_bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT/"nbs"/"benchmarks", source/"nbs"/"benchmarks", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(ROOT/"leaderboard"/"suites", source/"leaderboard"/"suites")
    shutil.copytree(ROOT/"tests", source/"tests", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source], check=True
    )
    [path] = out.glob("*.whl")
    with zipfile.ZipFile(path) as z: z.extractall(out/"unpacked")
    return out/"unpacked"

@pytest.fixture(scope="module")
def metadata(wheel):
    [info] = wheel.glob("*.dist-info")
    return email.message_from_string((info/"METADATA").read_text(encoding="utf-8"))

def test_the_package_says_that_it_is_typed(wheel): assert (wheel/"pruning_bench"/"py.typed").exists()

def test_every_module_is_in_the_wheel_and_nothing_else(wheel):
    packed = {str(p.relative_to(wheel)) for p in wheel.rglob("*.py")}
    assert packed == {str(p.relative_to(ROOT)) for p in (ROOT/"pruning_bench").rglob("*.py")}

def test_benchmark_notebooks_travel_with_the_package(wheel):
    templates = {p.name for p in (ROOT/"nbs"/"benchmarks").glob("*.ipynb")}
    assert templates and {p.name for p in (wheel/"pruning_bench"/"benchmarks").iterdir()} == templates

def test_suite_files_travel_with_the_package(wheel):
    files = {p.name for p in (ROOT/"leaderboard"/"suites").glob("*.toml")}
    assert files and {p.name for p in (wheel/"pruning_bench"/"suites").iterdir()} == files


def test_the_files_of_the_site_travel_with_the_package(wheel):
    here = ROOT/"pruning_bench"/"bench"/"site_templates"
    packed = {p.name for p in (wheel/"pruning_bench"/"bench"/"site_templates").iterdir()}
    assert packed == {p.name for p in here.iterdir()} and {"base.html", "site.js", "site.css"} <= packed

def test_requirements_come_from_settings_and_none_is_a_development_tool(metadata):
    cfg = settings()
    required = metadata.get_all("Requires-Dist")
    plain = {project(r) for r in required if "extra ==" not in r}
    assert plain == {project(r) for r in cfg["requirements"].split()}
    assert not plain & {project(r) for r in cfg["dev_requirements"].split()}
    def extra(name): return {project(r) for r in required if re.search(f"extra == .{name}.", r)}
    listed = {
        k.removesuffix("_requirements"): {project(r) for r in v.split()}
        for k, v in cfg.items()
        if k.endswith("_requirements")}
    assert plain == {"torch", "numpy", "safetensors", "tqdm"}
    assert extra("dev") == listed["dev"] | listed["bench"]
    assert extra("all") == set().union(*(v for k, v in listed.items() if k != "dev"))
    assert all(extra(name) == listed[name] for name in listed.keys() - {"dev"})

def test_name_version_and_python(metadata):
    cfg = settings()
    assert (metadata["Name"], metadata["Version"]) == (cfg["lib_name"], cfg["version"])
    assert metadata["Requires-Python"] == f">={cfg['min_python']}"

def test_command(wheel):
    [info] = wheel.glob("*.dist-info")
    entry = configparser.ConfigParser(delimiters=["="])
    entry.read(info/"entry_points.txt")
    assert entry["console_scripts"]["pruning-bench"] == "pruning_bench.bench:main"
    module, function = entry["console_scripts"]["pruning-bench"].split(":")
    isolated(wheel, f"import {module} as m; assert callable(m.{function})")


BLOCK = """
import sys
sys.path.insert(0, sys.argv[1])
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2:]: raise ImportError(f"{name} is a development tool")
sys.meta_path.insert(0, Block())
"""

def isolated(wheel, code):
    "Run `code` on the unpacked wheel, with every development tool out of reach."
    tools = [project(r).replace("-", "_") for r in settings()["dev_requirements"].split() if project(r) != "setuptools"]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + code, wheel, *tools], cwd=wheel, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout

def test_every_module_imports_without_the_development_tools(wheel):
    names = [
        str(p.relative_to(wheel).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in wheel.rglob("*.py")]
    code = (
        f"import importlib\nfor name in {names}: assert importlib.import_module(name).__file__.startswith(sys.argv[1])")
    isolated(wheel, code)

def test_using_the_library_does_not_load_the_benchmark(wheel):
    loaded = isolated(wheel, "from pruning_bench import prune, methods; print(*sys.modules)").split()
    assert "pruning_bench.core" in loaded
    heavy = {"pandas", "matplotlib", "transformers", "diffusers", "sklearn", "papermill"}
    assert not [m for m in loaded if m.startswith("pruning_bench.bench") or m in heavy]

def test_importing_the_package_imports_the_core_alone():
    "Methods are imported when a name is first missing, the benchmark by itself: importing is fast (`make bench`)."
    code = "import sys, pruning_bench; print(*{m.split('.')[1] for m in sys.modules if m.startswith('pruning_bench.')})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.split() == ["core"]

BLOCK_ONE = BLOCK.replace(
    'raise ImportError(f"{name} is a development tool")', "raise ModuleNotFoundError(name, name=name)")

def test_the_command_without_its_extra_says_what_to_install(wheel):
    code = "import pruning_bench.bench as b\ntry: b.main()\nexcept SystemExit as e: print(e)"
    ran = subprocess.run(
        [sys.executable, "-c", BLOCK_ONE + code, str(wheel), "typer"], capture_output=True, text=True, cwd=wheel)
    assert "pip install 'pruning_bench[bench]'" in ran.stdout, ran.stderr
