"Distances between sets of images, similarity of pairs and agreement with prompts: by hand and against torchmetrics."
import copy, math

import pytest
import torch
from torch import nn

from pruning_bench.bench.measure.images import (EXTRACTORS, clip_score, image_distances, make_extractor, frechet, kid,
                                                ssim, weights_hash)
from pruning_bench.core.inputs import BadInput


def draw(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

class Eye(nn.Module):
    "A small network of features that torchmetrics accepts as well."
    num_features = 6
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3 * 8 * 8, 6)
    def forward(self, x): return self.layer(x.flatten(1).float())


# distances

def test_golden_distances():
    assert kid(torch.ones(2, 1), torch.zeros(2, 1)) == pytest.approx(7)
    # pairs: 1, 8; across: 27 and 1
    assert kid(torch.tensor([[2.], [0.]]), torch.tensor([[1.], [1.]])) == pytest.approx(1 + 8 - 2 * (27 + 1) / 2)
    assert frechet(torch.tensor([[0.], [2.]]), torch.tensor([[1.], [5.]])) == pytest.approx(6)
    # equal means; variances 8 and 0
    assert frechet(torch.tensor([[0.], [4.]]), torch.tensor([[2.], [2.]])) == pytest.approx(8)

def test_distances_of_shifted_clouds():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    assert frechet(x, x) == pytest.approx(0, abs=1e-6) and frechet(x, x + 2) == pytest.approx(24, abs=1e-4)
    assert frechet(x, 3 * x) == pytest.approx(4 * (x.double().var(0).sum() + x.double().mean(0).square().sum()).item(),
                                              rel=1e-6)   # sd times 3: (3 - 1)^2
    assert kid(x, x + 2) > 1 > abs(kid(x[:150], x[150:])) and kid(x, x + 2) == pytest.approx(kid(x + 2, x))

def test_kid_is_unbiased_and_the_order_of_images_does_not_matter():
    x = torch.randn(40, 20, 3, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([kid(a[:10], a[10:]) for a in x])
    assert values.mean().abs() < 3 * values.std() / 40**.5
    a, b = x[0], x[1] + 1
    assert kid(a.flip(0), b) == pytest.approx(kid(a, b)) and frechet(a.flip(0), b) == pytest.approx(frechet(a, b))

def test_against_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    a, b, eye = draw(60, 3, 8, 8), draw(60, 3, 8, 8, seed=1)**2, Eye()
    theirs = KernelInceptionDistance(feature=eye, subsets=1,
                                     subset_size=60), FrechetInceptionDistance(feature=eye, input_img_size=(3, 8, 8))
    for metric in theirs: metric.update(a, real=True); metric.update(b, real=False)
    mine = image_distances(a, b, make_extractor(eye))
    assert mine["kid"] == pytest.approx(theirs[0].compute()[0].item(), rel=1e-3)
    assert mine["frechet"] == pytest.approx(theirs[1].compute().item(), rel=1e-3)

def test_ssim():
    x = draw(4, 1, 8, 8)
    assert ssim(x, x) == pytest.approx(1, abs=1e-5) and ssim(x, 1 - x) < 0 and ssim(x, x.flip(3)) < .9
    assert ssim(torch.full((1, 1, 8, 8), .5), torch.full((1, 1, 8, 8), .25)) == pytest.approx(.2501 / .3126, abs=1e-5)
    y = draw(4, 1, 8, 8, seed=1)
    assert ssim(x, y) == pytest.approx(ssim(y, x)) and ssim(x, y) < ssim(x, .5 * (x + y)) < 1

def test_ssim_against_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    x, y = draw(4, 3, 16, 16), draw(4, 3, 16, 16, seed=1)
    _, full = theirs(x, y, gaussian_kernel=False, kernel_size=5, data_range=1., return_full_image=True,
                     reduction="none")
    assert ssim(x, y) == pytest.approx(full[..., 2:-2, 2:-2].mean().item(), abs=1e-5)   # without their padded border


# extractors

def test_the_hash_is_of_the_weights():
    net = Eye()
    same, other = copy.deepcopy(net), copy.deepcopy(net)
    other.layer.bias.data[0] += 1e-3
    assert weights_hash(net) == weights_hash(same) != weights_hash(other)
    half = copy.deepcopy(net).half()
    assert weights_hash(half) != weights_hash(copy.deepcopy(half).float())      # equal values of another type
    renamed = nn.ModuleDict({"other": net.layer})
    assert weights_hash(renamed) != weights_hash(net) and len(weights_hash(net)) == 64
    images = draw(30, 3, 8, 8)
    result = image_distances(images, images, make_extractor(net))
    assert result["extractor"] == weights_hash(net)
    assert result["samples"] == [30, 30]
    assert result["frechet"] == pytest.approx(0, abs=1e-6)

def test_extractor_leaves_mode_alone_and_batches_change_nothing():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(.5)).train()
    look, x = make_extractor(net), draw(7, 3, 8, 8)
    assert torch.allclose(look(x, size=2), look(x), atol=1e-5) and net.training and not look(x).requires_grad

