"CONTRIBUTING.md shows how to add a method; here its cells become a notebook in a copy of the project."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def chapter():
    "The notebook that section tells its reader to write."
    section = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Add a method")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(markdown|python)\n(.*?)^```$", section, flags=re.S | re.M)
    code = dict(cell_type="code", execution_count=None, outputs=[])
    cells = [
        {
            **(code if kind == "python" else dict(cell_type="markdown")), "id": f"cell{i}", "metadata": {},
            "source": text.rstrip("\n")
        } for i, (kind, text) in enumerate(blocks)]
    path, = set(re.findall(r"`(nbs/\S+\.ipynb)`", section))
    return path, dict(
        cells=cells, metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")),
        nbformat=4, nbformat_minor=5)

def test_a_method_can_be_added_as_described(tmp_path):
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked")
    for name in ("nbs", "pruning_bench", "tests", ".ci"): shutil.copytree(ROOT/name, tmp_path/name, ignore=skip)
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/name, tmp_path)
    path, notebook = chapter()
    assert not (ROOT/path).exists()
    (tmp_path/path).parent.mkdir(exist_ok=True)
    (tmp_path/path).write_text(json.dumps(notebook))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    def run(*command):
        subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=tmp_path, env=env, check=True)
    run("nbdev_export"); run("nbdev_clean"); run("nbdev_export")
    run("python", ".ci/notebooks.py", path)
    run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_export.py", "-k",
        "relative or modules or clean")
    use = ("import sys, pruning_bench as p; assert p.__file__.startswith(sys.argv[1]); "
           "assert len(p.methods('relative-importance'))")
    run("python", "-c", use, str(tmp_path))
