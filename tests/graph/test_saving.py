"""A pruned model is saved to a folder and loaded in another process: shapes, attributes, ties, buffers and the output
on an example."""
import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.checkpoint import (batch_from_spec, batch_spec, compose_changes, diff_snapshots, fingerprint,
                                           matches, snapshot)
from pruning_bench.core.inputs import forward
from pruning_bench.graph.trace import tensors_in
from pruning_bench.graph.saving import sync_optimizer, load_pruned

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = {"input_ids": torch.arange(24).view(2, 12)}


def cnn():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
                         nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(4, 8), nn.ConvTranspose2d(8, 6, 2, 2),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()


def vit():
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128).eval()
    # torchvision starts with a head of zeros
    nn.init.normal_(model.heads.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)).eval()


def unet():
    from diffusers import UNet2DModel
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
                       norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()


NOISE = {"sample": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
         "timestep": torch.tensor([3, 500])}
MODELS = {"cnn": (cnn, IMAGE), "resnet18": (lambda: torchvision.models.resnet18(weights=None).eval(), IMAGE),
          "vit": (vit, IMAGE), "llama": (llama, IDS), "unet": (unet, NOISE)}


def made(name):
    make, batch = MODELS[name]
    torch.manual_seed(0)
    return make(), batch


@torch.no_grad()
def out(model, batch):
    return tensors_in(forward(model, batch))[0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "resnet18" else n for n in MODELS])
def test_what_is_saved_comes_back(name, tmp_path):
    model, batch = made(name)
    dense = sum(p.numel() for p in model.parameters())
    plan = prune(model, "l1-filter", .5, [batch], residual=name != "unet")
    with torch.no_grad():
        for b in model.buffers():
            # what training leaves in batch norms
            if b.is_floating_point() and b.dim() == 1 and name in ("cnn", "resnet18"): b.add_(.1)
    plan.save(tmp_path / "half")
    torch.manual_seed(1)   # another network of the class
    base = MODELS[name][0]()
    back = load_pruned(tmp_path / "half", base)
    assert back is base and sum(p.numel() for p in back.parameters()) < dense
    assert torch.equal(out(back, batch), out(model, batch))
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))
    assert snapshot(back)["modules"] == snapshot(model)["modules"]
    assert snapshot(back)["config"] == snapshot(model)["config"]
    about = json.loads((tmp_path / "half" / "model.json").read_text())
    assert about["answer"]
    assert about["about"]["method"] == "l1-filter"
    assert about["about"]["seed"] == 0 and about["versions"]["torch"] == torch.__version__
    assert all(old != new for old, new in about["shapes"].values())
    assert load_plan(tmp_path / "half").slices == plan.slices
    assert not [f for f in tmp_path.iterdir() if f.name != "half"]


def test_a_folder_and_save_pretrained_compose(tmp_path):
    from transformers import LlamaForCausalLM
    model, batch = made("llama")
    prune(model, "l1-filter", .5, [batch], skip="*self_attn*").save(tmp_path / "half")
    back = load_pruned(tmp_path / "half", llama())
    assert back.config.intermediate_size == 24   # one number can say it, so the configuration does
    back.save_pretrained(tmp_path / "theirs")
    assert torch.equal(out(LlamaForCausalLM.from_pretrained(tmp_path / "theirs").eval(), batch), out(model, batch))


def test_ties_are_tied_again_and_gradients_flow(tmp_path):
    model, batch = made("llama")
    plan = prune(model, "l1-filter", .5, [batch])
    plan.save(tmp_path / "half")
    about = json.loads((tmp_path / "half" / "model.json").read_text())
    assert about["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    base = llama()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())   # even a base that has lost the tie
    back = load_pruned(tmp_path / "half", base)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    back(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in back.parameters())


def test_the_path_of_a_configuration_is_a_base(tmp_path):
    model, batch = made("llama")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "vanilla")
    prune(model, "l1-filter", .5, [batch]).save(tmp_path / "half")
    assert torch.equal(out(load_pruned(tmp_path / "half", tmp_path / "vanilla").eval(), batch), out(model, batch))
    model, batch = made("unet")
    model.save_config(tmp_path / "noise")
    prune(model, "l1-filter", .5, [batch]).save(tmp_path / "less")
    assert torch.equal(out(load_pruned(tmp_path / "less", str(tmp_path / "noise")).eval(), batch), out(model, batch))
    with pytest.raises(BadInput, match="no configuration"):
        load_pruned(tmp_path / "half", tmp_path / "nowhere")


