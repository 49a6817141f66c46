"Every model of the table is cut to half of its multiplications, runs, trains, and keeps the golden rule."
import json
import os
import time

import pytest
import torch
import torchvision
from torch import nn

from pruning_bench import BadInput
from pruning_bench.bench.coverage import (affects_output, cached_row, coverage, coverage_row, in_own_process,
                                          masking_error, permutation_error, prune_half)
from pruning_bench.bench.model_builders import (SMALL_MODEL_CONFIGS, diffusers_transformer, model_builders,
                                                torchvision_classifier)
from pruning_bench.graph.groups import Channels

SMALL = ("alexnet", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "LlamaForCausalLM", *SMALL_MODEL_CONFIGS)
# the work of these depends on what they read, or is no product of widths
BY_PARAMETERS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "DeepseekV3", "SiglipModel")
models = [pytest.param(n, marks=() if n in SMALL else pytest.mark.slow) for n in model_builders()]

@pytest.mark.parametrize("name", models)
def test_half_of_the_multiplications(name):
    row = coverage_row(name, model_builders()[name])
    assert row["runs"] and row["groups"] > 0 and row["error"] <= 1e-5 and row["permuted"] <= 1e-4
    # coarse units, and some layers that cannot be cut
    small = name in SMALL_MODEL_CONFIGS or model_builders()[name] is diffusers_transformer
    least = .8 if name == "LongformerForMaskedLM" else .98   # its windows are read and written in parts
    if name.split("For")[0] in BY_PARAMETERS: assert row["of"] == "params"
    else: assert row["of"] == "macs" and .5 <= row["removed"] <= (.54 if small else .51) and row["prunable"] > least
    if model_builders()[name] is torchvision_classifier and name not in ("googlenet", "inception_v3"):
        assert row["heard"] == row["exact"]   # these two have heads for training only

def test_no_classifier_is_left_out():
    assert {n for n, f in model_builders().items()
            if f is torchvision_classifier} == set(torchvision.models.list_models(module=torchvision.models))

@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_the_detector_inside_is_pruned_detects_and_learns(name):
    bare, batch = model_builders()[name](name)
    full = sum(p.numel() for p in bare.detector.parameters())
    prune_half(bare, batch)
    detector = bare.detector
    assert sum(p.numel() for p in detector.parameters()) < .6 * full
    with torch.no_grad(): found = detector(list(batch))
    assert len(found) == 2
    assert all(f["boxes"].shape == (len(f["scores"]), 4) and f["boxes"].isfinite().all() for f in found)
    detector.train()
    losses = detector(list(batch), [{"boxes": torch.tensor([[8., 8, 40, 40]]), "labels": torch.tensor([1])}] * 2)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in detector.backbone.parameters())

def three():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
                         nn.Conv2d(6, 4, 3)), torch.randn(2, 3, 9, 9)

def test_the_golden_rule_notices_wrong_readers_and_leaves_the_model_alone():
    model, x = three()
    groups, before = Channels(model, [x]).groups, {k: v.clone() for k, v in model.state_dict().items()}
    assert masking_error(model, x, groups) < 1e-5
    # readers of the neighbours
    groups["0.weight"].members["2.weight", 1] = (groups["0.weight"].members["2.weight", 1] + 1) % 8
    assert masking_error(model, x, groups) > .01
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_permuting_notices_what_has_an_order():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(5, 4)
    nn.init.normal_(model[1].weight)
    groups = Channels(model, [x]).groups
    [group] = groups.values()
    assert not group.exact and permutation_error(model, x, groups) < 1e-5
    del group.members["1.weight", 0]
    assert permutation_error(model, x, groups) > .01

def test_who_is_heard():
    model, x = three()
    groups = Channels(model, [x]).groups
    assert affects_output(model, x, groups) == ["0.weight", "2.weight"]
    model[2].weight.data.zero_(); model[2].bias.data.fill_(1.)
    assert affects_output(model, x, groups) == ["2.weight"]

@pytest.mark.parametrize("width", [10, 100])
def test_half_is_half(width):
    model, x = nn.Sequential(nn.Conv2d(4, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1)), torch.randn(2, 4, 5, 5)
    assert prune_half(model, x) == {"macs": .5} and model[0].out_channels == width // 2

