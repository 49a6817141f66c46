"Image tokens are dropped exactly, in every kind of vision transformer, and the model is itself again afterwards."
import copy, pickle

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from transformers import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from pruning_bench.bench.measure.size import macs
from pruning_bench.core.inputs import BadInput
from pruning_bench.core.policy import load_policy, make_policy
from pruning_bench.core.runtime_space import RuntimeSpace
from pruning_bench.core.score import Score
from pruning_bench.inference.image_tokens import ImageTokens, class_row, default_places, kept_patches

SIZES = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=8,
             patch_size=2, num_labels=5)

def vit(**more): return ViTForImageClassification(ViTConfig(**{**SIZES, **more}))
def deit(): return DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES))
def torchvision_vit(dropout=0., attention_dropout=0.):
    model = VisionTransformer(image_size=8, patch_size=2, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32,
                              num_classes=5, dropout=dropout, attention_dropout=attention_dropout)
    nn.init.normal_(model.heads.head.weight)   # it starts at zero
    return model
def wrapped(): return nn.Sequential(nn.InstanceNorm2d(3), torchvision_vit())

def bare(): return ViTModel(ViTConfig(**SIZES))
def deit_classifier(): return DeiTForImageClassification(DeiTConfig(**SIZES))

MODELS = {f.__name__: f for f in (vit, bare, deit, deit_classifier, torchvision_vit, wrapped)}
each = pytest.mark.parametrize("kind", MODELS)

def made(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()

def pictures(n=3, side=8, seed=0): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))

def out(model, x, **how):
    y = model(x, **how)
    return y if isinstance(y, torch.Tensor) else y.logits if "logits" in y else y.last_hidden_state[:, 0]

def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
def policy(model, keep=.5, score="attention_received", **more):
    return make_policy(model, "imagetokens", score, keep, **more)


# what is dropped

@each
def test_the_space_fits_the_protocol(kind):
    space = ImageTokens(made(kind))
    assert isinstance(space, RuntimeSpace) and set(space.shapes().values()) == {(16,)} and len(space.names()) == 2

@each
@pytest.mark.parametrize("score", ["attention_received", "random"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_number_of_tokens_is_exact_and_the_sequence_shortens(kind, score, n):
    model, lengths = made(kind), []
    space = ImageTokens(model, [0, 1, 2])
    last = [m for m in model.modules() if type(m).__name__ in ("ViTLayer", "DeiTLayer", "EncoderBlock")]
    for block in last: block.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    with policy(model, [.75, .5, .3], score, after=[0, 1, 2]).on(model) as masks: out(model, pictures(n))
    assert [m.sum(1).tolist() for m in masks.values()] == [[12] * n, [6] * n, [2] * n]
    assert lengths == [space.first + k for k in (16, 12, 6, 2)]

def test_it_equals_a_model_written_by_hand():
    "Attention in full, gathering in full, block by block."
    model, x = made("vit").double(), pictures().double()
    def attention(block, h):
        a, h = block.attention, block.layernorm_before(h)
        q, k = (f(h).view(*h.shape[:2], 2, 8).transpose(1, 2) for f in (a.q_proj, a.k_proj))
        return (q @ k.transpose(-1, -2) / 8 ** .5).softmax(-1)
    h = model.vit.embeddings(x)
    for i, block in enumerate(model.vit.layers):
        a = attention(block, h)[:, :, 0, 1:].mean(1)
        h = block(h)
        if i not in (1, 2): continue
        best = a.topk(a.shape[1] // 2).indices.sort().values + 1
        h = h.gather(1, torch.cat([torch.zeros_like(best[:, :1]), best], 1)[..., None].expand(-1, -1, 16))
    expected = model.classifier(model.vit.layernorm(h)[:, 0])
    with policy(model, after=[1, 2]).on(model): assert torch.allclose(out(model, x), expected, atol=1e-10)

@each
def test_the_numbers_are_the_model_s_own_attention(kind):
    model, seen = made(kind), {}
    def keep(name, w, stats):
        seen[name] = stats.class_attention
        return torch.ones_like(w, dtype=torch.bool)
    space = ImageTokens(model, [0])
    with space.install(keep, {"class_attention"}): out(model, pictures())
    if kind in ("torchvision_vit", "wrapped"):
        inputs, block = [], space.places[space.names()[0]]
        handle = block.ln_1.register_forward_hook(lambda m, a, y: inputs.append(y))
        out(model, pictures())
        handle.remove()
        own = block.self_attention(*inputs * 3, average_attn_weights=False)[1]
    else:
        model.set_attn_implementation("eager")
        own = model(pictures(), output_attentions=True).attentions[0]
    assert torch.allclose(seen[space.names()[0]], own[:, :, 0, space.first:], atol=1e-5)

@each
def test_images_do_not_disturb_each_other(kind):
    model, x = made(kind).double(), pictures(4).double()
    with policy(model).on(model) as masks:
        together, kept = out(model, x), kept_patches(masks)
        for i in range(4):
            assert torch.allclose(out(model, x[i:i+1]), together[i:i+1], atol=1e-10)
            assert all(torch.equal(k, kept[n][i:i+1]) for n, k in kept_patches(masks).items())
    assert any(not torch.equal(k[0], k[1]) for k in kept.values())   # and each has its own patches

def test_kept_patches_by_hand():
    a = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]]).bool()
    b = torch.tensor([[0, 1, 1], [1, 0, 1]]).bool()
    kept = kept_patches({"a": a, "b": b})
    assert kept["a"].tolist() == [[0, 2, 3], [1, 2, 3]] and kept["b"].tolist() == [[2, 3], [1, 3]]

