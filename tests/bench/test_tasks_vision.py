"CIFAR-10 and Fashion-MNIST: content, anchors, architectures, budgets. Needs the data folder; skips visibly without it."
import dataclasses, io, os, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.bench.tasks import cifar10, fashion
from pruning_bench.bench import sources
from pruning_bench.bench.tasks.cifar10 import (ResNet, cifar10_outputs, distiller_resnet20, cifar10_metrics,
                                               augment_images, cifar10_images, published_weights, normalise_images, vgg,
                                               vit)
from pruning_bench.bench.measure.size import macs, count_parameters
from pruning_bench.bench.run import run_with_status
from pruning_bench.bench.task import find_task, tasks_table
from pruning_bench.graph.saving import shape_delta, reshape_model

data = pytest.mark.skipif(not os.environ.get("PRUNING_BENCH_DATA"),
                          reason="PRUNING_BENCH_DATA names no folder with the real data")
X = torch.zeros(2, 3, 32, 32)


# networks, without data

@pytest.mark.parametrize("depth, params, work", [(20, 269_722, 40_551_040), (32, 464_154, 68_862_592),
                                                 (44, 658_586, 97_174_144), (56, 853_018, 125_485_696)])
def test_resnets_have_the_published_size_and_work(depth, params, work):
    assert count_parameters(ResNet(depth)) == params and macs(ResNet(depth), X) == work

def test_option_a_has_no_weights_and_pads_both_sides():
    block = cifar10.PadShortcut(16)
    x = torch.randn(1, 16, 4, 4)
    assert not list(block.parameters())
    assert torch.equal(block(x)[:, 8:24], x[:, :, ::2, ::2])
    assert not block(x)[:, :8].any()
    assert not block(x)[:, 24:].any()

def test_vgg_and_vit_run():
    assert count_parameters(vgg()) == 14_724_042
    assert vgg(4)(X).shape == vit()(X).shape == (2, 10)

def test_shift_and_mirror_only_move_pixels():
    images = torch.arange(3 * 32 * 32,
                          dtype=torch.int64).remainder(251).to(torch.uint8).view(1, 3, 32, 32).repeat(64, 1, 1, 1)
    out = augment_images(images, torch.Generator().manual_seed(0))
    wide = nn.functional.pad(images[:1], (4,) * 4)
    for o in out[:8]:
        assert any(torch.equal(o, v) for y in range(9) for x in range(9)
                   for v in (wide[0, :, y:y+32, x:x+32], wide[0, :, y:y+32, x:x+32].flip(2)))
    assert len({o.numpy().tobytes() for o in out}) > 30
    assert torch.equal(out, augment_images(images, torch.Generator().manual_seed(0)))

def test_scales_by_hand():
    assert torch.allclose(normalise_images(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), "half"),
                          torch.ones(1, 3, 1, 1))

def test_reshape_refuses_other_networks():
    with pytest.raises(BadInput, match="another architecture"):
        reshape_model(ResNet(20), {"conv9.weight": torch.zeros(1)})
    with pytest.raises(BadInput, match="not a pruned ResNet"):
        shape_delta(ResNet(20), {"conv1.weight": torch.zeros(99, 3, 3, 3)})


# finding the data

def test_without_data_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("PRUNING_BENCH_DATA", raising=False)
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PRUNING_BENCH_OFFLINE", "1")
    for seen in (fashion.fashion_split, fashion.mnist_images): seen.cache_clear()
    with pytest.raises(BadInput, match="set PRUNING_BENCH_DATA") as refused: fashion.fashion_split("test")
    assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="set PRUNING_BENCH_DATA"): published_weights(20)

def test_a_recompressed_copy_is_another_data_set(monkeypatch, tmp_path):
    (tmp_path / "cifar10").mkdir()
    with zipfile.ZipFile(tmp_path / "cifar10/test.zip", "w") as z:
        strip, labels = io.BytesIO(), io.BytesIO()
        Image.fromarray(np.zeros((320, 32, 3), "uint8")).save(strip, "WEBP", lossless=True)
        z.writestr("0.webp", strip.getvalue())
        np.save(labels, np.zeros(10)); z.writestr("labels.npy", labels.getvalue())
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path))
    cifar10_images.cache_clear()
    with pytest.raises(BadInput, match="this is not CIFAR-10 test"): cifar10_images("test")
    cifar10_images.cache_clear()

def test_altered_weights_are_refused(monkeypatch, tmp_path):
    from safetensors.torch import save_file
    (tmp_path / "resnet_cifar10").mkdir()
    save_file({k: v for k, v in ResNet(20).state_dict().items() if "num_batches" not in k},
              tmp_path / "resnet_cifar10/resnet20.safetensors")
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="this is not ResNet-20"): published_weights(20)


# anchors

@data
def test_resnet20_is_exactly_the_published_network():
    world = find_task("cifar10-resnet20")
    found = world.evaluate(world.dense())
    assert round(10_000 * found["accuracy"]) == 9173 and world.accepts(found["accuracy"]) and not world.accepts(.9174)

