"Published and trained generators of small images, and text to image: anchors, names, determinism, obedience."
import copy, os

import pytest
import torch

from pruning_bench import prune
from pruning_bench.bench.tasks import ddpm, ddpm_pipelines, fashion, image_evaluator
from pruning_bench.bench.tasks import text_to_image as t2i, text_to_image_data as t2i_data
from pruning_bench.bench.measure.images import pipeline_settings
from pruning_bench.bench.measure.size import count_parameters
from pruning_bench.bench.task import find_task
from pruning_bench.core.inputs import BadInput
from pruning_bench.core.space import prunable_layers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
needs_data = pytest.mark.skipif(not os.environ.get("PRUNING_BENCH_DATA"),
                                reason="needs the files of PRUNING_BENCH_DATA")


# networks

def test_small_unet_has_the_published_names_and_sizes():
    net = ddpm.SmallUNet()
    assert count_parameters(net) == 606_852
    assert net.b_out[2].ln.weight.shape == (10, 28, 28) and not net.b_out[2].norm and all(b.norm for b in net.b1)
    assert not net.time_embed.weight.requires_grad
    with torch.no_grad(): assert net(torch.zeros(2, 1, 28, 28), torch.tensor([0, 999])).sample.shape == (2, 1, 28, 28)

def test_clock_by_hand():
    table = ddpm.time_embedding_table()
    assert table.shape == (1000, 100)
    assert table[4, 0] == pytest.approx(torch.tensor(4.).sin().item(), abs=1e-6)
    assert table[4, 50] == pytest.approx(torch.tensor(4. / 10_000**1.).sin().item(), abs=1e-6)
    assert table[1, 7] == 1 and table[997, 0] == pytest.approx(torch.tensor(4.).sin().cos().item(), abs=1e-6)

def test_draws_are_times_then_noise():
    t, noise = ddpm.draw_noise(5, (1, 2, 2), 7)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(t, torch.randint(1000, (5,), generator=generator))
    assert torch.equal(noise, torch.randn(5, 1, 2, 2, generator=generator))
    assert not torch.equal(t, ddpm.draw_noise(5, (1, 2, 2), 8)[0])

def test_noise_error_of_known_answers():
    from types import SimpleNamespace
    x, (t, noise) = torch.rand(6, 1, 4, 4), ddpm.draw_noise(6, (1, 4, 4), 0)
    class Zero(torch.nn.Module):
        def forward(self, sample, timestep): return SimpleNamespace(sample=torch.zeros_like(sample))
    class Oracle(torch.nn.Module):
        def forward(self, sample, timestep):
            a = ddpm.ddpm_scheduler().alphas_cumprod[timestep].view(-1, 1, 1, 1)
            return SimpleNamespace(sample=(sample - a.sqrt() * x[:len(sample)]) / (1 - a).sqrt())
    assert torch.allclose(ddpm.noise_errors(Zero(), x, t, noise), noise.square().mean((1, 2, 3)))
    assert ddpm.noise_errors(Oracle(), x, t, noise).max() < 1e-6

def test_judge_has_features_for_its_head():
    torch.manual_seed(0)
    judge, x = image_evaluator.EvaluatorCNN().eval(), torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        assert judge.features(x).shape == (3, 64) and torch.equal(judge.head(judge.features(x)), judge(x))


# words, codec and the prompted model

def test_prompts_are_different_and_fit():
    flat = [p for row in t2i_data.PROMPTS for p in row]
    assert len(flat) == len(set(flat)) == 120
    assert "an ankle boot" in t2i_data.PROMPTS[9]
    assert "a photo of a sneaker" == t2i_data.PROMPTS[7][0]
    ids = t2i_data.token_ids(flat)
    assert ids.shape == (120, 16) and len({tuple(r) for r in ids.tolist()}) == 120
    assert (ids[:, 0] == 0).all() and (ids[:, -1] == 1).all()

def test_tokenizer_is_made_the_same_every_time():
    first = t2i_data.prompt_tokenizer().get_vocab()
    t2i_data.prompt_tokenizer.cache_clear()
    assert t2i_data.prompt_tokenizer().get_vocab() == first
    assert t2i_data.token_ids(["a photo of a sneaker"])[0, :2].tolist() == [0, 2 + 27]
    assert first["-"] == 28
    assert first["a</w>"] == 29