def test_any_registered_statistic_can_be_read():
    model = made("vit")
    def distance(w, stats): return (stats.hidden - stats.hidden.mean(1, keepdim=True)).norm(dim=-1)
    far = Score(distance, "far", needs=frozenset({"hidden"}), unit="token")
    with policy(model, .5, far).on(model) as masks: out(model, pictures())
    assert masks["vit.layers.1"].sum(1).tolist() == [8, 8, 8]

def test_the_share_per_place_can_come_from_scores():
    model = made("vit")
    shares = policy(model, .5, allocate="global", data=[pictures(8)]).shares
    assert sum(shares.values()) / 2 == .5 and not hooks(model)


# what it does not disturb

@each
def test_keeping_everything_is_the_identity(kind):
    model = made(kind)
    dense = out(model, pictures())
    with policy(model, 1.).on(model): assert torch.equal(out(model, pictures()), dense)
    with policy(model, .99).on(model): assert torch.equal(out(model, pictures()), dense)   # 16 of 16

@each
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_model_is_itself_again(kind, error):
    model = made(kind)
    dense, before = out(model, pictures()), {n: set(vars(m)) for n, m in model.named_modules()}
    try:
        with policy(model, .25).on(model):
            assert not torch.equal(out(model, pictures()), dense)
            if error: raise error
    except KeyboardInterrupt: pass
    assert torch.equal(out(model, pictures()), dense) and not hooks(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before

@each
def test_copies_made_inside_are_plain(kind):
    model = made(kind)
    dense, p = out(model, pictures()), policy(model, .25)
    with p.on(model):
        inside, copied, pickled = out(model, pictures()), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert torch.equal(out(other, pictures()), dense)
        with p.on(other): assert torch.equal(out(other, pictures()), inside)

@each
def test_a_second_policy_is_refused(kind):
    model = made(kind)
    p = policy(model, .25)
    with p.on(model):
        inside = out(model, pictures())
        with pytest.raises(BadInput, match="already"), p.on(model): pass
        assert torch.equal(out(model, pictures()), inside)


# how models are run

@each
def test_multiplications_go_down_as_tokens_do(kind):
    model = made(kind)
    costs = []
    for keep in (1., .75, .5, .25):
        with policy(model, keep, "random").on(model): costs.append(macs(model, pictures()))
    dense = macs(model, pictures())
    assert costs[0] == dense and costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    first = ImageTokens(model).first
    def of_block(n): return n * (4 * 16 ** 2 + 2 * 16 * 32) + 2 * n ** 2 * 16   # projections, perceptron, attention
    assert dense - costs[2] == sum(of_block(first + 16) - of_block(first + left) for left in (8, 4))

@each
def test_gradients_flow(kind):
    model = made(kind).train()
    with policy(model).on(model): out(model, pictures()).square().sum().backward()
    used = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("3" in n for n in used) and any("patch" in n or "conv_proj" in n for n in used)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each
def test_half_precision(kind, dtype):
    model = made(kind).to(dtype)
    with policy(model).on(model) as masks, torch.no_grad(): y = out(model, pictures().to(dtype))
    assert y.dtype == dtype and y.isfinite().all() and [m.sum(1).tolist() for m in masks.values()] == [[8] * 3, [4] * 3]

@each
def test_autocast_and_inference_mode(kind):
    model = made(kind)
    with policy(model).on(model) as masks, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out(model, pictures())
    assert [m.sum(1).tolist() for m in masks.values()] == [[8] * 3, [4] * 3]

@pytest.mark.parametrize("make", [lambda: vit(attention_probs_dropout_prob=.5),
                                  lambda: torchvision_vit(attention_dropout=.5)])
def test_dropout_of_attention_does_not_reach_the_choice(make):
    torch.manual_seed(0)
    model = make()
    for _ in range(2):
        kept = []
        for training in (True, False):
            with policy(model, after=[0]).on(model) as masks: out(model.train(training), pictures())
            kept.append(kept_patches(masks))
        assert all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])

