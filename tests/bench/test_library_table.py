"A table of models that are halved by one call: what happened to each, and what it goes on with."
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pruning_bench import BadInput
from pruning_bench.bench.library_table import (LIBRARIES, NOT_RUN, failed_row, fill_table, halved_row, is_halved,
                                               same_outputs, table_line, table_to_line, torch_pruning_row,
                                               update_readme, with_outcome)
from pruning_bench.bench.model_builders import TIMM_MODELS, timm_model
from pruning_bench.bench import library_table

OUTCOMES = {"halved", "not halved", "refused", "timed out", "error", NOT_RUN}

# a residual network; gates over tokens; heads beside cached biases; windows of attention; depthwise convolutions
KINDS = ("resnet10t", "gmlp_ti16_224", "levit_conv_128s", "mobilevit_xxs", "lcnet_035")

@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in TIMM_MODELS])
def test_models_of_timm_are_halved_by_default(name):
    pytest.importorskip("timm")
    row = halved_row(f"timm:{name}", timm_model)
    assert is_halved(row) and row["removed"] < .55, row
    assert row["heads"] or name not in ("levit_conv_128s", "mobilevit_xxs")

def test_the_line_of_the_readme_follows_from_the_table():
    root = Path(__file__).parents[2]
    table = json.loads((root / "leaderboard" / "timm.json").read_text())
    assert list(table) == list(LIBRARIES) and table_line(table) in (root / "README.md").read_text().splitlines()
    assert all(set(rows) == {f"timm:{n}" for n in TIMM_MODELS} for rows in table.values())
    rows = [row for rows in table.values() for row in rows.values()]
    assert {row["outcome"] for row in rows} <= OUTCOMES
    assert all(is_halved(row) == (row["outcome"] == "halved") for row in rows)
    assert all(row["note"] for row in rows if row["outcome"] in ("refused", "timed out", "error"))

def made(name, make): return with_outcome(dict(model=name, removed=.5, reloads=True, trains=True))

def fails(name, make):
    if name == "storm":
        while True: pass
    if name == "fog": raise BadInput("nothing is seen: wait")
    if name == "flood": raise RuntimeError("too much water")
    if name == "drought": return with_outcome(dict(model=name, removed=.4, reloads=True, trains=True))
    return made(name, make)

WEATHER = {"storm": ("timed out", "timed out after 1 processor seconds"), "fog": ("refused", "nothing is seen: wait"),
           "flood": ("error", "RuntimeError: too much water"), "drought": ("not halved", None),
           "calm": ("halved", None)}

def test_a_row_says_what_happened_and_the_next_one_follows(monkeypatch, tmp_path):
    monkeypatch.setattr(library_table, "LIBRARIES", {"pruning_bench": fails, "Torch-Pruning": made})
    path, models = tmp_path / "table.json", dict.fromkeys(WEATHER)
    table = fill_table(path, models, limit=1)
    assert json.loads(path.read_text()) == table
    assert {n: (row["outcome"], row.get("note")) for n, row in table["pruning_bench"].items()} == WEATHER
    line = table_line(table)
    assert "1 of 5 lose half" in line and all(f"1 {what}" in line for what, _ in WEATHER.values() if what != "halved")
    assert "Of the 5 on which both libraries were run, 1 are halved here and 5 by Torch-Pruning" in line
    asked = []
    def noted(row, name, make, limit): asked.append(name); return made(name, make)
    monkeypatch.setattr(library_table, "in_own_process", noted)
    assert fill_table(path, models) == table and not asked
    fill_table(path, models, again=["error", "timed out"])
    assert asked == ["storm", "flood"] and "3 of 5 lose half" in table_line(json.loads(path.read_text()))

@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(library_table, "in_own_process", lambda make_row, *args, limit: make_row(*args))

def test_a_table_goes_on_where_it_was_interrupted(monkeypatch, tmp_path, in_this_process):
    tries, path, models = [], tmp_path / "table.json", {"calm": None, "storm": None}
    def row(library, name, make):
        tries.append((library, name))
        if len(tries) == 2: raise KeyboardInterrupt
        return with_outcome(dict(model=name, removed=.5, reloads=True, trains=name != "storm"))
    monkeypatch.setattr(library_table, "LIBRARIES", {library: partial(row, library) for library in LIBRARIES})
    with pytest.raises(KeyboardInterrupt): fill_table(path, models)
    stopped = json.loads(path.read_text())
    assert [r["outcome"] for r in stopped["pruning_bench"].values()] == ["halved", NOT_RUN]
    assert "(the others: 1 not run)" in table_line(stopped)
    table = fill_table(path, models)
    assert tries.count(("pruning_bench", "calm")) == 1 and json.loads(path.read_text()) == table
    assert "1 of 2 lose half" in table_line(table) and "1 are halved here and 1 by Torch-Pruning" in table_line(table)

def test_a_missing_library_is_refused_before_any_row(monkeypatch, tmp_path):
    def missing(name, *_): raise BadInput(f"needs {name}")
    monkeypatch.setattr(library_table, "optional", missing)
    with pytest.raises(BadInput, match="needs timm"): table_to_line(tmp_path / "table.json", "timm:vgg11")
    assert not [*tmp_path.iterdir()]

def test_outputs_are_the_same_bit_for_bit():
    a, x = nn.Linear(3, 2), torch.randn(4, 3)
    b = nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert same_outputs(a, b, x)
    b.bias.data[0] = torch.nextafter(b.bias.data[0], torch.tensor(9.))
    x.zero_()
    assert not same_outputs(a, b, x)

def net(name):
    body = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(16, 1000)), torch.randn(2, 3, 16, 16)

def test_a_row_of_torch_pruning_is_measured():
    pytest.importorskip("torch_pruning")
    row = torch_pruning_row("net", net)
    assert row["outcome"] == "halved" and row["reloads"] and row["trains"] and .5 <= row["removed"] < .8, row

def test_a_failure_is_no_number():
    row = failed_row("storm", ChildProcessError("RuntimeError: hail"))
    assert row == dict(model="storm", outcome="error", note="RuntimeError: hail") and not is_halved(row)

def test_the_line_replaces_the_one_before(tmp_path):
    rows = {"a": made("a", None)}
    one, two = (table_line({library: dict(list(rows.items())[:n]) for library in LIBRARIES}) for n in (0, 1))
    (page := tmp_path / "README.md").write_text(f"# Title\n\n{one}\n\nMore.\n")
    update_readme(page, two)
    assert page.read_text() == f"# Title\n\n{two}\n\nMore.\n"
    page.write_text("# Title\n")
    with pytest.raises(BadInput, match="0 lines"): update_readme(page, two)
