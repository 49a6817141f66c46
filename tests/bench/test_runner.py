"""The queue under faults: failing cells, dead kernels, time limits, kill -9, injected names."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from rich.console import Console
from rich.text import Text

from entries import ENTRY_CODE
from pruning_bench.bench import code, runner, worker
from pruning_bench.bench.runner import Job, run_jobs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    "Put a notebook of the given code in the place of the benchmark template; no dense model is trained."
    def make(code):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("task = method = variant = device = "
                                                                       "''\nsparsities = seeds = []\nsettings = "
                                                                       "{}\nout = ''"),
                                             nbformat.v4.new_code_cell(code)])
        nb.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nb, tmp_path / "template.ipynb")
        monkeypatch.setattr(runner, "template_notebook", lambda job: tmp_path / "template.ipynb")
        monkeypatch.setattr(runner, "plan_steps", lambda jobs, retry, original=runner.plan_steps:
                            [s for s in original(jobs, retry) if s.job and not setattr(s, "needs", frozenset())])
    return make


QUIET = Console(quiet=True)
JOB = Job("digits-mlp", "magnitude", sparsities=(.5,), seeds=(0,))
GOOD = ENTRY_CODE + "import json, pathlib\npathlib.Path(out).write_text(json.dumps(entry))\n"


def test_a_job_leaves_its_result_notebook_and_log(cache, notebook):
    notebook(GOOD)
    found = run_jobs([JOB], 1, console=QUIET)
    assert found[JOB.name]["method"]["name"] == "magnitude"
    assert {"result.json", "notebook.ipynb", "log.txt", "job.json"} <= {p.name for p in JOB.folder().iterdir()}


def test_a_finished_job_is_not_run_again(cache, notebook):
    notebook(GOOD + "\nwith open('../../../count', 'a') as f: f.write('x')")
    run_jobs([JOB], 1, console=QUIET)
    run_jobs([JOB], 1, console=QUIET)
    assert (cache / "count").read_text() == "x"


@pytest.mark.parametrize("code, word", [("raise RuntimeError('a cell that fails')", "a cell that fails"),
                                        ("import os; os._exit(7)", "died"), ("1 + 1", "")])
def test_a_failure_is_recorded_and_the_others_finish(cache, notebook, code, word):
    notebook("if method == 'random':\n    " + code.replace("; ", "\n    ") + "\nelse:" + GOOD.replace("\n", "\n    "))
    bad = Job("digits-mlp", "random", sparsities=(.5,), seeds=(0,))
    found = run_jobs([bad, JOB], 2, console=QUIET)
    assert isinstance(found[JOB.name], dict) and isinstance(found[bad.name], str)
    record = runner.past_failures(bad)
    assert len(record) == (3 if word == "died" else 1)   # a dead kernel is started again, an exception repeats itself
    assert {r["status"] for r in record} == {"error"} and (bad.folder() / f"log-{len(record)}.txt").exists()
    assert found[bad.name].status == "error" and word.lower() in found[bad.name].lower()
    assert word.lower() in (bad.folder() / "log-1.txt").read_text().lower()


def test_a_failure_is_retried_twice_and_then_waits_to_be_asked(cache, notebook):
    notebook("raise RuntimeError('again')")
    for attempts, retry in ((1, False), (2, False), (3, False), (3, False), (4, True)):
        run_jobs([JOB], 1, retry=retry, console=QUIET)
        assert len(runner.past_failures(JOB)) == attempts


def test_a_job_that_takes_too_long_is_stopped(cache, notebook):
    notebook("import time; time.sleep(600)")
    start = time.monotonic()
    found = run_jobs([JOB], 1, limit=6., console=QUIET)
    assert isinstance(found[JOB.name], str)
    assert runner.past_failures(JOB)[0]["status"] == "timeout"
    assert time.monotonic() - start < 60


def test_half_a_result_does_not_count(cache, notebook):
    notebook(GOOD)
    run_jobs([JOB], 1, console=QUIET)
    path = JOB.folder() / "result.json"
    for broken in (path.read_text()[:100], "", "{}"):
        path.write_text(broken)
        assert runner.finished_entry(JOB) is None
        assert isinstance(run_jobs([JOB], 1, console=QUIET)[JOB.name], dict) and runner.finished_entry(JOB)


def test_the_end_of_a_job_has_a_type(cache, notebook):
    notebook("""
class BadInput(ValueError): pass
import torch
if variant == 'oom': raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
if variant == 'diverged': raise FloatingPointError('the loss is nan')
if variant == 'infeasible': raise BadInput('the task has no test set')
""")
    jobs = [Job("digits-mlp", "magnitude", v, (.5,), (0,)) for v in ("oom", "diverged", "infeasible")]
    found = run_jobs(jobs, 2, console=QUIET)
    assert {j.variant: found[j.name].status for j in jobs} == {j.variant: j.variant for j in jobs}
    assert [f["status"] for f in runner.past_failures(jobs[1])] == ["diverged"]
    assert found[jobs[1].name] == "FloatingPointError: the loss is nan"


def test_a_job_that_holds_too_much_memory_is_stopped(cache, notebook):
    notebook("import time; held = bytearray(1_500_000_000); time.sleep(600)")
    found = run_jobs([JOB], 1, memory=1e9, console=QUIET)
    assert found[JOB.name].status == "oom" and "the limit is 1 GB" in found[JOB.name]
    assert not (JOB.folder() / "result.json").exists() and len(runner.past_failures(JOB)) == 1


def test_each_job_on_cuda_has_a_gpu_of_its_own(cache, notebook, monkeypatch):
    monkeypatch.setattr(runner, "visible_gpus", lambda: ["5", "7"])
    notebook("import os, time; began = time.time(); time.sleep(1)" + GOOD + """
