"""Attacks: entries, plans, artefacts, receipts and parameters that somebody wrote to do harm. Each is refused in one
sentence with exit code 2, nothing of it is executed, and no file is left behind."""
import copy
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_checks import board, honest, protocol   # noqa: F401
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.bench import cli
from pruning_bench.bench.entry import entry_path, write_json
from pruning_bench.bench.worker import execute_notebook, parameter_names
from pruning_bench.core.plan import Plan, save_plan, write_plan
from pruning_bench.core.plan_files import FIELDS, MORE_FIELDS

ROOT = Path(__file__).resolve().parents[2]
CODE = "__import__('os').system('touch hacked')"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path_factory, monkeypatch):
    "What an attack would write, it writes here."
    home = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(home)
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(home/"cache"))
    yield
    left = [p for p in home.rglob("*") if ".hypothesis" not in p.parts]   # where hypothesis keeps what it found
    assert not left, "an attack left a file behind"


def command(capsys, *arguments):
    "The exit code of the command line, and the lines it prints to stderr."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pruning-bench", *map(str, arguments)])
        try: cli.main()
        except SystemExit as e: code = e.code or 0
        else: code = 0
    return code, capsys.readouterr().err.splitlines()


def is_refused(capsys, folder, path, *words):
    "Exit code 2, one sentence, and a folder that is as it was."
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*")}
    for what in ("check", path), ("verify", path, "--reproduce"):
        code, said = command(capsys, *what, "--folder", folder)
        assert code == 2, said
        assert len(said) == 1 and said[0].startswith("pruning-bench: ")
        assert len(said[0]) < 1000 and said[0].isprintable()
    assert {p: p.lstat().st_mtime_ns for p in folder.rglob("*")} == before


# entries

def places(value, at=()):
    "Every place in a value of JSON that holds a text."
    if isinstance(value, str): yield at
    elif isinstance(value, dict): yield from (p for k, v in value.items() for p in places(v, (*at, k)))
    elif isinstance(value, list): yield from (p for i, v in enumerate(value) for p in places(v, (*at, i)))


def with_text(entry, place, text):
    other = json.loads(json.dumps(entry))
    inner = other
    for k in place[:-1]: inner = inner[k]
    inner[place[-1]] = text
    return other


HOSTILE_TEXT = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&#60;b&#62;", "javascript:alert(1)",
                "a\u202eb", "a\u200bb", "a\x1b[2Jb", "a\rb", "a\x00b", "x" * 3000]


def test_markup_in_every_text_of_an_entry_is_refused(board, protocol, capsys):   # noqa: F811
    from pruning_bench.bench.checks import check_files
    from pruning_bench.bench.strict_json import parse_json
    folder, path, entry = board
    found = list(places(entry))
    assert len(found) > 20
    for i, place in enumerate(found):
        for text in HOSTILE_TEXT:
            with pytest.raises(BadInput): parse_json(json.dumps(with_text(entry, place, text)))
        path.write_text(json.dumps(with_text(entry, place, HOSTILE_TEXT[i % len(HOSTILE_TEXT)])))
        assert any(f.fatal for f in check_files([path], folder)), place
    is_refused(capsys, folder, path)


@pytest.mark.parametrize("text", ["a | b", "a\n| best |", "`x`", "[a](http://x)", "![a](b)", "=1+1", "{{7*7}}\n",
                                  "../a"])
def test_a_variant_is_no_markdown(board, capsys, text):   # noqa: F811
    folder, path, entry = board
    path.unlink()
    entry["method"]["variant"] = text
    hostile = write_json(entry, entry_path(folder/"entries", entry))
    code, _ = command(capsys, "check", hostile, "--folder", folder)
    assert code == 2


METHODS = ["../magnitude", "..", "/etc/passwd", "a/b", "a\\b", "", "-x", "a.b", "magnitude\n", "MAGNITUDE",
           "m\u0430gnitude", "magnitude\u200b", "\uff4dagnitude", "wand\u0251", "magnltude", "magnitude ", CODE,
           "a" * 300]
TASKS = ["../../x", "/etc", "digits-mlp/../x", "module:os", "digits-m\u217cp", CODE, "a" * 300]


@pytest.mark.parametrize("part, name", [("method", n) for n in METHODS] + [("task", n) for n in TASKS])
def test_names_that_are_paths_or_look_alike_are_refused(board, capsys, part, name):   # noqa: F811
    folder, path, entry = board
    entry[part]["name"] = name
    path.write_text(json.dumps(entry))
    is_refused(capsys, folder, path)


