"EfficientNet-Lite0 on NIPS17-dev and the one-shot tier of the vision transformer: shape, splits, recalibration, names."
import json, os
from pathlib import Path

import pytest
import torch
from torch import nn

from pruning_bench.bench.measure.size import count_parameters
from pruning_bench.bench.task import find_task
from pruning_bench.bench.tasks import imagenet_lite0 as lite0
from pruning_bench.bench.tasks.imagenet_lite0 import EfficientNetLite0, SqueezeNet, lite0_input, lite0_name

ROOT = Path(__file__).resolve().parents[2]
data = pytest.mark.skipif(not os.environ.get("PRUNING_BENCH_DATA"),
                          reason="PRUNING_BENCH_DATA names no folder with the real data")
SIZES = {"train": 8, "validation": 4, "test": 6}


@pytest.fixture
def few_photos(monkeypatch):
    "Noise in place of the photographs."
    def noise(split):
        drawn = torch.Generator().manual_seed(len(split))
        return (torch.randint(256, (SIZES[split], 3, 256, 256), dtype=torch.uint8, generator=drawn),
                torch.randint(1000, (SIZES[split],), generator=drawn))
    monkeypatch.setattr(lite0, "photos", noise)


def test_the_network_has_the_published_size():
    assert count_parameters(EfficientNetLite0()) == 4_652_008
    assert count_parameters(SqueezeNet()) == 1_248_424

def test_every_published_name_finds_its_tensor():
    ours = set(EfficientNetLite0().state_dict())
    of = {"conv": ["weight"], "bn": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]}
    theirs = [f"_{p}.{t}" for p, k in (("conv_stem", "conv"), ("bn0", "bn"), ("conv_head", "conv"), ("bn1", "bn"))
              for t in of[k]] + ["_fc.weight", "_fc.bias"]
    parts = (("expand_conv", "conv"), ("bn0", "bn"), ("depthwise_conv", "conv"), ("bn1", "bn"),
             ("project_conv", "conv"), ("bn2", "bn"))
    theirs += [f"_blocks.{i}._{p}.{t}" for i in range(16) for j, (p, k) in enumerate(parts) for t in of[k]
               if i or j > 1]   # the first block does not widen
    assert {lite0_name(n) for n in theirs} == ours and len(theirs) == len(ours)

def test_padding_is_that_of_tensorflow():
    "An even picture and stride 2: the odd pixel of padding is on the right and below."
    for kernel, pads in ((3, (0, 1)), (5, (1, 2))):
        block = lite0.conv_norm(1, 1, kernel, 2, act=False)
        nn.init.ones_(block.conv.weight)
        x = torch.ones(1, 1, 8, 8)
        assert torch.equal(block.conv(block.pad(x)), block.conv(nn.functional.pad(x, pads * 2)))
        assert block.conv(block.pad(x)).shape == (1, 1, 4, 4)

def test_the_crop_is_the_middle_and_bytes_are_scaled():
    images = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    images[..., 16:240, 16:240] = 255
    assert lite0_input(images).shape == (1, 3, 224, 224) and (lite0_input(images) == 1).all()
    blue = torch.zeros(1, 3, 256, 256, dtype=torch.uint8); blue[:, 2] = 255
    assert lite0.squeezenet_input(blue)[0, :, 0, 0].tolist() == [255 - 104, -117, -123]

def test_splits_cover_the_photographs_once():
    ids = list(range(1000))
    parts = [ids[lite0.SPLITS_OF_PHOTOS[s]] for s in ("train", "validation", "test")]
    assert sum(parts, []) == ids and list(map(len, parts)) == [300, 100, 600]

def test_the_metric_says_what_it_scores(few_photos):
    task = find_task("imagenet-lite0")
    logits = nn.functional.one_hot(lite0.photos("test")[1], 1000).float()
    assert task.metrics(logits, "test")[task.metric] == 1 and "nips17" in task.metric
    assert "accuracy" not in task.metrics(logits, "test")
    assert "not the ImageNet validation set" in task.protocol["metrics"]
    logits[:3] = -logits[:3]
    assert task.metrics(logits, "test")[task.metric] == .5

def test_recalibration_reads_training_photographs_and_moves_statistics_only(few_photos, monkeypatch):
    task, net = find_task("imagenet-lite0"), EfficientNetLite0().eval()
    before, asked, read = {k: v.clone() for k, v in net.state_dict().items()}, [], lite0.photos
    monkeypatch.setattr(lite0, "photos", lambda split: asked.append(split) or read(split))
    task.recover(net, [(x[:4], y[:4]) for x, y in task.calibration(0)[:2]], task.loss)
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked") for k in moved)
    assert set(asked) == {"train"} and task.recover.steps == 0 and task.recover.reads

def test_recalibration_sees_every_training_photograph_once(few_photos, monkeypatch):
    monkeypatch.setattr(lite0, "lite0_input", lambda images: images[:, 0, 0, 0])
    monkeypatch.setattr(lite0, "photos", lambda split: (torch.arange(300).view(300, 1, 1, 1), torch.arange(300)))
    batches = [find_task("imagenet-lite0").batches(s) for s in (0, 7)]
    labels = [torch.cat([y for _, y in b]) for b in batches]
    assert torch.equal(labels[0], labels[1]) and labels[0].sort().values.tolist() == list(range(300))


@data
def test_the_photographs_and_their_labels():
    rows = lite0.photo_rows()
    assert len(rows) == 1000 and [r["ImageId"] for r in rows] == sorted(r["ImageId"] for r in rows)
    images, labels = lite0.photos("validation")
    assert images.shape == (100, 3, 256, 256) and 0 <= labels.min() and labels.max() < 1000

@data
def test_labels_count_like_the_outputs_of_a_published_network():
    images, labels = (x[:40] for x in lite0.photos("validation"))
    with torch.no_grad(): found = lite0.deep_compression_squeezenet()(lite0.squeezenet_input(images)).argmax(1)
    right = {shift: (found == labels + shift).float().mean().item() for shift in (-1, 0, 1)}
    assert right[0] > .3 and max(right[-1], right[1]) < .1, right


# the vision transformer

def test_the_one_shot_tier_shares_the_recipe_and_the_dense_model(monkeypatch):
    one, many = find_task("vit-tiny@oneshot"), find_task("vit-tiny")
    assert one.config["train"] == many.config["train"] and one.config["recover"] is None
    assert one.recover.steps == 0 and "dense model" not in one.varies and one.needs == ("vit-tiny",)
    from pruning_bench.bench.tasks import vit_tiny
    dense, asked = many.build(), []
    def known(task, seed): asked.append((task.name, seed)); return dense, {"seconds": 1.}
    monkeypatch.setattr(vit_tiny, "dense_model", known)
    net = one.build()
    assert one.weights(net) == {"seconds": 1.} and asked == [("vit-tiny", 0)]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), dense.parameters()))

@pytest.mark.parametrize("name", ["imagenet-lite0", "vit-tiny@oneshot"])
def test_the_frozen_protocol_is_that_of_the_task(name):
    frozen = json.loads((ROOT / "leaderboard/tasks" / f"{name}.json").read_text())
    task = find_task(name)
    assert frozen["digest"] == task.digest
