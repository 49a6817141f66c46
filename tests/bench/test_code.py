"The digest of the code behind a run: what changes it, what does not."
import functools
import shutil
import sys
from types import MappingProxyType
from pathlib import Path

import pytest

import pruning_bench
from pruning_bench.bench import code
from pruning_bench.bench.run import run_code
from pruning_bench.bench.task import find_task
from pruning_bench.core.method import METHODS, Method, build
from pruning_bench.core.score import magnitude

PACKAGE = Path(pruning_bench.__file__).parent
CHANGE, COMMENT = "\nx = 1\n", "\n# a comment\n"


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    "A copy of the package whose modules may be edited."
    return shutil.copytree(PACKAGE, tmp_path_factory.mktemp("copy")/"pruning_bench")


@pytest.fixture
def digest(copied, monkeypatch):
    "The digest of a run, when one module of the copied package has an edited source."
    original = code.source_path
    def copied_path(module):
        found = original(module)
        return copied/found.relative_to(PACKAGE) if found and found.is_relative_to(PACKAGE) else found
    monkeypatch.setattr(code, "source_path", copied_path)
    def digest_after(method, module="bench/board", edit=lambda text: text, task="digits-mlp",
                     settings=MappingProxyType({})):
        path = copied/f"{module}.py"
        before = path.read_text()
        path.write_text(edit(before))
        try: return run_code(find_task(task), method, settings)
        finally: path.write_text(before)
    return digest_after


def append(text): return lambda source: source + text


@pytest.mark.parametrize("module", ["bench/board", "bench/cli", "bench/suites", "weight/sparsegpt", "graph/rules",
                                    "bench/tasks/fashion"])
def test_an_unrelated_module_leaves_the_digest(digest, module):
    assert digest("wanda") == digest("wanda", module, append(CHANGE))


@pytest.mark.parametrize("module", ["weight/wanda", "core/allocate", "core/driver", "core/stats",
                                    "bench/tasks/digits", "bench/task", "bench/run",
                                    "bench/measure/size"])
def test_a_module_that_the_run_uses_changes_it(digest, module):
    assert digest("wanda") != digest("wanda", module, append(CHANGE))
    assert digest("wanda") == digest("wanda", module, append(COMMENT))


def test_docstrings_do_not_count(digest):
    def shorten(source): return source.replace('"""`pruning_bench', '"""Something else: `pruning_bench')
    assert digest("wanda") == digest("wanda", "weight/wanda", shorten)


def test_the_module_of_a_replaced_part_counts(digest):
    er = {"allocate": "er"}
    assert digest("magnitude", settings=er) != digest("magnitude", "weight/allocation", append(CHANGE), settings=er)
    assert digest("magnitude") == digest("magnitude", "weight/allocation", append(CHANGE))


@pytest.mark.parametrize("module", ["graph/rules", "graph/attention", "graph/trace"])
def test_rules_that_are_found_by_name_count_for_structures(digest, module):
    assert digest("l1-filter") != digest("l1-filter", module, append(CHANGE))


def test_a_budget_in_a_resource_counts(digest):
    macs = {"budget": "macs"}
    assert digest("magnitude", settings=macs) != digest("magnitude", "graph/budgets", append(CHANGE), settings=macs)


@pytest.mark.parametrize("name", ["magnitude", "l1-filter", "rigl", "imp", "lrp"])
def test_every_digest_is_repeatable(name):
    task = find_task("digits-mlp")
    assert code.code_digest(build(name), METHODS[name], task) == code.code_digest(build(name), METHODS[name], task)


def test_a_package_of_its_own_counts_and_a_library_does_not(tmp_path, monkeypatch):
    folder = tmp_path/"own_pruner"
    folder.mkdir()
    (folder/"__init__.py").write_text("")
    (folder/"helpers.py").write_text("factor = 1\n")
    (folder/"method.py").write_text("import json\nfrom pruning_bench import Method\nfrom .helpers import factor\ndef "
                                    "own(): return Method()\n")
    monkeypatch.syspath_prepend(tmp_path)
    from own_pruner.method import own
    card, task = type("Card", (), {"build": own}), find_task("digits-mlp")
    used = code.modules_used(Method(), card, task)
    assert code.counted_packages(used) == {"pruning_bench", "own_pruner"}
    assert {"own_pruner.helpers", "own_pruner.method"} <= set(code.import_closure(["own_pruner.method"]))
    before = code.code_digest(Method(), card, task)
    (folder/"helpers.py").write_text("factor = 2\n")
    assert code.code_digest(Method(), card, task) != before
    for name in ("own_pruner", "own_pruner.helpers", "own_pruner.method"): sys.modules.pop(name)


def test_a_function_without_a_file_has_no_digest():
    def scored(w, stats): return w.abs()
    scored.__module__ = "__main__"
    record = Method(score=functools.partial(scored))
    assert code.code_digest(record, METHODS["magnitude"], find_task("digits-mlp")) is None
    assert len(code.code_digest(Method(score=magnitude), METHODS["magnitude"], find_task("digits-mlp"))) == 64


@pytest.mark.parametrize("text, other, same", [
    ("x = 1", "x = 1  # one", True),
    ("x = 1", "\n\nx = 1\n", True),
    ("x = '# no comment'", "x = '# another'", False),
    ('def f():\n    "Doc."\n    return 1', "def f():\n    return 1", True),
    ('class A:\n    """Doc\n\n    of it."""\n    x = 1', "class A:\n    x = 1", True),
    ('def f(): "é"; return 1', 'def f(): "e"; return 1', True),
    ('x = """a\n\nb"""', 'x = """a\nb"""', False),
    ('x = """a \nb"""', 'x = """a\nb"""', False),
    ('x = f"""a\n\n{1}"""', 'x = f"""a\n{1}"""', False),
    ("def f():\n    1\n    'not a docstring'", "def f():\n    1\n    'another text'", False),
])
def test_what_counts_as_code(text, other, same):
    assert (code.source_without_text(text) == code.source_without_text(other)) is same