def test_merges_by_hand():
    assert t2i_data.merge_pair(("a", "a", "a"), ("a", "a")) == ("aa", "a")
    assert t2i_data.learn_merges(["shoe", "boot"])[0] == ("b", "o") and t2i_data.learn_merges(["b", "-"]) == []
    assert t2i_data.learn_merges(["hoe", "hot", "shop"])[0] == ("h", "o")

def test_every_word_of_a_prompt_is_one_token():
    for row in t2i_data.PROMPTS:
        for prompt in row:
            assert "".join(t2i_data.prompt_tokenizer().tokenize(prompt)).replace("</w>", "") == prompt.replace(" ", "")
            assert len(t2i_data.prompt_tokenizer().tokenize(prompt)) == len(prompt.replace("-", " - ").split())

def test_whiten_changes_latents_and_nothing_else():
    torch.manual_seed(0)
    net, x = t2i_data.autoencoder().eval(), torch.randn(40, 1, 32, 32)
    with torch.no_grad():
        before, old = net(x).sample, net.encode(x).latent_dist
        t2i_data.whiten_latents(net, x)
        new = net.encode(x).latent_dist
        scale = old.mean.std((0, 2, 3))
        assert torch.allclose(net(x).sample, before, atol=1e-4)
        assert torch.allclose(new.mean, (old.mean - old.mean.mean((0, 2, 3))[:, None, None]) / scale[:, None, None],
                              atol=1e-4)
        assert torch.allclose(new.std, old.std / scale[:, None, None], rtol=1e-3)

@pytest.mark.parametrize("skip, part", [(["unet.*"], "text_encoder"), (["text_encoder.*"], "unet"),
                                        ("unet*", "text_encoder")])
def test_networks_are_pruned_separately(skip, part):
    torch.manual_seed(0)
    net = t2i.small_t2i((16, 32), 32)
    before = copy.deepcopy(net.state_dict())
    plan = prune(net, "magnitude", .5, skip=skip)
    assert plan.masks and all(n.startswith(f"{part}.") for n in plan.masks)
    touched = {n for n, v in before.items() if not torch.equal(v, net.state_dict()[n])}
    assert touched and all(n.startswith(f"{part}.") for n in touched)
    zeros = sum(int((l.weight == 0).sum()) for n, l in prunable_layers(net).items() if n.startswith(part))
    assert zeros == sum(l.weight.numel() // 2 for n, l in prunable_layers(net).items() if n.startswith(part))

def test_prompted_is_text_encoder_then_unet():
    torch.manual_seed(0)
    net = t2i.small_t2i((16, 32), 32).eval()
    ids, x, t = t2i_data.token_ids(["a bag", "a coat"]), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        words = net.text_encoder(ids).last_hidden_state
        assert torch.equal(net(input_ids=ids, sample=x, timestep=t).sample,
                           net.unet(x, t, encoder_hidden_states=words).sample)

def test_pipeline_paints_the_same_twice_and_listens_to_noise():
    torch.manual_seed(0)
    net, vae = t2i.small_t2i((16, 32), 32).eval(), t2i_data.autoencoder().eval()
    pipe = t2i.make_pipeline(net, vae)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one, two, other = (t2i.generate_images(pipe, ["a bag", "a coat"], n, 2) for n in (noise, noise, noise.flip(0)))
    assert one.shape == (2, 1, 32, 32)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.min() >= 0
    assert one.max() <= 1

def test_obeyed_counts_what_the_judge_sees(monkeypatch):
    class Always(torch.nn.Module): # sees class 3 everywhere
        def features(self, x): return x.flatten(1)[:, :4]
        def forward(self, x): return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10) * 50.
    monkeypatch.setattr(t2i, "evaluator", lambda name: Always())
    monkeypatch.setattr(t2i, "evaluator_features", lambda images, name: images.flatten(1)[:, :4])
    monkeypatch.setattr(t2i, "real_features", lambda name,
                        split: torch.rand(20, 4, generator=torch.Generator().manual_seed(0)))
    made = {"images": torch.rand(20, 1, 28, 28), "eps-mse": torch.tensor([1., 3.])}
    got = t2i.t2i_metrics(made, "test")
    assert got["prompted"] == pytest.approx(.1) and got["confidence"] == pytest.approx(.1) and got["eps-mse"] == 2
    assert t2i.t2i_comparison(made, made)["flips"] == 0 and t2i.t2i_comparison(made, made)["ssim"] == pytest.approx(1)


