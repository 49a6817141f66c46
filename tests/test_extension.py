"A package outside this one adds a method and a task, and a broken one does not stop it."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "from pruning_bench.bench.cli import main; main()"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The environment with the example package, and with one whose entry points cannot be imported."
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")/"example"
    shutil.copytree(ROOT/"tests/example_package", source)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target",
                    folder, source], check=True)
    broken = folder/"broken_pruner-1.0.dist-info"
    broken.mkdir()
    (broken/"METADATA").write_text("Metadata-Version: 2.1\nName: broken-pruner\nVersion: 1.0\n")
    (broken/"entry_points.txt").write_text("[pruning_bench.methods]\nbroken_pruner = broken_pruner.method\n"
                                           "[pruning_bench.tasks]\nbroken_pruner = broken_pruner.task\n")
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths),
            "PRUNING_BENCH_CACHE": str(tmp_path_factory.mktemp("cache"))}


def run(env, *args, cwd=None, limit=250):
    done = subprocess.run([*COMMAND, *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    return done


def test_the_method_and_the_task_are_listed_and_the_broken_package_is_named(installed, tmp_path):
    listed = run(installed, "methods", "centred", "--json", cwd=tmp_path)
    assert [m["method"] for m in json.loads(listed.stdout)] == ["centred"]
    assert "'broken_pruner' of group pruning_bench.methods" in listed.stderr and "repair or uninstall" in listed.stderr
    tasks = run(installed, "tasks", "--json", cwd=tmp_path)
    assert {"sum-of-two", "digits-mlp"} <= {t["task"] for t in json.loads(tasks.stdout)}
    assert "'broken_pruner' of group pruning_bench.tasks" in tasks.stderr


@pytest.fixture
def home(installed, tmp_path):
    """A copy of this package, which is no checkout: the state of the one under test is not part of its entries. Beside
    it, a repository with a leaderboard."""
    shutil.copytree(ROOT/"pruning_bench", tmp_path/"lib/pruning_bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT/"nbs/benchmarks", tmp_path/"lib/pruning_bench/benchmarks")
    site, *rest = installed["PYTHONPATH"].split(os.pathsep)
    paths = [site, str(tmp_path/"lib"), *(p for p in rest if Path(p) != ROOT)]
    env = {k: v for k, v in installed.items() if not k.startswith("GIT_")}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "PRUNING_BENCH_CACHE": str(tmp_path/"cache"),
            "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    (tmp_path/"work").mkdir()
    return env, tmp_path/"work"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_method_and_a_task_of_a_package_go_the_whole_way(home):
    "Run, freeze, check, measure again, make again, submit, and a row of the board where the branch is merged."
    env, work = home
    def go(*arguments): return run(env, *arguments, cwd=work, limit=1200)
    def git(*arguments): return subprocess.run(["git", *arguments], cwd=work, env=env, check=True,
                                               capture_output=True, text=True).stdout
    def rows(): return json.loads(go("board", "--folder", "leaderboard", "--json").stdout)
    go("run", "sum-of-two", "centred", "--control", "random", "--out", "leaderboard/entries")
    control, mine = sorted((work/"leaderboard/entries/sum-of-two").glob("*.json"))
    entry = json.loads(mine.read_text())
    assert [r["status"] for r in entry["runs"]] == ["ok"] * 3 and control.name == "centred--controlof-random.json"
    assert entry["method"]["config"]["score"] == "centred_magnitude"
    assert all(r["quality"]["after_recover"]["accuracy"] > .9 for r in entry["runs"])

    go("freeze", "sum-of-two")
    assert "every entry is accepted" in go("check", "leaderboard/entries").stdout
    assert {r["badge"] for r in rows()} == {"checked"}
    go("verify", str(mine))
    go("verify", str(control), "--reproduce")
    assert {r["variant"]: r["badge"] for r in rows() if r["board"] == "retrained"} == {
        "default": "re-evaluated", "control: random": "reproduced"}

    mine.unlink()   # it comes back by a pull request
    for f in (work/"leaderboard/artefacts").iterdir(): f.unlink()
    for command in ("init -q -b main", "config user.name A", "config user.email a@example.org",
                    "add leaderboard/entries leaderboard/tasks leaderboard/receipts", "commit -q -m board"):
        git(*command.split())
    said = go("submit", "sum-of-two/centred--default").stdout
    assert "git push origin submit/sum-of-two/centred--default" in said
    git("merge", "-q", "submit/sum-of-two/centred--default")
    assert json.loads(mine.read_text()) == entry and list((work/"leaderboard/artefacts").iterdir())
    go("check", "leaderboard/entries")
    assert {r["badge"] for r in rows() if r["variant"] == "default" and r["board"] == "retrained"} == {"re-evaluated"}
