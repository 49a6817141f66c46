"""The command line as a person uses it: a process, its exit code, its one line."""
import json
import os
import subprocess
import sys

import pytest


def cli(*args, **kw):
    return subprocess.run([sys.executable, "-c", "from pruning_bench.bench.cli import main; main()", *args],
                          capture_output=True, text=True, timeout=250, **kw)


@pytest.mark.parametrize("args, near", [
    (["run", "digits-mpl", "magnitude"], "digits-mlp"),
    (["run", "digits-mlp", "magnitud"], "magnitude"),
    (["run", "digits-mlp", "magnitude", "--set", "patern=2:4"], "pattern"),
    (["run", "digits-mlp", "magnitude", "--set", "pattern"], "name=value"),
    (["run", "digits-mlp", "magnitude", "--sparsity", "1"], "[0, 1)"),
    (["run", "digits-mlp", "magnitude", "--sparsity", "-0.1"], "[0, 1)"),
    (["run", "digits-mlp", "magnitude", "--sparsity", "nan"], "[0, 1)"),
    (["run", "digits-mlp", "magnitude", "--sparsity", "many"], "many"),
    (["run", "digits-mlp", "magnitude", "--device", "cuda:99"], "--device cpu"),
    (["run", "digits-mlp", "magnitude", "--control", "shufled"], "shuffled"),
    (["run", "digits-mlp", "magnitude", "--tier", "ful"], "unknown task"),
    (["run", "lmm:gpt2", "magnitude"], "lm"),
    (["suite", "embeded"], "embedded"),
    (["suite", "smoke", "--device", "cuda:99"], "--device cpu"),
    (["suite", "smoke", "--engine", "rey"], "ray"),
    (["suite", "smoke", "--address", "10.0.0.1:6379"], "--engine ray"),
    (["tasks", "digits-mpl"], "digits-mlp"),
    (["methods", "--family", "wieght"], "weight"),
    (["board", "--folder", "no/such/folder"], "suite embedded"),
])
def test_wrong_requests_are_one_line_and_exit_2(args, near, tmp_path):
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and near in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_data_is_one_line_before_any_work(tmp_path):
    env = {k: v for k,
           v in os.environ.items() if k != "PRUNING_BENCH_DATA"} | {"PRUNING_BENCH_CACHE": str(tmp_path / "cache"),
                                                                    "PRUNING_BENCH_OFFLINE": "1"}
    done = cli("run", "fashion-cnn@smoke", "magnitude", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "set PRUNING_BENCH_DATA" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "cache/runs").exists()


def test_lists_are_readable_by_machines(tmp_path):
    methods = json.loads(cli("methods", "*magnitude*", "--json", cwd=tmp_path).stdout)
    assert {"magnitude", "global-magnitude"} <= {m["method"] for m in methods}
    assert all("magnitude" in m["method"] for m in methods)
    tasks = json.loads(cli("tasks", "--json", cwd=tmp_path).stdout)
    assert {"digits-mlp", "digits-cnn", "pydoc-llama", "digits-ddpm", "digits-data"} <= {t["task"] for t in tasks}
    page = json.loads(cli("tasks", "pydoc-llama", "--json", cwd=tmp_path).stdout)
    assert {"tokenizer", "bos", "context", "stride", "windows", "dtype", "data", "digest"} <= set(page)


def test_a_single_method_is_shown_with_its_settings_and_paper(tmp_path):
    shown = cli("methods", "gmp", cwd=tmp_path).stdout
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.splitlines() if len(line.split()) > 1}
    assert lines["method"] == "gradual-magnitude" and lines["paper"] == "https://arxiv.org/abs/1710.01878"
    assert lines["trains"] == "300" and lines["own_loop"] == "True" and lines["use"] == "prune"
    assert lines["pruning_steps"].split() == ["20", *"pruning steps of the cubic schedule".split()]
    assert "apply_rule" in cli("methods", "sft", cwd=tmp_path).stdout
    assert "no settings" in cli("methods", "magnitude", cwd=tmp_path).stdout
    several = cli("methods", "lottery ticket hypothesis", cwd=tmp_path).stdout
    assert "imp-late" in several and "settings" not in several


def test_a_run_prints_its_entry_and_is_found_again(tmp_path):
    args = ["run", "digits-mlp", "magnitude", "--sparsity", "0.9", "--sparsity", "0.95", "--seeds", "1", "--out",
            str(tmp_path / "out"), "--json"]
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert [r["sparsity"] for r in entry["runs"]] == [.9, .95] and all(r["status"] == "ok" for r in entry["runs"])
    assert json.loads((tmp_path / "out/digits-mlp/magnitude--default.json").read_text()) == entry
    again = cli(*args, cwd=tmp_path)
    assert json.loads(again.stdout) == entry and "1 of 1 jobs are finished already" in again.stderr


def test_a_pattern_is_a_sparsity_and_names_the_variant(tmp_path):
    done = cli("run", "digits-mlp", "magnitude", "--sparsity", "2:4", "--seeds", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert entry["method"]["variant"] == "2:4"
    assert entry["runs"][0]["sparsity"] == .5
    assert abs(entry["runs"][0]["size"]["mask_density"] - .5) < 1e-9