# refusals

def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path)); monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="ddpm_mnist.safetensors.*PRUNING_BENCH_DATA"): find_task("ddpm-mnist").dense()

def test_weights_with_other_bytes_are_refused(monkeypatch, tmp_path):
    (tmp_path / "ddpm_unet_28x28").mkdir()
    (tmp_path / "ddpm_unet_28x28" / "ddpm_mnist.safetensors").write_bytes(b"no weights")
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="another file"): find_task("ddpm-mnist").dense()

@pytest.mark.parametrize("name", ["ddpm:nobody/nothing", "sd:nobody/nothing", "sd:nobody/nothing@smoke"])
def test_unknown_pipelines_are_refused(name):
    with pytest.raises(BadInput, match="nobody/nothing.*save_pretrained"): find_task(name)

def test_unknown_data_set_is_refused():
    with pytest.raises(BadInput, match="did you mean mnist"): fashion.mnist_images("mnst", "test")

def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds 0 images"): ddpm_pipelines.images_for(str(tmp_path), "test", 28, 1)

def test_images_of_a_folder_are_split_and_resized(tmp_path):
    from PIL import Image
    for i in range(40): Image.new("RGB", (20, 10), (i, i, i)).save(tmp_path / f"{i:02}.png")
    parts = {s: ddpm_pipelines.images_for(str(tmp_path), s, 8, 3) for s in ("train", "validation", "test")}
    assert {s: tuple(x.shape) for s, x in parts.items()} == {"train": (32, 3, 8, 8), "validation": (4, 3, 8, 8),
                                                             "test": (4, 3, 8, 8)}
    assert [x[0, 0, 0].item() for x in parts["test"]] == [0, 10, 20, 30]
    assert [x[0, 0, 0].item() for x in parts["validation"]] == [1, 11, 21, 31]


# with the data

@needs_data
@pytest.mark.parametrize("name, counts", [("mnist", 892), ("fashion", 1000)])
def test_splits_are_those_of_the_files(name, counts):
    sizes = [len(fashion.mnist_images(name, s)[1]) for s in ("train", "validation", "test")]
    assert sizes == [55000, 5000, 10000] and fashion.mnist_images(name, "test")[1].bincount().min() == counts

@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name, published", [("mnist", .02891), ("fashion", .04895)])
def test_published_error_is_met(name, published):
    world = find_task(f"ddpm-{name}")
    net = world.dense()
    with torch.no_grad():
        found = ddpm.noise_errors(net, fashion.scale_pixels(fashion.mnist_images(name, "test")[0][:2000]),
                                  *ddpm.draw_noise(2000, (1, 28, 28), 1)).mean().item()
    assert abs(found - published) < 5.1e-6 and world.accepts(found)

@needs_data
def test_images_must_fit_the_model():
    with pytest.raises(BadInput, match="have 1 channels and the model wants 3"):
        ddpm_pipelines.images_for("mnist", "test", 28, 3)
    with pytest.raises(BadInput, match="28 pixels a side and the model wants 64"):
        ddpm_pipelines.images_for("mnist", "test", 64, 1)
    assert ddpm_pipelines.images_for("mnist", "test", 32, 1).shape == (10000, 1, 32, 32)

@needs_data
@pytest.mark.slow
def test_cifar_serves_three_channels():
    assert ddpm_pipelines.images_for("cifar10", "test", 32, 3).shape == (10000, 3, 32, 32)

@needs_data
def test_training_streams_replay():
    stream = find_task("ddpm-mnist@smoke").batches(3)
    (a, noise), (b, again) = next(iter(stream)), next(iter(stream))
    assert torch.equal(a["sample"], b["sample"]) and torch.equal(noise, again) and a["timestep"].shape == (64,)
    other, _ = next(iter(find_task("ddpm-mnist@smoke").batches(4)))
    assert not torch.equal(a["sample"], other["sample"])