with open('../../../gpus', 'a') as f: f.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {began} {time.time()}\\n")
""")
    jobs = [Job("digits-mlp", "magnitude", f"job {i}", (.5,), (0,), device="cuda") for i in range(3)]
    found = run_jobs(jobs, 3, console=QUIET)
    assert all(isinstance(e, dict) for e in found.values())
    used = [(line.split()[0], *map(float, line.split()[1:])) for line in (cache / "gpus").read_text().splitlines()]
    assert len(used) == 3 and {gpu for gpu, _, _ in used} == {"5", "7"}
    shared = [(a, b) for a in used for b in used if a != b and a[0] == b[0]]
    assert shared and all(a[2] <= b[1] or b[2] <= a[1] for a, b in shared)   # one after the other


def test_without_a_terminal_progress_is_a_line_for_each_job(cache, notebook, tmp_path):
    notebook(GOOD)
    jobs = [Job("digits-mlp", "magnitude", f"job {i}", (.5,), (0,)) for i in range(2)]
    with open(tmp_path / "log", "w") as f: run_jobs(jobs, 1, console=Console(file=f, width=200))
    said = (tmp_path / "log").read_text()
    assert "\x1b" not in said and [line.count("cells") for line in said.splitlines()] == [0, 1, 1]
    assert "(1/2 cells, about " in said and "(2/2 cells)" in said


def test_in_a_terminal_progress_is_a_bar_with_the_time_left(cache, notebook, tmp_path):
    notebook(GOOD)
    jobs = [Job("digits-mlp", "magnitude", f"job {i}", (.5,), (0,)) for i in range(2)]
    with open(tmp_path / "log", "w") as f:
        run_jobs(jobs, 2, console=Console(file=f, width=150, force_terminal=True, force_jupyter=False))
    shown = Text.from_ansi((tmp_path / "log").read_text()).plain
    assert "━" in shown and "0/2 cells" in shown and "2/2 cells" in shown and " left " in shown
    assert "digits-mlp/magnitude--job 0, digits-mlp/magnitude--job 1" in shown   # what runs
    assert "(1/2 cells" not in shown                                             # the lines of a log


def test_names_of_parameters_cannot_carry_code(cache, notebook, tmp_path):
    notebook(GOOD)
    with pytest.raises(ValueError, match="no parameter"):
        worker.execute_notebook(tmp_path / "template.ipynb", tmp_path / "x", {"task": "a", "y = 1; import os; z": 1})


def test_the_digest_depends_on_everything_that_matters(notebook):
    notebook(GOOD)
    base = JOB.digest()
    others = [Job("digits-mlp", "random", sparsities=(.5,), seeds=(0,)),
              Job("digits-mlp", "magnitude", sparsities=(.6,), seeds=(0,)),
              Job("digits-mlp", "magnitude", sparsities=(.5,), seeds=(1,)),
              Job("digits-mlp", "magnitude", sparsities=(.5,), seeds=(0,), settings={"allocate": "erk"}),
              Job("digits-cnn", "magnitude", sparsities=(.5,), seeds=(0,))]
    assert len({base, *[j.digest() for j in others]}) == 6
    notebook(GOOD + "\n1")
    assert JOB.digest() != base


def test_the_digest_depends_on_the_code_of_the_run_only(notebook, monkeypatch):
    notebook(GOOD)
    base, original = JOB.digest(), code.module_facts
    def edited(name):
        "The digest of the job when one module has other code."
        with monkeypatch.context() as m:
            m.setattr(code, "module_facts", lambda module: ("x" if module == name else original(module)[0],
                                                            original(module)[1]))
            return JOB.digest()
    assert edited("pruning_bench.bench.board") == edited("pruning_bench.weight.wanda") == base
    assert base not in [edited(f"pruning_bench.{m}") for m in ("core.score", "bench.tasks.digits", "bench.run")]


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] if os.path.exists(
        f"/proc/{pid}/stat") else True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_run_again_it_goes_on_where_it_was(cache, tmp_path, how):
    args = [sys.executable, "-c", "from pruning_bench.bench.cli import main; main()", "run", "digits-mlp", "magnitude",
            "--seeds", "1", "--json"]
    env = {**os.environ, "PRUNING_BENCH_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    def hear(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # jobs in the background of a shell ignore it
    first = subprocess.Popen(args, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             preexec_fn=hear)
    job = Job("digits-mlp", "magnitude", seeds=(0,))
    for _ in range(3000):
        if (job.folder() / "log.txt").exists(): break
        time.sleep(.1)
    workers = [int(p) for p in subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True,
                                              text=True).stdout.split()]
    first.send_signal(how)
    first.wait(120)
    for _ in range(600):
        if not any(map(alive, workers)): break
        time.sleep(.1)
    assert workers and not any(map(alive, workers)), "a worker outlived its parent"
    ends = [f["status"] for f in runner.past_failures(job)]
    assert ends == (["cancelled"] if how == signal.SIGINT else [])   # neither counts as a failure of the job
    assert list(cache.glob("digits-mlp*.safetensors")), "the dense model that was finished is kept"
    done = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and json.loads(done.stdout)["runs"][0]["status"] == "ok", done.stderr