TEXT_ATTACKS = {
    "nan": lambda t: t.replace('"speedup": 1.0', '"speedup": NaN', 1),
    "infinity": lambda t: t.replace('"speedup": 1.0', '"speedup": -Infinity', 1),
    "overflow": lambda t: t.replace('"speedup": 1.0', '"speedup": 1e999', 1),
    "duplicate": lambda t: t.replace('"seed": 0', '"seed": 0, "seed": 0', 1),
    "deep": lambda t: t.replace('"settings": {}', '"settings": ' + '{"a":' * 50_000 + "1" + "}" * 50_000, 1),
    "unclosed": lambda t: "[" * 1_000_000, "quotes": lambda t: '["' + '\\"' * 900_000,
    "digits": lambda t: t.replace('"year": 2020', '"year": ' + "9" * 10_000, 1),
    "nothing": lambda t: "", "null": lambda t: "null", "number": lambda t: "1e400"}
DERIVED = ("rank", "delta", "ratio", "speedup", "badge", "receipt", "verified", "mean", "sd", "best")


@pytest.mark.parametrize("how", TEXT_ATTACKS)
def test_json_that_two_readers_read_differently_is_refused(board, capsys, how):   # noqa: F811
    folder, path, entry = board
    text = TEXT_ATTACKS[how](json.dumps(entry))
    assert text != json.dumps(entry)
    path.write_text(text)
    is_refused(capsys, folder, path)


@pytest.mark.parametrize("name", DERIVED)
def test_derived_fields_are_refused_wherever_they_are_put(board, capsys, name):   # noqa: F811
    from pruning_bench.bench.checks import check_files
    folder, path, entry = board
    homes = [lambda e: e, lambda e: e["task"], lambda e: e["method"], lambda e: e["runs"][0], lambda e: e["dense"][0],
             lambda e: e["runs"][0]["size"], lambda e: e["runs"][0]["cost"], lambda e: e["runs"][0]["quality"]]
    for home in homes:
        hostile = copy.deepcopy(entry)
        home(hostile)[name] = 1
        path.write_text(json.dumps(hostile))
        assert any(f.fatal for f in check_files([path], folder))
    is_refused(capsys, folder, path)


def test_a_file_is_looked_at_before_it_is_read(board, capsys):   # noqa: F811
    folder, path, entry = board
    with open(path, "wb") as f: f.truncate(10**9)
    is_refused(capsys, folder, path)
    for target in (folder/"tasks"/"digits-mlp.json", Path("/etc/hostname"), Path("/dev/zero"), folder, folder/"none"):
        path.unlink(); path.symlink_to(target)
        is_refused(capsys, folder, path)
    path.unlink(); os.mkfifo(path)
    is_refused(capsys, folder, path)


def test_a_linked_folder_leads_nowhere(board, capsys, tmp_path_factory):   # noqa: F811
    folder, path, entry = board
    outside = tmp_path_factory.mktemp("outside")
    moved = outside/path.name
    path.rename(moved)
    path.parent.rmdir(); path.parent.symlink_to(outside)
    is_refused(capsys, folder, path.parent/path.name)
    assert command(capsys, "check", folder/"entries", "--folder", folder)[0] == 2   # a link among the entries
    is_refused(capsys, folder, moved)


def test_a_folder_of_entries_holds_nothing_else(board, capsys):   # noqa: F811
    folder, path, entry = board
    for name in ("run.sh", "x.py", "notes.md", "x.safetensors", ".hidden"):
        other = path.with_name(name)
        other.write_text("x")
        assert command(capsys, "check", folder/"entries", "--folder", folder)[0] == 2
        other.unlink()


def test_an_entry_is_no_receipt(board, capsys):   # noqa: F811
    "A receipt given as an entry, an entry in the place of a receipt, an edited receipt, a receipt within an entry."
    from pruning_bench.bench.verify import make_receipt
    folder, path, entry = board
    receipt = make_receipt(entry, entry)
    place = write_json(receipt, entry_path(folder/"receipts", entry))
    is_refused(capsys, folder, place)
    edited = {**receipt, "cells": [{**c, "found": None} for c in receipt["cells"]]}
    for content in (entry, edited, [], {**receipt, "cells": "x"}):
        write_json(content, place)
        assert command(capsys, "check", path, "--folder", folder)[0] == 2
    place.unlink()
    write_json({**entry, "receipts": [receipt]}, path)
    is_refused(capsys, folder, path)