@needs_data
def test_the_weights_belong_to_their_data():
    own, other = ({n: ddpm.noise_errors(find_task("ddpm-mnist@smoke").dense(),
                                        fashion.scale_pixels(fashion.mnist_images(n, "test")[0][:100]),
                                        *ddpm.draw_noise(100, (1, 28, 28), 1)).mean().item()}[n]
                  for n in ("mnist", "fashion"))
    assert own < .05 < .1 < other

@needs_data
@pytest.mark.slow
def test_prompts_matter():
    tiny = find_task("t2i-tiny")
    result = tiny.evaluate(tiny.dense())
    assert result["prompted"] >= .55 and tiny.accepts(result["prompted"]) and result["confidence"] > .5
    same = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    shoe, trousers = t2i.generate_images(t2i.make_pipeline(tiny.dense()),
                                         ["a photo of a sneaker", "a photo of trousers"], same, 10)
    assert (shoe - trousers).abs().mean() > .05

@needs_data
@pytest.mark.slow
def test_a_saved_pipeline_is_a_task(tmp_path):
    dense = find_task("t2i-tiny").dense()
    t2i.make_pipeline(dense).save_pretrained(tmp_path)
    world = find_task(f"sd:{tmp_path}@smoke")
    model = world.dense()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values()))
    assert world.accepts(world.evaluate(model)["ssim"])
    inputs, noise = world.calibration(0)[0]
    assert set(inputs) == {"input_ids", "sample", "timestep"} and noise.shape == inputs["sample"].shape == (4, 4, 8, 8)
    prune(model, "wanda", .5, world.calibration(0), world.loss, skip=["unet.*"])
    assert world.evaluate(model)["ssim"] < 1 and torch.equal(model.unet.conv_in.weight, dense.unet.conv_in.weight)

@needs_data
@pytest.mark.slow
def test_a_saved_ddpm_is_a_task(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler
    torch.manual_seed(0)
    net = ddpm.fashion_unet().eval()
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path)
    world = find_task(f"ddpm:{tmp_path},mnist")
    x = fashion.scale_pixels(fashion.mnist_images("mnist", "test")[0][:200])
    with torch.no_grad(): direct = ddpm.noise_errors(net, x, *ddpm.draw_noise(200, (1, 28, 28), 1)).mean().item()
    assert world.evaluate(world.dense())["eps-mse"] == pytest.approx(direct, rel=1e-4)
    assert find_task(f"ddpm:{tmp_path}").digest != world.digest

@needs_data
def test_a_saved_ddpm_is_its_content(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler
    torch.manual_seed(0)
    net, digests = ddpm.fashion_unet((8, 16, 16)).eval(), []
    for change in ("none", "scheduler", "weights", "none"):
        twin = copy.deepcopy(net)
        if change == "weights": twin.conv_in.weight.data += .1
        plan = DDPMScheduler(beta_end=.03 if change == "scheduler" else .02)
        DDPMPipeline(twin, plan).save_pretrained(tmp_path)
        digests.append(find_task(f"ddpm:{tmp_path},mnist").digest)
    assert len(set(digests)) == 3 and digests[0] == digests[3]

def test_the_settings_of_a_pipeline_belong_to_its_identity():
    from diffusers import DDIMScheduler
    from types import SimpleNamespace
    class Words:
        def __init__(self, **known): self.known = known
        def get_vocab(self): return self.known
    def made(end=.02, **known):
        return SimpleNamespace(components={"scheduler": DDIMScheduler(beta_end=end), "tokenizer": Words(**known),
                                           "safety_checker": None})
    found = [pipeline_settings(made(**k)) for k in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1, "end": .03})]
    assert found[0] == found[1] and len(set(found)) == 3

def test_other_images_in_the_same_folder_are_seen(tmp_path):
    from PIL import Image
    for i in range(30): Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
    before = ddpm_pipelines.folder_images(str(tmp_path), 8, 1)
    assert ddpm_pipelines.folder_images(str(tmp_path), 8, 1) is before
    Image.new("L", (8, 8), 99).save(tmp_path / "00.png")
    assert ddpm_pipelines.folder_images(str(tmp_path), 8, 1)[0, 0, 0, 0] == 99 != before[0, 0, 0, 0]