def test_work_that_depends_on_the_data_is_said():
    class Fickle(nn.Module):
        "Runs its second layer as often as numbers are positive."
        def __init__(self):
            super().__init__(); self.one, self.two, self.three = nn.Linear(4, 40), nn.Linear(40, 40), nn.Linear(40, 2)
        def forward(self, x):
            y = self.one(x)
            return self.three(self.two(y.expand(1 + int((y > 0).sum()), *y.shape)).relu())
    torch.manual_seed(0)
    model = Fickle()
    full = sum(p.numel() for p in model.parameters())
    [(of, removed)] = prune_half(model, torch.randn(5, 4)).items()
    assert of == "params"
    assert .5 <= removed <= .53
    assert sum(p.numel() for p in model.parameters()) == round(full * (1 - removed))

def broken(name): raise RuntimeError("no such weather")

@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr("pruning_bench.bench.coverage.in_own_process", lambda make_row, *args, limit: make_row(*args))

def test_a_failure_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr("pruning_bench.bench.coverage.model_builders", lambda: {"storm": broken})
    [row] = coverage("s*", tmp_path).to_dict("records")
    assert row["runs"] is False and "no such weather" in row["note"] and not [*tmp_path.iterdir()]
    with pytest.raises(BadInput, match="no model is called"): coverage("calm")

def test_rows_are_kept(monkeypatch, tmp_path, in_this_process):
    asked = []
    monkeypatch.setattr("pruning_bench.bench.coverage.coverage_row", lambda name,
                        make: asked.append(name) or dict(model=name, runs=True, error=1e-7))
    first, again = (cached_row("calm", None, tmp_path / "rows") for _ in range(2))
    [file] = (tmp_path / "rows").rglob("calm.json")
    assert asked == ["calm"] and first == again == json.loads(file.read_text())
    cached_row("calm", None)
    assert asked == ["calm", "calm"]

def test_a_row_that_was_interrupted_is_made_again(monkeypatch, tmp_path, in_this_process):
    monkeypatch.setattr("pruning_bench.bench.coverage.coverage_row", lambda name, make: dict(model=name, runs=True))
    def power_cut(path, text): path.write_bytes(text[:5].encode()); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.write_text", power_cut)
        with pytest.raises(KeyboardInterrupt): cached_row("calm", None, tmp_path)
    assert not [*tmp_path.rglob("*.json")]
    assert cached_row("calm", None, tmp_path) == dict(model="calm", runs=True) and len([*tmp_path.rglob("calm*")]) == 1

def test_the_command_prints_the_table(monkeypatch, tmp_path):
    from typer.testing import CliRunner
    from pruning_bench.bench.cli import app
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("pruning_bench.bench.coverage.model_builders", lambda: {"storm": broken, "calm": broken})
    said = CliRunner().invoke(app, ["coverage", "s*", "--json"])
    assert said.exit_code == 0
    assert '"storm"' in said.output
    assert "no such weather" in said.output
    assert "calm" not in said.output

def test_patterns_name_a_library(monkeypatch):
    monkeypatch.setattr("pruning_bench.bench.coverage.cached_row", lambda name, make, folder, limit: dict(model=name))
    assert set(coverage("timm:vit*").model) == {"timm:vit_srelpos_small_patch16_224", "timm:vit_tiny_patch16_224",
                                                "timm:vit_tiny_r_s16_p8_224", "timm:vitamin_small_224"}
    assert len(coverage("timm:*")) >= 94
    found = set(coverage("transformers:*").model)
    assert {"LlamaForCausalLM", "BertForSequenceClassification"} < found and "resnet18" not in found
    with pytest.raises(BadInput, match="timm:"): coverage("timm:no_such_model")

@pytest.mark.parametrize("name, note", [("T5ForConditionalGeneration", "only the logits are read"),
                                        ("LongformerForMaskedLM", "windows by `as_strided`"), ("MptForCausalLM", ""),
                                        ("RwkvForCausalLM", "")])
def test_what_stays_is_named_with_its_reason(name, note):
    row = coverage_row(name, model_builders()[name])
    assert note in row["note"] if note else row["note"] == ""
    assert row["prunable"] > (.8 if name == "LongformerForMaskedLM" else .99)

def refuses(): raise BadInput("no such model: choose another")

def test_a_process_is_ended_at_its_limit_and_says_what_happened():
    assert in_own_process(divmod, 7, 2, limit=60) == (3, 1)
    with pytest.raises(TimeoutError, match="after 1 processor seconds"): in_own_process(sum, iter(int, 1), limit=1)
    with pytest.raises(TimeoutError, match="waiting for 4 seconds"): in_own_process(time.sleep, 600, limit=.5)
    with pytest.raises(ChildProcessError, match="exit code 9"): in_own_process(os._exit, 9, limit=60)
    with pytest.raises(ChildProcessError, match="ZeroDivisionError"): in_own_process(divmod, 7, 0, limit=60)
    with pytest.raises(BadInput, match="^no such model: choose another$"): in_own_process(refuses, limit=60)