@pytest.mark.parametrize("version", [{}, [], {"entry.v4": 1}, None, True, 4, "entry.v999", "x" * 1000], ids=range(8))
def test_a_version_of_a_schema_is_a_known_word(board, capsys, version):   # noqa: F811
    "Found by fuzzing: a version that is an object cannot be looked up."
    from pruning_bench.bench.verify import make_receipt, read_receipts
    folder, path, entry = board
    place = write_json({**make_receipt(entry, entry), "schema": version}, entry_path(folder/"receipts", entry))
    with pytest.raises(BadInput): read_receipts(folder/"receipts")
    place.unlink()
    path.write_text(json.dumps({**entry, "schema": version}))
    is_refused(capsys, folder, path)


# plans

def net(): torch.manual_seed(0); return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def plan(tmp_path):
    "A plan that removed channels: masks, kept indices, shapes."
    made = prune(net(), "l1-filter", .5, (torch.randn(2, 8),))
    assert made.slices
    return save_plan(made, tmp_path/"plan")


def facts(plan): return json.loads((plan/"plan.json").read_text())


PLAN_FACTS = {
    "no format": {"format": "plan.v0"}, "other space": {"space": 3}, "shape of text": {"shapes": {"0.weight": "16"}},
    "negative shape": {"shapes": {"0.weight": [-16]}}, "fraction": {"shapes": {"0.weight": [16.5]}},
    "true": {"shapes": {"0.weight": [True]}},
    "huge shape": {"shapes": {"0.weight": [2**62]}}, "many axes": {"shapes": {"0.weight": [1] * 100}},
    "another mask": {"shapes": {"0.weight": [16], CODE: [1]}}, "no masks": {"shapes": {}},
    "shorter": {"shapes": {"0.weight": [8]}},
    "longer": {"shapes": {"0.weight": [64]}}, "wrong digest": {"digest": "0" * 64}, "density": {"density": .123},
    "rank": {"rank": 1}, "badge": {"badge": "reproduced"}, "requested": {"requested": None},
    "provenance": {"provenance": [1]}, "budget": {"budget": {"of": "<script>"}}, "dense": {"dense": {"0.weight": 3}},
    "smaller dense": {"dense": {"0.weight": [2, 8]}}, "no dimension": {"dense": {"0.weight": []}}}


@pytest.mark.parametrize("how", PLAN_FACTS)
def test_facts_of_a_plan_that_do_not_fit_are_refused(plan, how):
    changed = {**facts(plan), **PLAN_FACTS[how]}
    (plan/"plan.json").write_text(json.dumps(changed))
    with pytest.raises(BadInput) as refused: load_plan(plan)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_every_field_of_a_plan_is_needed_or_of_its_type(plan):
    honest_facts = facts(plan)
    for name in (*FIELDS, *MORE_FIELDS):
        for value in (None, "x", 7, [], True):
            (plan/"plan.json").write_text(json.dumps({**honest_facts, name: value}))
            if name == "density" and value is None or name == "requested" and value == 7: continue
            with pytest.raises(BadInput): load_plan(plan)
    (plan/"plan.json").write_text(json.dumps(honest_facts))
    assert load_plan(plan).slices


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 1_000_000, '{"a": 1, "a": 2}', '{"requested": NaN}', "\ud800",
                                  '{"requested": 1e999}', '{"a":' * 60 + "1" + "}" * 60], ids=range(9))
def test_json_of_a_plan_is_read_strictly(plan, text):
    (plan/"plan.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadInput): load_plan(plan)


class Payload:
    def __reduce__(self): return os.system, ("touch hacked",)


def with_bits(plan, **change):
    bits = {**load_file(plan/"plan.safetensors"), **change}
    save_file({n: v for n, v in bits.items() if v is not None}, plan/"plan.safetensors")


BITS = {"cut short": {"mask:0.weight": np.zeros(1, np.uint8)}, "too long": {"mask:0.weight": np.zeros(3, np.uint8)},
        "floats": {"mask:0.weight": np.zeros(2, np.float32)}, "two axes": {"mask:0.weight": np.zeros((1, 2), np.uint8)},
        "another mask": {"mask:1": np.zeros(2, np.uint8)}, "no mask": {"mask:0.weight": None},
        "a name that is code": {f"mask:{CODE}": np.zeros(2, np.uint8)}, "weights": {"0.weight": np.zeros(2)},
        "twice": {"slice:0.weight:0": np.array([0, 0, 1])}, "outside": {"slice:0.weight:0": np.array([0, 16])},
        "negative": {"slice:0.weight:0": np.array([-1, 0])}, "none kept": {"slice:0.weight:0": np.zeros(0, np.int64)},
        "fractions": {"slice:0.weight:0": np.array([.5])}, "no axis": {"slice:0.weight:7": np.array([0])},
        "axis of code": {f"slice:0.weight:{CODE}": np.array([0])}, "no name": {"slice:": np.array([0])}}


@pytest.mark.parametrize("how", BITS)
def test_bits_of_a_plan_that_do_not_fit_are_refused(plan, how):
    with_bits(plan, **BITS[how])
    with pytest.raises(BadInput) as refused: load_plan(plan)
    assert "\n" not in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps(Payload()), b"PK\x03\x04" + bytes(50), bytes(50),
                                     b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"{}" + bytes(9)], ids=range(7))
