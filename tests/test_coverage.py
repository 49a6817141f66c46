"Every model of the table is cut to half of its multiplications, runs, trains, and keeps the golden rule."
import pytest
import torch
from torch import nn

from pruning_bench import BadInput
from pruning_bench.structured.coverage import cover, coverage, half, lottery, multiplications, zoo
from pruning_bench.structured.groups import Channels

SMALL = ("alexnet", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")
models = [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in zoo()]

@pytest.mark.parametrize("name", models)
def test_half_of_the_multiplications(name):
    row = cover(name, zoo()[name])
    assert row["runs"] and row["groups"] > 0 and row["error"] <= 1e-5 and row["permuted"] <= 1e-4
    if name not in ("UNet2DModel",): assert .5 <= row["macs_removed"] <= .6

def test_multiplications_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert multiplications(model, torch.randn(2, 3, 6, 6)) == 2 * (8 * 3 * 9 * 16 + 8 * 16 * 5)

@pytest.mark.parametrize("goal", [.25, .5, .75])
def test_the_goal_is_met_within_a_channel(goal):
    model, x = nn.Sequential(nn.Conv2d(4, 100, 1), nn.ReLU(), nn.Conv2d(100, 4, 1)), torch.randn(2, 4, 5, 5)
    kept, removed = half(model, x, Channels(model, [x]).groups, goal)
    assert goal <= removed <= goal + .021 and removed == pytest.approx((~kept["0.weight"]).float().mean().item())

def test_a_lottery_leaves_one_unit():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3)
    groups = Channels(model, [x]).groups
    assert [int(lottery(groups, f)["0.weight"].sum()) for f in (0, .25, .5, 1)] == [8, 6, 4, 1]
    assert torch.equal(lottery(groups, .5)["0.weight"], lottery(groups, .5)["0.weight"])

def test_a_failure_is_a_row(monkeypatch):
    def broken(name): raise RuntimeError("no such weather")
    monkeypatch.setattr("pruning_bench.structured.coverage.zoo", lambda: {"storm": broken})
    [row] = coverage("s*").to_dict("records")
    assert row["runs"] is False and "no such weather" in row["note"]
    with pytest.raises(BadInput, match="no model is called"): coverage("calm")

def test_the_command_prints_the_table(monkeypatch):
    from typer.testing import CliRunner
    from pruning_bench.bench.cli import app
    def broken(name): raise RuntimeError("no such weather")
    monkeypatch.setattr("pruning_bench.structured.coverage.zoo", lambda: {"storm": broken, "calm": broken})
    said = CliRunner().invoke(app, ["coverage", "s*", "--json"])
    assert said.exit_code == 0 and '"storm"' in said.output and "no such weather" in said.output and "calm" not in said.output