@data
@pytest.mark.slow
@pytest.mark.parametrize("depth, right", [(32, 9263), (44, 9310), (56, 9339)])
def test_the_deeper_ones_too(depth, right):
    world = find_task(f"cifar10-resnet{depth}")
    assert round(10_000 * world.evaluate(world.dense())["accuracy"]) == right

@data
@pytest.mark.slow
@pytest.mark.parametrize("name", cifar10.DISTILLER_WEIGHTS)
def test_reference_points_of_others(name):
    assert round(cifar10_metrics(cifar10_outputs("half")(distiller_resnet20(name), "test"), "test")["accuracy"],
                 4) == cifar10.DISTILLER_WEIGHTS[name][1]

@data
def test_removed_channels_come_back_by_their_shapes():
    small = distiller_resnet20("channels_removed")
    assert count_parameters(small) == 235_774
    assert small.layer1[0].conv1.out_channels == 11
    assert small.layer1[0].bn1.num_features == 11
    assert set(shape_delta(ResNet(20, "B"), small.state_dict())) >= {"layer1.0.conv1.weight",
                                                                     "layer1.0.bn1.running_mean"}


# tasks

@data
def test_calibration_is_training_data_and_seeded():
    world = find_task("cifar10-resnet20")
    a, b, c = (world.calibration(s)[0] for s in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0])
    train = normalise_images(cifar10.cifar10_split("train")[0][:45_000:1][cifar10.cifar10_split("train")[1] == a[1][0]])
    assert (train.flatten(1) == a[0][0].flatten()).all(1).any()

@data
def test_smoke_run_retrains_and_is_deterministic():
    world = dataclasses.replace(find_task("cifar10-resnet20@smoke"))
    a, b = (run_with_status(world, "global-magnitude", .8, 0)[0] for _ in range(2))
    assert a["status"] == "ok"
    assert a["quality"] == b["quality"]
    assert a["size"]["macs"] == 40_551_040
    assert a["size"]["params"] == 269_722
    assert a["quality"]["after_recover"]["accuracy"] > a["quality"]["after_prune"]["accuracy"] > .1
    assert abs(a["size"]["nonzero_prunable"] / a["size"]["prunable"] - .2) < 1e-3
    assert a["quality"]["after_prune"]["flips"] > 0

@data
def test_channels_of_a_resnet_with_padded_shortcuts_are_removed():
    world = find_task("cifar10-resnet20")
    model = world.dense()
    plan = prune(model, "l1-filter", .5, world.calibration(0))
    assert plan.slices
    assert count_parameters(model) < 200_000
    assert macs(model, X) < 25_000_000
    assert model(X).shape == (2, 10)

@data
def test_data_tasks_count_their_pictures_and_share_their_steps():
    steps, epochs = find_task("cifar10-data"), find_task("cifar10-data-epochs")
    assert len(steps.examples()) == 45_000
    assert steps.share(.25) == 1
    assert epochs.share(.25) == .25
    assert steps.digest != epochs.digest
    x, y = steps.examples()[7]
    assert torch.equal(x, normalise_images(cifar10.cifar10_split("train")[0][7:8])[0])
    assert y == cifar10.cifar10_split("train")[1][7]

@data
def test_fixed_epochs_spend_fewer_steps():
    quick = {n: dataclasses.replace(find_task(n), train=fashion.finetune(20, lr=1e-3))
             for n in ("fashion-data", "fashion-data-epochs")}
    spent = {n: run_with_status(t, "random-subset", .75, 0)[0]["cost"]["recover_steps"] for n, t in quick.items()}
    assert spent == {"fashion-data": 20, "fashion-data-epochs": 5}

@data
def test_garments_are_split_and_scaled():
    parts = [fashion.fashion_split(s) for s in ("train", "validation", "test")]
    assert [len(y) for _, y in parts] == [55_000, 5_000, 10_000] and parts[2][0].min() == -1 and parts[2][0].max() == 1

@data
@pytest.mark.slow
def test_fashion_cnn_reaches_its_bound():
    world = find_task("fashion-cnn")
    assert world.accepts(world.evaluate(world.dense(0))["accuracy"])

def test_tiers_are_tasks_of_their_own():
    shown = tasks_table()
    assert shown.tiers["cifar10-resnet56"] == "small, smoke, oneshot, two-epochs, full"
    assert "cifar10-resnet56@smoke" not in shown.index
    assert len({find_task(f"cifar10-resnet20{t}").digest for t in ("", "@smoke", "@full")}) == 3
    assert find_task("cifar10-resnet20@full").recover.steps > 100 * find_task("cifar10-resnet20").recover.steps

def test_sources_are_checked_by_their_bytes(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path))
    (tmp_path / "a").write_bytes(b"abc")
    good = sources.Source("a", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert sources.fetch(good) == Path(tmp_path / "a")
    with pytest.raises(BadInput, match="is another file"): sources.fetch(dataclasses.replace(good, sha256="0" * 64))

@data
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["cifar10-resnet20-scratch", "cifar10-vgg16bn", "vit-tiny"])
def test_two_epochs_of_a_recipe_reach_the_bound_of_the_smoke_tier(name):
    world = find_task(f"{name}@smoke")
    assert world.train.steps == 702 and world.accepts(world.evaluate(world.dense())["accuracy"])