def test_missing_weights_and_unknown_names_are_refused_in_one_sentence(monkeypatch):
    def broken(): raise OSError("no\nnetwork")
    monkeypatch.setitem(EXTRACTORS, "broken", broken)
    with pytest.raises(BadInput, match="'broken' cannot be had here") as refused: make_extractor("broken")
    assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match="did you mean inception"): make_extractor("inceptoin")

@pytest.mark.parametrize("name,features", [("inception", 2048), ("clip", 512)])
def test_published_extractors(name, features, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try: looks = make_extractor(name)
    except BadInput as e: pytest.skip(str(e))
    assert looks(draw(3, 1, 32, 32)).shape == (3, features) and len(looks.hash) == 64


# prompts

class Colours(nn.Module):
    words = torch.eye(3)
    def get_image_features(self, pixel_values): return pixel_values.mean((2, 3))
    def get_text_features(self, input_ids): return self.words[input_ids[:, 0]]

def read(images=None, text=None, **how):
    if images is not None: return {"pixel_values": torch.stack(images).float() / 255}
    return {"input_ids": torch.tensor([[("red", "green", "blue").index(t)] for t in text])}

def test_clip_score_by_hand():
    picture = lambda *rgb: torch.tensor(rgb).view(3, 1, 1).expand(3, 4, 4).float()
    images = torch.stack([picture(1, 0, 0), picture(1, 1, 0), picture(0, 1, 1)])
    assert clip_score(images, ["red"] * 3, Colours(),
                      read)["clip"] == pytest.approx(100 * (1 + math.sqrt(.5)) / 3, abs=1e-3)
    assert clip_score(images, ["red", "green", "blue"], Colours(),
                      read)["clip"] == pytest.approx(100 * (1 + 2 * math.sqrt(.5)) / 3, abs=1e-3)
    with pytest.raises(BadInput, match="3 images and 1 prompts"): clip_score(images, ["red"], Colours(), read)

def test_clip_score_of_a_negative_cosine_is_zero():
    class Against(Colours):
        def get_text_features(self, input_ids): return -self.words[input_ids[:, 0]]
    assert clip_score(torch.ones(2, 3, 4, 4), ["red", "blue"], Against(), read)["clip"] == 0

def test_clip_score_of_a_real_clip():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=CLIPTextConfig(vocab_size=50, eos_token_id=49, max_position_embeddings=8,
                                                            **small).to_dict(),
                                 vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **small).to_dict(),
                                 projection_dim=8)).train()
    ids = torch.tensor([[1, 5, 49], [1, 7, 49]])
    def processor(images=None, text=None, **how):
        return {"pixel_values": torch.stack(images).float()
                / 255} if images is not None else {"input_ids": ids[:len(text)]}
    images = (draw(2, 3, 16, 16) * 255).round() / 255
    got = clip_score(images, ["a", "b"], model, processor)
    assert model.training and got["extractor"] == weights_hash(model)
    with torch.no_grad(): out = model.eval()(input_ids=ids, pixel_values=images)
    cosine = out.logits_per_image.diag() / model.logit_scale.exp()
    assert got["clip"] == pytest.approx(100 * cosine.clamp(min=0).mean().item(), abs=1e-3)