def test_other_files_renamed_to_safetensors_are_refused(plan, content):
    (plan/"plan.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="safetensors|tensor"): load_plan(plan)


def test_files_of_a_plan_are_regular_and_small(plan, tmp_path):
    kept = {n: (plan/n).read_bytes() for n in ("plan.json", "plan.safetensors")}
    for name in kept:
        file = plan/name
        with open(file, "wb") as f: f.truncate(10**9)
        with pytest.raises(BadInput): load_plan(plan)
        elsewhere = tmp_path/"elsewhere"
        elsewhere.write_bytes(kept[name])
        file.unlink(); file.symlink_to(elsewhere)
        with pytest.raises(BadInput, match="link"): load_plan(plan)
        file.unlink(); os.mkfifo(file)
        with pytest.raises(BadInput): load_plan(plan)
        file.unlink(); file.write_bytes(kept[name])
    assert load_plan(plan).slices


class Reshaped(nn.Module):
    "A module whose code holds a size that a plan may change."
    def __init__(self): super().__init__(); self.l = nn.Linear(4, 4)
    def forward(self, x): return self.l(x).reshape(-1, 2, 2)


@pytest.mark.parametrize("place", [f"forward/x/0/{CODE} or 4", f"forward/x[{CODE}]/0/4", f"{CODE}/x/0/4",
    f"forward/0/0/{CODE}", f"forward/x/{CODE}/4", "forward/x/0/4#a", "__class__", f"forward/{CODE}", "forward/x/-1/4"])
def test_names_of_sizes_that_are_code_are_never_executed(place, tmp_path):
    hostile = Plan("channels", {"l": torch.ones(4).bool()}, slices={f"#{place}": {0: [0, 1]}})
    write_plan(hostile, tmp_path)
    loaded, model = load_plan(tmp_path), Reshaped()
    with pytest.raises(BadInput): loaded.apply(model); model(torch.randn(2, 4))


@pytest.mark.parametrize("space", ["weights", "blocks", "sublayers", "experts", "examples", "no space", "__class__"])
@pytest.mark.parametrize("name", ["__class__", "0.__class__", CODE, "0.weight#a", "3", "", "0..weight", "0"])
def test_names_of_groups_that_the_model_lacks_are_refused(space, name):
    for shape in (16,), (3, 3):
        with pytest.raises(BadInput): Plan(space, {name: torch.ones(shape).bool()}).apply(net())


@pytest.mark.parametrize("slices", [{"0.weight": {5: [0]}}, {"0.weight": {0: [99]}}, {"0.weight": {0: [-99]}},
    {"0.weight": {0: []}}, {"1": {0: [1]}}, {"0": {0: [1]}}, {"__class__": {0: [0]}}, {CODE: {0: [0]}}])
def test_kept_indices_that_the_model_lacks_are_refused(slices):
    with pytest.raises(BadInput): Plan("channels", {"0": torch.ones(16).bool()}, slices=slices).apply(net())


def test_a_plan_of_examples_is_a_mask_over_the_training_set():
    "An index list cannot hold duplicates or indices of other data: it is a mask as long as the training data."
    plan = Plan("examples", {"examples": torch.tensor([[True, False, True]])})
    train, test = torch.utils.data.TensorDataset(torch.arange(3)), torch.utils.data.TensorDataset(torch.arange(4))
    assert [int(x) for x, in plan.subset(train)] == [0, 2]
    with pytest.raises(BadInput, match="3 examples"): plan.subset(test)


def test_names_of_a_plan_are_text_where_it_is_shown(plan):
    hostile = Plan("weights", {"<img src=x>": torch.ones(4).bool()}, {"method": "<script>alert(1)</script>"})
    page = hostile._repr_html_()
    assert "<script>" not in page and "<img" not in page and "&lt;img" in page


# parameters of notebooks

TEMPLATE = ROOT/"nbs"/"benchmarks"/"cnn.ipynb"


@pytest.mark.parametrize("name", [CODE, "a; import os", "a\nimport os", "__builtins__", "print", "os", "", "a=1",
                                  "method "])
def test_parameter_names_that_are_code_are_refused_before_a_kernel_starts(name, tmp_path):
    with pytest.raises(ValueError, match="no parameter"): execute_notebook(TEMPLATE, tmp_path/"out", {name: 1})
    assert not list(tmp_path.iterdir())


def injected(value):
    "What a notebook gets for a parameter: papermill's cell of parameters, executed."
    from papermill.translators import PythonTranslator
    names = {}
    exec(PythonTranslator.codify({"settings": value}, "parameters"), names)
    return names["settings"]


@pytest.mark.parametrize("value", [CODE, f"'{CODE}'", f'"+{CODE}+"', f"\\\"+{CODE}#", f"a\n{CODE}", "'''", '"""', "\\",
                                   {CODE: 1}, {f'": {CODE}, "': [CODE]}, [f'"]; {CODE}; ["'], "{x}", "\u2028" + CODE])
def test_parameter_values_arrive_as_they_were_and_are_not_executed(value): assert injected(value) == value


@pytest.mark.parametrize("pair", [f"{CODE}=1", "__class__=1", "=1", "no-such-setting=1", "a;b=1", "score"])
def test_settings_that_are_no_settings_are_refused(capsys, pair):
    code, said = command(capsys, "run", "digits-mlp", "magnitude", "--set", pair)
    assert code == 2 and len(said) == 1


def test_values_of_settings_are_literals(capsys):
    assert cli.read_settings("magnitude", [f"skip={CODE}"]) == {"skip": CODE}   # a text, not a call


# fuzzing: some hundred cases each, ten thousand in `make slow`

how_many = pytest.mark.parametrize("n", [200, pytest.param(10_000, marks=pytest.mark.slow)])

ODD = [CODE, "__class__", "../x", "mask:", "slice:0.weight:0", "0"]
def texts(st): return st.text(max_size=12) | st.sampled_from(ODD)


def values(st):
    leaf = st.none() | st.booleans() | st.floats() | st.integers(-2**70, 2**70) | texts(st)
    return st.recursive(leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(st), inner, max_size=4),
                        max_leaves=12)