def test_the_mode_is_the_caller_s():
    model = made("vit").train()
    with policy(model, allocate="global", data=[pictures()]).on(model): assert all(m.training for m in model.modules())

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation(attention):
    model = made("vit")
    model.set_attn_implementation(attention)
    with policy(model).on(model): y = model(pictures(), output_hidden_states=True)
    assert [h.shape[1] for h in y.hidden_states] == [17, 17, 9, 5, 5]

def test_other_image_sizes():
    model = made("vit")
    for side, kept in ((4, 1), (8, 4), (12, 9), (16, 16)):
        with policy(model).on(model) as masks: y = out(model, pictures(2, side), interpolate_pos_encoding=True)
        assert [m.sum(1).tolist() for m in masks.values()] == [[2 * kept] * 2, [kept] * 2] and y.shape == (2, 5)

def test_gradient_checkpointing_trains_under_the_policy():
    plain, checkpointed = made("vit").train(), made("vit").train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        with policy(model).on(model): out(model, pictures()).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        if a.grad is not None: assert torch.allclose(a.grad, b.grad, atol=1e-5)

def test_an_empty_batch():
    model = made("torchvision_vit")
    with policy(model).on(model): assert out(model, pictures(3)[:0]).shape == (0, 5)


# refusals

@pytest.mark.parametrize("model, says", [
    (lambda: nn.Linear(3, 3), "no image tokens"), (lambda: nn.TransformerEncoderLayer(8, 2), "no image tokens"),
    (lambda: ViTForMaskedImageModeling(ViTConfig(**SIZES)), "every token"), (lambda: torch.compile(vit()), "compile"),
    (lambda: nn.DataParallel(vit()), "copies the model"),
    (lambda: nn.ModuleList([vit(), vit()]), "2 vision transformers"), (lambda: vit(num_hidden_layers=1), "after=")])
def test_models_that_are_refused(model, says):
    model = model()
    with pytest.raises(BadInput, match=says): policy(model)
    assert not hooks(model)

@pytest.mark.parametrize("after", [[3], [4], [-1], [0, 0], [], [.5], [True], ["1"]])
def test_places_that_are_refused(after):
    with pytest.raises(BadInput, match="after="): policy(made("vit"), after=after)

def test_an_attention_mask_is_refused_and_nothing_is_left_behind():
    model = made("vit")
    dense = out(model, pictures())
    with pytest.raises(BadInput, match="attention mask"), policy(model).on(model):
        model(pictures(), attention_mask=torch.tensor([[1] * 16 + [0]] * 3))
    assert torch.equal(out(model, pictures()), dense)

def test_a_share_below_one_token():
    model = made("vit")
    with pytest.raises(BadInput, match="keeps none"), policy(model, .01).on(model): out(model, pictures())

def test_scores_of_weights_are_refused():
    with pytest.raises(BadInput, match="ranks weights"): policy(made("vit"), score="magnitude")

def test_a_policy_of_another_model():
    p = policy(made("vit"))
    with pytest.raises(BadInput, match="another architecture"), p.on(made("torchvision_vit")): pass

@pytest.mark.parametrize("depth, places", [(12, [3, 6, 9]), (24, [6, 12, 18]), (4, [1, 2]), (2, [0]), (1, [])])
def test_default_places(depth, places): assert default_places(depth) == places

def test_saved_and_loaded(tmp_path):
    model = made("vit")
    p = policy(model, [.75, .25], after=[0, 2])
    back = load_policy(p.save(tmp_path/"policy"))
    with p.on(model): a = out(model, pictures())
    with back.on(model): assert torch.equal(out(model, pictures()), a) and back == p

def test_class_row_sums_to_one():
    q = torch.randn(2, 5, 8)
    assert torch.allclose(class_row(q, torch.randn(2, 5, 8), 2).sum(-1), torch.ones(2, 2))
