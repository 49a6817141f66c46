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


def run(env, *args, cwd=None):
    done = subprocess.run([*COMMAND, *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done


def test_the_method_and_the_task_are_listed_and_the_broken_package_is_named(installed, tmp_path):
    listed = run(installed, "methods", "centred", "--json", cwd=tmp_path)
    assert [m["method"] for m in json.loads(listed.stdout)] == ["centred"]
    assert "'broken_pruner' of group pruning_bench.methods" in listed.stderr and "repair or uninstall" in listed.stderr
    tasks = run(installed, "tasks", "--json", cwd=tmp_path)
    assert {"sum-of-two", "digits-mlp"} <= {t["task"] for t in json.loads(tasks.stdout)}
    assert "'broken_pruner' of group pruning_bench.tasks" in tasks.stderr


@pytest.mark.slow
def test_a_run_in_a_fresh_kernel_ends_on_a_board(installed, tmp_path):
    run(installed, "run", "sum-of-two", "centred", "--seeds", "2", "--out", "leaderboard/entries", cwd=tmp_path)
    [path] = (tmp_path/"leaderboard/entries/sum-of-two").glob("*.json")
    entry = json.loads(path.read_text())
    assert [r["status"] for r in entry["runs"]] == ["ok", "ok"]
    assert entry["method"]["config"]["score"] == "centred_magnitude"
    assert all(r["quality"]["after_recover"]["accuracy"] > .9 for r in entry["runs"])
    board = json.loads(run(installed, "board", "--folder", "leaderboard", "--json", cwd=tmp_path).stdout)
    assert {(r["task"], r["method"]) for r in board} == {("sum-of-two", "centred")}