def cases(hypothesis, n):
    return hypothesis.settings(max_examples=n, deadline=None, database=None, derandomize=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


@how_many
@pytest.mark.timeout(3600)
def test_random_entries_are_valid_or_refused(protocol, n):   # noqa: F811
    "Any value in any place: the schema and the checks say a sentence, or nothing was wrong."
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    from pruning_bench.bench.checks import findings
    from pruning_bench.bench.entry import validate
    entry = json.loads(json.dumps(honest(protocol)))

    def anywhere(value, at=()):
        yield at
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for k, v in inner: yield from anywhere(v, (*at, k))
    found = [p for p in anywhere(entry) if p]

    @cases(hypothesis, n)
    @hypothesis.given(st.sampled_from(found), values(st), texts(st))
    def attack(place, value, name):
        for change in (value, {name: value}):
            try: other = validate(with_text(entry, place, change))
            except BadInput as e: assert str(e).count("\n") == 0 or "\n" in name + str(value); continue
            for f in findings(other, protocol): assert f.remedy
    attack()


@how_many
@pytest.mark.timeout(3600)
def test_random_plans_are_read_or_refused(plan, n):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    honest_facts, honest_bits = facts(plan), (plan/"plan.safetensors").read_bytes()
    names = st.sampled_from([*FIELDS, *MORE_FIELDS]) | texts(st)

    @cases(hypothesis, n)
    @hypothesis.given(names, values(st), st.integers(0, len(honest_bits) - 1), st.binary(max_size=6), st.integers(0, 2))
    def attack(name, value, start, put, which):
        changed = {**honest_facts, name: value} if which != 1 else honest_facts
        bits = honest_bits[:start] + put + honest_bits[start + len(put):] if which else honest_bits
        (plan/"plan.json").write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
        (plan/"plan.safetensors").write_bytes(bits)
        try: load_plan(plan).apply(net())
        except BadInput: pass
    attack()


@how_many
@pytest.mark.timeout(3600)
def test_random_parameters_are_refused_or_arrive_as_they_were(tmp_path, n):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    known = parameter_names(TEMPLATE)
    # the values that the command line can make: JSON without the numbers that JSON lacks
    finite = values(st).filter(lambda v: "NaN" not in json.dumps(v) and "Infinity" not in json.dumps(v))

    @cases(hypothesis, n)
    @hypothesis.given(texts(st) | st.sampled_from(sorted(known)), finite)
    def attack(name, value):
        if name not in known:
            with pytest.raises(ValueError, match="no parameter"):
                execute_notebook(TEMPLATE, tmp_path/"out", {name: value})
        assert injected(value) == value
    attack()
