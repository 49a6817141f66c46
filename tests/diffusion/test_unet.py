"Pruning a U-Net: the denoising loss, whole norm groups, images at the same noise."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.diffusion.unet import denoising_loss, ddim_sample, loss_per_timestep, noisy_batch

diffusers = pytest.importorskip("diffusers")

def scheduler(**kw): return diffusers.DDIMScheduler(num_train_timesteps=1000, **kw)

@pytest.fixture
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                                 block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8,
                                 down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()

@pytest.fixture
def prompted():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
                                          layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
                                          norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()

IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

def seeded(fn, seed=0):
    torch.manual_seed(seed)
    return fn()


def test_loss_is_the_error_of_the_noise(unet):
    loss = denoising_loss(scheduler())
    value = seeded(lambda: loss(unet, IMAGES))
    torch.manual_seed(0)
    noise, t = torch.randn(IMAGES.shape), torch.randint(1000, (16,))
    assert torch.equal(value, F.mse_loss(unet(scheduler().add_noise(IMAGES, noise, t), t).sample, noise))
    assert torch.equal(value, seeded(lambda: loss(unet, (IMAGES, torch.arange(16)))))
    assert torch.equal(value, seeded(lambda: loss(unet, {"sample": IMAGES})))
    assert not torch.equal(value, seeded(lambda: loss(unet, IMAGES), 1))

def test_targets_follow_the_scheduler():
    noise = seeded(lambda: torch.randn(IMAGES.shape))
    targets = {kind: seeded(lambda: noisy_batch(scheduler(prediction_type=kind), IMAGES))[1]
               for kind in ("epsilon", "v_prediction", "sample")}
    assert torch.equal(targets["epsilon"], noise) and torch.equal(targets["sample"], IMAGES)
    t = seeded(lambda: noisy_batch(scheduler(), IMAGES))[0]["timestep"]
    a = scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(targets["v_prediction"], a.sqrt() * noise - (1 - a).sqrt() * IMAGES, atol=1e-6)

def test_a_loss_without_images_is_refused(unet):
    with pytest.raises(BadInput, match="images"): denoising_loss(scheduler())(unet, {"input_ids": torch.arange(3)})

def test_profile_is_reproducible(unet):
    first, again = (loss_per_timestep(unet, scheduler(), IMAGES, (0, 500, 999)) for _ in range(2))
    assert first == again and list(first) == [0, 500, 999]

@pytest.mark.parametrize("method", ["l1-filter", "taylor-filter", "rand-struct"])
def test_images_and_a_loss_are_enough(unet, method, tmp_path):
    dense = copy.deepcopy(unet)
    plan = prune(unet, method, .5, data=IMAGES, loss=denoising_loss(scheduler()))
    assert plan == prune(copy.deepcopy(dense), method, .5, data=IMAGES, loss=denoising_loss(scheduler()))
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm)]
    old = [m for m in dense.modules() if isinstance(m, nn.GroupNorm)]
    assert all(n.num_channels * o.num_groups == o.num_channels * n.num_groups for n, o in zip(norms, old))
    assert any(n.num_groups < o.num_groups for n, o in zip(norms, old))
    plan.save(tmp_path/"plan")
    load_plan(tmp_path/"plan").apply(dense)
    noise = torch.randn(2, 1, 8, 8)
    assert torch.equal(ddim_sample(unet, scheduler(), noise, steps=3), ddim_sample(dense, scheduler(), noise, steps=3))

def test_the_plan_is_that_of_dictionary_batches(unet):
    inputs, noise = seeded(lambda: noisy_batch(scheduler(), IMAGES))
    one = prune(copy.deepcopy(unet), "l1-filter", .5, data=IMAGES, loss=denoising_loss(scheduler()))
    assert one == prune(copy.deepcopy(unet), "l1-filter", .5, data=[(inputs, noise)],
                        loss=lambda out, y: F.mse_loss(out.sample, y))
    assert one == prune(copy.deepcopy(unet), "l1-filter", .5, data=inputs)

def test_sampling_has_no_randomness_and_leaves_the_mode(unet):
    noise = torch.randn(3, 1, 8, 8)
    images = ddim_sample(unet.train(), scheduler(), noise, steps=4)
    assert unet.training
    assert torch.equal(images, seeded(lambda: ddim_sample(unet, scheduler(), noise, steps=4), 9))
    assert images.shape == noise.shape

def test_a_network_with_a_prompt(prompted):
    batch = {"sample": torch.randn(4, 4, 8, 8), "encoder_hidden_states": torch.randn(4, 5, 16)}
    before = sum(p.numel() for p in prompted.parameters())
    plan = prune(prompted, "taylor-filter", .5, data=batch, loss=denoising_loss(scheduler()))
    gate = next(n for n in plan.masks if "ff.net.0" in n)
    kept = plan.slices[gate][0]
    assert sorted(i + 128 for i in kept if i < 128) == [i for i in kept if i >= 128]   # value and gate go in pairs
    assert sum(p.numel() for p in prompted.parameters()) < before
    assert denoising_loss(scheduler())(prompted, batch).isfinite()