def test_blocks_come_back(tmp_path):
    model, batch = made("llama")
    prune(model, "block-influence", .5, [batch]).save(tmp_path / "half")
    back = load_pruned(tmp_path / "half", llama())
    assert len(back.model.layers) == 1 == back.config.num_hidden_layers
    assert torch.equal(out(back, batch), out(model, batch))


def test_twice_pruned_is_one_folder(tmp_path):
    model, batch = made("cnn")
    prune(model, "l1-filter", .25, [batch])
    plan = prune(model, "rand-struct", .5, [batch])
    plan.save(tmp_path / "quarter")
    about = json.loads((tmp_path / "quarter" / "model.json").read_text())
    assert about["shapes"]["0.weight"][0] == [8, 3, 3, 3]   # from the vanilla shape, not from the one in between
    assert torch.equal(out(load_pruned(tmp_path / "quarter", cnn), batch), out(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_files_decide_the_dtype(dtype, tmp_path):
    model, batch = made("cnn")
    model, batch = model.to(dtype), batch.to(dtype)
    prune(model, "l1-filter", .5, [batch]).save(tmp_path / "half")
    back = load_pruned(tmp_path / "half", cnn)
    assert all(p.dtype == dtype for p in back.parameters()) and torch.equal(out(back, batch), out(model, batch))


def test_masks_on_what_is_left_come_back(tmp_path):
    from pruning_bench.core.mask import masks_of
    model, batch = made("cnn")
    plan = prune(model, "l1-filter", .5, [batch])
    prune(model, "magnitude", .5)
    plan.save(tmp_path / "both")
    back = load_pruned(tmp_path / "both", cnn)
    assert masks_of(back).keys() == masks_of(model).keys() != set() and torch.equal(out(back, batch), out(model, batch))


@pytest.mark.slow   # the chapter does the same with a residual network
def test_a_fresh_process_needs_only_the_folder_and_the_class(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    prune(model, "l1-filter", {"macs": .5}, [IMAGE]).save(tmp_path / "half")
    code = f"""
import torch, torchvision
from pruning_bench.structured.reshape import load_pruned
model = load_pruned({str(tmp_path / "half")!r}, torchvision.models.squeezenet1_1).eval()
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad(): print(*model(x)[:, :3].flatten().tolist())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert torch.allclose(torch.tensor([float(s) for s in said]), out(model, IMAGE)[:, :3].flatten(), rtol=1e-4,
                          atol=1e-6)


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    model, batch = made("cnn")
    plan = prune(model, "l1-filter", .5, [batch])
    plan.save(tmp_path / "half")
    def full(*args, **how): raise OSError("no space left on device")
    for name in ("pruning_bench.core.checkpoint.save_file", "pruning_bench.core.plan.save_file"):
        with monkeypatch.context() as m:
            m.setattr(name, full)
            with pytest.raises(OSError): plan.save(tmp_path / "half")
        assert os.listdir(tmp_path) == ["half"]
        assert torch.equal(out(load_pruned(tmp_path / "half", cnn), batch), out(model, batch))


def test_files_that_cannot_be_meant_are_refused_and_the_base_is_untouched(tmp_path):
    model, batch = made("cnn")
    plan = prune(model, "l1-filter", .5, [batch])
    plan.save(tmp_path / "half")
    def damaged(name, **bytes_of):
        plan.save(tmp_path / name, model)
        for file, change in bytes_of.items():
            path = tmp_path / name / file.replace("_", ".")
            path.write_bytes(change(path.read_bytes()))
        return tmp_path / name
    class Scaled(nn.Sequential):
        def forward(self, x): return 2 * super().forward(x)
    smaller = cnn()
    smaller[0] = nn.Conv2d(3, 2, 3)
    tries = [(damaged("cut", model_safetensors=lambda b: b[:-8]), cnn(), "cut short"),
             (damaged("bit", model_safetensors=lambda b: b[:-1] + bytes([b[-1] ^ 1])), cnn(), "altered"),
             (damaged("header", model_json=lambda b: b[:40]), cnn(), "altered"),
             (damaged("list", model_json=lambda b: b"[]"), cnn(), "altered"),
             (tmp_path / "nowhere", cnn(), "no pruned model at"),
             (tmp_path / "half", torchvision.models.resnet18(weights=None), "another architecture"),
             (tmp_path / "half", smaller, "the vanilla class has"),
             (tmp_path / "half", Scaled(*cnn()), "computes something else")]
    for folder, base, said in tries:
        before, attributes = {n: t.clone() for n, t in base.state_dict().items()}, snapshot(base)
        with pytest.raises(BadInput, match=said) as refused: load_pruned(folder, base)
        assert "\n" not in str(refused.value)
        assert snapshot(base) == attributes and all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    for base in (dict, nn.Linear, 3):
        with pytest.raises(BadInput): load_pruned(tmp_path / "half", base)


def test_changes_add_up():
    model, batch = made("cnn")
    start = snapshot(model)
    prune(model, "l1-filter", .25, [batch])
    middle = snapshot(model)
    prune(model, "l1-filter", .5, [batch])
    whole = diff_snapshots(start, snapshot(model))
    sum_of = compose_changes(diff_snapshots(start, middle), diff_snapshots(middle, snapshot(model)))
    assert whole["shapes"] == sum_of["shapes"]
    assert all(whole["modules"][n].items() <= sum_of["modules"][n].items() for n in whole["modules"])


def test_examples_are_invented_and_answers_compared():
    batch = {"ids": torch.tensor([[5, 2]]), "x": [torch.ones(1, 3), torch.ones(1, dtype=torch.bool)], "n": 3}
    again = batch_from_spec(json.loads(json.dumps(batch_spec(batch))))
    assert again["ids"].max() <= 5
    assert again["n"] == 3 and again["x"][0].shape == (1, 3) and again["x"][1].dtype == torch.bool
    assert batch_spec(torch.zeros(2, 3))["high"] is None and batch_spec([object()]) is None
    net = nn.Linear(3, 2)
    one = fingerprint(net, batch_spec(torch.zeros(4, 3)))
    net.weight.data[0, 0] += 1
    assert one["shape"] == [4, 2]
    assert not matches(one, fingerprint(net, batch_spec(torch.zeros(4, 3))), torch.float32)
    assert not matches(one, None, torch.float32)
    assert fingerprint(lambda x: x, None) is None


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, .1, momentum=.9), lambda p: torch.optim.AdamW(p, 1e-2)])
def test_the_optimiser_goes_on_as_if_the_network_had_always_been_small(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(16, 6)
    y = torch.randint(0, 3, (16,))
    net[2].weight.data[:, ::2] = 0   # five units that nobody hears: removing them changes nothing
    net[0].weight.data[::2] *= 1e-3
    def step(model, optimizer):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        model[2].weight.grad[:, silent(model)] = 0
        model[0].weight.grad[silent(model)] = 0
        model[0].bias.grad[silent(model)] = 0
        optimizer.step()
        return loss.item()
    def silent(model): return slice(0, None, 2) if len(model[0].weight) == 10 else slice(0, 0)
    optimizer = make([{"params": net[0].parameters(), "weight_decay": 0.},
                      {"params": net[2].parameters(), "weight_decay": 0.}])
    for _ in range(3): step(net, optimizer)
    twin = copy.deepcopy(net)
    other = make([{"params": twin[0].parameters(), "weight_decay": 0.},
                  {"params": twin[2].parameters(), "weight_decay": 0.}])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with sync_optimizer(optimizer, net) as kept: kept.append(prune(net, "l1-filter", .5, x))
    assert kept[0].slices["0.weight"][0] == [1, 3, 5, 7, 9] and len(optimizer.param_groups) == 2
    assert [step(net, optimizer) for _ in range(3)] == pytest.approx([step(twin, other) for _ in range(3)], rel=1e-5)
    with pytest.raises(BadInput, match="append the plan"):
        with sync_optimizer(optimizer, net): pass


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow), "vit"])
def test_pruned_models_compile_and_export(name):
    model, batch = made(name)
    prune(model, "l1-filter", .5, [batch])
    here = out(model, batch)
    program = torch.export.export(model, (batch,)).module()
    assert torch.allclose(program(batch), here, atol=1e-5 * here.abs().max().item())
    if name == "vit": return
    torch._dynamo.reset()
    assert torch.allclose(out(torch.compile(model, backend="aot_eager"), batch), here,
                          atol=1e-5 * here.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "resnet18", "vit"])
def test_onnxruntime_computes_the_same(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, batch = made(name)
    prune(model, "l1-filter", .5, [batch])
    here = out(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (batch,), tmp_path / "half.onnx", verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "half.onnx"))
    there = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])
    assert torch.allclose(there, here, atol=1e-4 * here.abs().max().item())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_inductor_compiles_what_is_left():
    import shutil
    if not (shutil.which("g++") or shutil.which("clang++")): pytest.skip("no C++ compiler here")
    model, batch = made("cnn")
    prune(model, "l1-filter", .5, [batch])
    here = out(model, batch)
    torch._dynamo.reset()
    assert torch.allclose(out(torch.compile(model), batch), here, atol=1e-4 * here.abs().max().item())


def test_a_plan_travels_without_its_model(tmp_path):
    import pickle
    model, batch = made("cnn")
    plan = prune(model, "l1-filter", .5, [batch])
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert other == plan and other.model is None and other.build == plan.build
        other.save(tmp_path / "decision")
        assert not (tmp_path / "decision" / "model.json").exists()
        other.save(tmp_path / "both", model)   # unless the model is passed
        assert torch.equal(out(load_pruned(tmp_path / "both", cnn), batch), out(model, batch))

class Unsaved(nn.Module):
    "Its constant for the keys has the width of a fresh layer, and is no entry of the state dict."
    def __init__(self, width):
        super().__init__()
        self.layer, self.out = nn.Linear(6, width), nn.Linear(width, 3)
        self.register_buffer("offset", torch.arange(width).float(), persistent=False)

    def forward(self, x): return self.out((self.layer(x) + self.offset).relu())

def test_buffers_that_a_state_dict_leaves_out_are_loaded_as_they_were_cut(tmp_path):
    torch.manual_seed(0)
    model, x = Unsaved(8).eval(), torch.randn(4, 6)
    plan = prune(model, "l1-filter", .5, data=[x])
    assert model.offset.shape == (4,) and "offset" not in model.state_dict()
    again = load_pruned(plan.save(tmp_path / "plan", model), lambda: Unsaved(8).eval())
    assert torch.equal(again.offset, model.offset) and torch.equal(again(x), model(x))
    assert "offset" not in again.state_dict()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_loaded_weights_lie_in_memory_as_the_saved_ones_do(layout, tmp_path):
    "Kernels are chosen by layout and alignment: a tensor in the middle of a file's memory gives other last bits."
    def make(): return nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 7, 3), nn.Flatten(),
                                     nn.Linear(7, 3)).eval().to(memory_format=layout)
    model = make()
    plan = prune(model, "l1-filter", .3, torch.randn(2, 3, 5, 5))
    again = load_pruned(plan.save(tmp_path, model), make)
    for n, p in model.named_parameters():
        assert again.get_parameter(n).stride() == p.stride()
        assert again.get_parameter(n).data_ptr() % 64 == 0
