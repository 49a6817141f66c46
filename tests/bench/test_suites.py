"The suite files: what they describe stays the same, what is wrong in one is refused, systems stand on a board."
import hashlib
import json
from pathlib import Path

import pytest

from pruning_bench.bench.suites import SUITES, read_suite, suite_folder, suite_jobs
from pruning_bench.core.inputs import BadInput
from pruning_bench.core.method import METHODS

PAPERS = {"2403.18955": "obspa", "2203.02549": "precrop", "1912.08881": "lrp", "2309.14157": "lapp",
          "2201.06776": "masksparsity", "2404.13648": "dimap", "2407.02068": "lpvit", "2304.07461": "betarank",
          "2308.07209": "udfc", "2303.16212": "emo-pms", "2301.10835": "layer-lottery", "2302.10798": "polarize",
          "2306.01526": "gcp-yolov4", "2509.12918": "yolov8-cwd", "1905.09717": "tas", "1908.09791": "ofa",
          "2512.20635": "shrp", "2211.10155": "splora", "2212.01977": "fedtiny"}
CHEAP_SYSTEMS = {"precrop", "lapp", "lrp", "masksparsity", "betarank", "gcp-yolov4", "yolov8-cwd", "tas", "ofa"}


def jobs(*names):
    return [j for n in names for j in SUITES[n]()]


def test_the_jobs_of_the_suites_written_in_python_are_still_there():
    "Results and entries are found by the parameters of a job: moving suites into files loses none of them."
    def line(job):
        text = json.dumps(job.parameters(), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {job.name}"
    before = Path(__file__).with_name("suite_jobs.txt").read_text().splitlines()
    assert len(before) == 231
    assert {b.partition(" ")[2] for b in before} <= {line(job) for name in SUITES for job in suite_jobs(name)}


def test_every_file_of_the_folder_is_a_suite_with_jobs_of_different_names():
    files = sorted(suite_folder().glob("*.toml"))
    assert {f.stem for f in files} <= set(SUITES)
    for file in files:
        names = [j.name for j in read_suite(file)]
        assert names and len(names) == len(set(names))


GRID = """about = "x"
[[grid]]
tasks = ["digits-mlp"]
methods = ["magnitude"]
budgets = [0.5]
seeds = [0]
controls = ["random"]
variants.v = {pattern = "2:4"}
"""


@pytest.mark.parametrize("old, new, words", [
    ("seeds", "seed", "seeds"), ("about", "abuot", "about"), ("budgets", "sparsities", "sparsities"),
    ("[0.5]", "[1.0]", "[0, 1)"), ("[0.5]", "[nan]", "nan"), ("[0.5]", "[true]", "budgets"), ("[0.5]", "[]", "budgets"),
    ("[0.5]", "[0.5, 0.5]", "budgets"), ("seeds = [0]", "seeds = [-1]", "seeds"),
    ("digits-mlp", "digits-mpl", "digits-mlp"),
    ('"magnitude"', '"magnitud"', "magnitude"), ("pattern", "patern", "pattern"), ('"random"', '"randm"', "random"),
    ("[[grid]]", "[grid]", "grid"), ("budgets = [0.5]\n", "", "budgets"), ("= [0]", "= [0", "TOML"),
    ("seeds = [0]", "seeds = [0]\nseeds = [1]", "TOML"),
])
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, old, new, words):
    path = tmp_path / "mine.toml"
    path.write_text(GRID)
    assert [j.name for j in read_suite(path)] == ["digits-mlp/magnitude--v", "digits-mlp/magnitude--v, control: random"]
    path.write_text(GRID.replace(old, new))
    with pytest.raises(BadInput) as refused: read_suite(path)
    message = str(refused.value)
    assert message.startswith("suite 'mine': ") and words in message and len(message.splitlines()) == 1


def test_includes(tmp_path):
    def write(name, text): (tmp_path / f"{name}.toml").write_text('about = "x"\n' + text)
    (tmp_path / "a.toml").write_text(GRID)
    write("b", '[[include]]\nsuite = "a"\n[[include]]\nsuite = "smoke"\ntasks = ["digits-data"]')
    assert [j.method for j in read_suite(tmp_path / "b.toml")] == ["magnitude", "magnitude", "random-subset"]
    write("c", '[[include]]\nsuite = "d"')
    write("d", '[[include]]\nsuite = "c"')
    write("e", '[[include]]\nsuite = "a"\ntasks = ["digits-cnn"]')
    for name, words in (("c", "includes itself"), ("e", "digits-cnn"), ("no-such-file", "no-such-file")):
        with pytest.raises(BadInput, match=words): read_suite(tmp_path / f"{name}.toml")
    write("f", '[[include]]\nsuite = "a"\n' + GRID.partition("\n")[2])
    with pytest.raises(BadInput, match="listed twice"): read_suite(tmp_path / "f.toml")


def test_the_published_systems_are_registered_under_their_papers():
    assert {p: METHODS[n].paper for p, n in PAPERS.items()} == {p: f"arXiv:{p}" for p in PAPERS}


def test_ten_of_them_and_more_stand_on_the_digits_board():
    on_board = {j.method for j in jobs("embedded", "structured") if j.task == "digits-cnn" and j.variant == "default"}
    assert set(PAPERS.values()) - on_board == {"shrp"}   # it needs attention heads
    assert CHEAP_SYSTEMS <= {j.method for j in jobs("structured")}
    assert CHEAP_SYSTEMS <= set(PAPERS.values()) and len(CHEAP_SYSTEMS) == 9


def test_the_systems_stand_beside_random_pruning_at_the_same_sparsity():
    found = jobs("structured")
    random = {s for j in found if j.task == "digits-cnn" and j.method == "rand-struct" for s in j.sparsities}
    assert {s for j in found if j.method in CHEAP_SYSTEMS for s in j.sparsities} <= random
