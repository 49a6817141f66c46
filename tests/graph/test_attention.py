"Heads as units: removed equals unread on every transformer, modules and configurations remember what is left."
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers as tf
from torch import nn

from pruning_bench import BadInput, load_plan, prune
from pruning_bench.core.inputs import forward
from pruning_bench.graph.attention import Heads, head_counts, multihead_forward
from pruning_bench.graph.model_configs import config_mismatches
from pruning_bench.structured.heads import gate_gradient
from pruning_bench.graph.groups import Channels, dependency_groups
from pruning_bench.graph.surgery import cut, removed_indices, kept_slices
from pruning_bench.graph.trace import tensors_in

tf.logging.set_verbosity_error()
IDS = {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))}
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SWIN = torchvision.models.swin_transformer
TOKENS = dict(bos_token_id=1, eos_token_id=2)

def llama(**more):
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**{**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=8, num_key_value_heads=4), **TOKENS, **more}))
def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
                                                          num_attention_heads=4, intermediate_size=48))
def gpt2(**more):
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{**dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
                                               **TOKENS, **more}))
def opt(**more):
    return tf.OPTForCausalLM(
        tf.OPTConfig(**{**dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                               word_embed_proj_dim=32, max_position_embeddings=64), **more}))
def vit(**more):
    return tf.ViTForImageClassification(
        tf.ViTConfig(**{**dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                               image_size=32, patch_size=8), **more}))
def hf_swin():
    return tf.SwinForImageClassification(tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2],
                                                       num_heads=[2, 4], window_size=4))
def mixtral(kernel="eager"):
    model = tf.MixtralForCausalLM(tf.MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=24,
                                                   num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                                   num_local_experts=4, num_experts_per_tok=2))
    model.config._experts_implementation = kernel
    return model
def xlnet():
    return tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48,
                                              use_mems_eval=False, **TOKENS))
def swin_v2():
    return SWIN.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], block=SWIN.SwinTransformerBlockV2,
                                downsample_layer=SWIN.PatchMergingV2)
def unet(**more):
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(**{**dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
                                          cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
                                          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")), **more})
def noisy(size, width):
    return {"sample": torch.randn(2, 4, size, size), "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(2, 7, width)}

SMALL = {"bert": (bert, IDS), "gpt2": (gpt2, IDS), "opt": (opt, IDS), "llama": (llama, IDS),
         "tied llama": (lambda: llama(tie_word_embeddings=True), IDS), "vit": (vit, {"pixel_values": IMAGE}),
         "mixtral": (mixtral, IDS), "xlnet": (xlnet, {**IDS, "token_type_ids": torch.arange(24).view(2, 12) // 5 % 2}),
         "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64), IMAGE),
         "swin": (lambda: torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [4, 4]), IMAGE)}
LARGE = {"swin v2": (swin_v2, IMAGE), "swin of transformers": (hf_swin, {"pixel_values": IMAGE}),
         "maxvit": (lambda: torchvision.models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.),
                    torch.randn(2, 3, 64, 64)), "conditional unet": (unet, noisy(8, 32))}
WIDE = {n: ((lambda n=n: getattr(torchvision.models, n)(weights=None)), torch.randn(1, 3, 224, 224))
        for n in ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")}
WIDE |= {"gpt2 wide": (lambda: gpt2(n_embd=768, n_head=12), IDS),
         "opt wide": (lambda: opt(hidden_size=768, num_attention_heads=12, ffn_dim=3072, word_embed_proj_dim=768), IDS),
         "vit wide": (lambda: vit(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
                      {"pixel_values": IMAGE}),
         "llama wide": (lambda: llama(hidden_size=1024, intermediate_size=2816, num_attention_heads=16), IDS),
         "unet wide": (lambda: unet(block_out_channels=(128, 256), cross_attention_dim=256), noisy(8, 256))}
models = [pytest.param(m, id=n) for n, m in SMALL.items()] + [pytest.param(m, id=n, marks=pytest.mark.slow)
                                                              for n, m in LARGE.items()]
wide = [pytest.param(m, id=n, marks=pytest.mark.slow) for n, m in WIDE.items()]

def ready(case):
    "In double precision, evaluation mode, with norms and biases that do something."
    torch.manual_seed(0)
    model, batch = case[0](), case[1]
    for p in model.parameters():
        if p.std() == 0: nn.init.normal_(p, std=.2)
    for m in model.modules():
        if getattr(m, "running_var", None) is not None: m.running_var.uniform_(.5, 2); m.running_mean.normal_()
    double = lambda t: t.double() if t.is_floating_point() else t
    return model.double().eval(), {k: double(v) for k, v in batch.items()} if isinstance(batch, dict) else double(batch)

def out(model, batch):
    with torch.no_grad(): return tensors_in(forward(model, batch))[0]

def far(a, b): return ((a - b).abs().max() / b.abs().max()).item()

def some(groups, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(len(g), generator=generator).argsort() < max(1, len(g) // 2) for n, g in groups.items()}

def tiny(width=16, heads=4, **more):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, width)
            self.attend = nn.MultiheadAttention(width, heads, batch_first=True, **more)
            self.head = nn.Linear(width, 3)
        def forward(self, x): h = self.embed(x); return self.head((h + self.attend(h, h, h)[0]).mean(1))
    torch.manual_seed(0)
    return Net().eval(), torch.randn(4, 6, 5)


@pytest.mark.parametrize("case", models + wide)
def test_removed_equals_unread(case):
    model, batch = ready(case)
    space = Channels(model, [batch])
    assert any(g.heads for g in space.groups.values()) and all(g.exact for g in space.groups.values())
    kept, unread = some(space.groups), copy.deepcopy(model)
    for (p, d), lost in removed_indices(space.groups, kept).items():
        if any((p, d) in g.consumes for g in space.groups.values()):
            unread.get_parameter(p).data.index_fill_(d, torch.as_tensor(lost), 0)
    reference = out(unread, batch)
    space.apply({n: (None, k) for n, k in kept.items()})
    space.remove()
    assert far(out(model, batch), reference) < 1e-5   # the RMS norm of transformers works in single precision
    model.train()
    sum(t.square().mean() for t in tensors_in(forward(model, batch)) if t.requires_grad).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for n, p in model.named_parameters()
               if n in space.slices())

@pytest.mark.parametrize("case", models)
def test_a_stream_is_not_exact_and_any_order_of_its_channels_is_the_same(case):
    model, batch = ready(case)
    groups = {n: g for n, g in Channels(model, [batch], residual=True).groups.items() if g.residual}
    assert groups and any("norm" in g.inexact_reason or "mean" in g.inexact_reason for g in groups.values())
    other = copy.deepcopy(model)
    order = {n: torch.randperm(len(g), generator=torch.Generator().manual_seed(3)) for n, g in groups.items()}
    kept = {n: torch.arange(len(g)) >= len(g) // 4 for n, g in groups.items()}
    named = dict(other.named_parameters()) | dict(other.named_buffers())
    for n, g in groups.items():
        for (p, d), index in g.members.items():
            named[p].data.index_copy_(d, torch.as_tensor(index.ravel()),
                                      named[p].data.index_select(d, torch.as_tensor(index[order[n]].ravel())))
    assert far(out(other, batch), out(model, batch)) < 1e-5
    cut(model, kept_slices(model, groups, kept))
    cut(other, kept_slices(other, groups, {n: kept[n][order[n]] for n in groups}))
    assert far(out(other, batch), out(model, batch)) < 1e-5

@pytest.mark.parametrize("case", [pytest.param(SMALL[n], id=n) for n in ("gpt2", "llama", "torchvision vit", "swin")])
def test_nothing_removed_is_nothing_changed_and_a_plan_rebuilds(case, tmp_path):
    model, batch = ready(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    config = getattr(model, "config", None)
    assert prune(model, "magnitude", 0., data=[batch], space="channels").slices == {}
    assert [type(m) for m in model.modules()] == kinds
    assert getattr(model, "config", None) is config
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    fresh = copy.deepcopy(model)
    prune(model, "magnitude", .5, data=[batch], space="channels").save(tmp_path / "plan")
    load_plan(tmp_path / "plan").apply(fresh)
    assert torch.equal(out(fresh, batch), out(model, batch))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(fresh)))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(out(twin, batch), out(model, batch))

def test_the_rows_and_columns_of_a_head_by_hand():
    model, x = tiny()
    [heads] = [g for g in dependency_groups(model, x).groups if g.heads]
    members = {k: v[1].tolist() for k, v in heads.members.items()}
    rows = [*range(4, 8), *range(20, 24), *range(36, 40)]
    assert members == {("attend.in_proj_weight", 0): rows, ("attend.in_proj_bias", 0): rows,
                       ("attend.out_proj.weight", 1): [*range(4, 8)]}
    assert len(heads) == 4

def test_a_crowd_is_one_key_head_and_its_queries():
    model = llama().eval()
    heads = next(g for g in dependency_groups(model, IDS).groups if g.heads)
    p = "model.layers.0.self_attn."
    second = {k[0].removeprefix(p): v[1].tolist() for k, v in heads.members.items()}
    assert second == {"q_proj.weight": [*range(8, 16)], "k_proj.weight": [*range(4, 8)],
                      "v_proj.weight": [*range(4, 8)], "o_proj.weight": [*range(8, 16)]}

def test_one_key_head_is_nothing_to_choose():
    model = llama(num_key_value_heads=1)
    c = dependency_groups(model, IDS)
    assert all(f"model.layers.{i}.self_attn.{n}_proj.weight" in c.frozen for i in (0, 1) for n in "qk")
    assert not any(g.heads for g in c.groups if not g.residual)
    with pytest.raises(BadInput, match="no attention heads"): prune(model, space="heads", data=[IDS])
    with pytest.raises(BadInput, match="no attention heads"):
        Heads(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), [torch.randn(3, 4)])

def test_experts_stay_with_a_reason_and_their_channels_go():
    c = dependency_groups(mixtral(), IDS)
    assert "router chooses" in c.frozen["model.layers.0.mlp.gate.weight"][1]
    [group] = [g for g in c.groups if g.name.startswith("model.layers.0.mlp.experts")]
    assert {k: v[3].tolist() for k, v in group.members.items()} == {
        ("model.layers.0.mlp.experts.gate_up_proj", 1): [3, 27], ("model.layers.0.mlp.experts.down_proj", 2): [3]}
    model = mixtral("grouped_mm").eval()
    plan = prune(model, "l1-filter", .2, data=[IDS])
    assert plan.density < 1
    assert model.model.layers[0].mlp.experts.intermediate_dim == 19 and model.config._experts_implementation == "eager"
    assert forward(model, IDS).logits.isfinite().all()

def test_norms_that_all_heads_share_stay():
    model = tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                               num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                               **TOKENS)).eval()
    heads = next(g for g in dependency_groups(model, IDS).groups if g.heads)
    assert len(heads) == 2 and not any("norm" in p for p, _ in heads.members)
    prune(model, "magnitude", .5, space="heads", data=[IDS])
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (8,) and config_mismatches(model) == []

@pytest.mark.parametrize("options",
                         [{}, {"need_weights": False}, {"average_attn_weights": False},
                          {"attn_mask": torch.ones(5, 6).triu(2).bool()}, {"attn_mask": torch.randn(12, 5, 6).double()},
                          {"key_padding_mask": torch.arange(6).expand(3, 6) > 3, "need_weights": False},
                          {"attn_mask": torch.randn(5, 6).double(),
                           "key_padding_mask": torch.arange(6).expand(3, 6) > 3}])
@pytest.mark.parametrize("made", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 12, "vdim": 20}])
def test_the_free_form_is_the_formula_of_torch(made, options):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(16, 4, **made).double().eval()
    q, k, v = torch.randn(5, 3, 16).double(), torch.randn(6, 3, m.kdim).double(), torch.randn(6, 3, m.vdim).double()
    if m.batch_first: q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    for a, b in zip(m(q, k, v, **options), multihead_forward(m, q, k, v, **options)):
        assert a is b is None or torch.allclose(a, b, atol=1e-12)

def test_free_attention_without_a_batch():
    m, x = nn.MultiheadAttention(16, 4).double().eval(), torch.randn(5, 16).double()
    for a, b in zip(m(x, x, x), multihead_forward(m, x, x, x)): assert a.shape == b.shape and torch.allclose(a, b)

@pytest.mark.parametrize("nested", [False, True])
def test_encoder_layers_take_no_fused_path_around_it(nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.)
    model = nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested),
                          nn.Linear(16, 3)).eval()
    x = torch.randn(2, 6, 5)
    prune(model, "magnitude", .5, space="heads", data=[x])
    attend = model[1].layers[0].self_attn
    assert attend.num_heads == 2 and isinstance(attend, nn.MultiheadAttention) and attend.embed_dim == 16
    with torch.no_grad(): a = model(x)
    assert torch.allclose(a, model.train()(x), atol=1e-5)

def test_a_cut_model_can_be_cut_again():
    model, x = tiny()
    for left in (3, 2, 1):
        prune(model, "magnitude", 1 / (left + 1), space="heads", data=[x])
        assert model.attend.num_heads == left == head_counts(model.attend)[0]

def test_one_value_for_all_layers_is_written_down_and_read_back(tmp_path):
    config = tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=8, num_key_value_heads=4, **TOKENS)
    model, neighbour = tf.LlamaForCausalLM(config).eval(), tf.LlamaForCausalLM(config)
    prune(model, "magnitude", .5, space="channels", data=[IDS])
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim,
            model.config.intermediate_size) == (4, 2, 4, 24)
    assert config_mismatches(model) == []
    assert neighbour.config.num_attention_heads == 8
    assert config_mismatches(neighbour) == [] and model.model.layers[0].self_attn.config is model.config
    model.save_pretrained(tmp_path)
    assert torch.equal(out(tf.LlamaForCausalLM.from_pretrained(tmp_path).eval(), IDS), out(model, IDS))

def test_what_no_configuration_can_say_is_said():
    model = bert().eval()
    prune(model, "magnitude", .25, space="heads", data=[IDS])
    assert "multiple of the number of attention heads" in config_mismatches(model)[0]
    with pytest.raises(BadInput, match="no configuration"): config_mismatches(tiny()[0])

def test_generation_with_a_cache_after_unequal_cuts():
    torch.manual_seed(0)
    model = llama().eval()
    groups = {g.name: g for g in dependency_groups(model, IDS).groups if g.heads}
    masks = torch.tensor([[True, False, False, False], [True, True, False, True]])
    cut(model, kept_slices(model, groups, dict(zip(groups, masks))))
    a, b = (model.generate(IDS["input_ids"][:1], max_new_tokens=8, do_sample=False, use_cache=c, pad_token_id=0)
            for c in (True, False))
    assert torch.equal(a, b)
    assert "model.layers.0.self_attn.q_proj.weight" in config_mismatches(model)
    assert model.config.num_key_value_heads == 4
    assert [l.self_attn.num_key_value_groups for l in model.model.layers] == [2, 2]

def test_a_gate_that_nobody_hears_goes_first():
    model, x = tiny()
    batch = (x, torch.tensor([0, 1, 2, 0]))
    with torch.no_grad(): model.attend.out_proj.weight[:, 4:8] = 0
    read = gate_gradient(Heads(model, [batch]), [batch], F.cross_entropy)["attend.in_proj_weight"]
    assert read[1] == 0 and (read[[0, 2, 3]] > 0).all()
    before = out(model, x)
    plan = prune(model, "attention-heads", .25, data=[batch], loss=F.cross_entropy)
    assert plan.masks["attend.in_proj_weight"].tolist() == [True, False, True, True]
    assert torch.allclose(out(model, x), before, atol=1e-5)

def test_gates_do_not_depend_on_how_examples_are_batched():
    model, x = tiny()
    y = torch.tensor([0, 1, 2, 0])
    whole, parts = (gate_gradient(Heads(model, [x]), b, F.cross_entropy)["attend.in_proj_weight"]
                    for b in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]))
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)

def test_every_layer_of_a_deep_llama_is_found_in_two_passes():
    model = llama(hidden_size=512, intermediate_size=1376, num_hidden_layers=16, num_attention_heads=16,
                  num_key_value_heads=4)
    passes = []
    model.register_forward_hook(lambda *seen: passes.append(1))
    assert sum(g.heads for g in dependency_groups(model, IDS).groups) == 16
    assert len(passes) <= 2   # one in evaluation, one in training mode; `make bench` times them

def test_heads_along_an_open_axis_are_no_guess():
    vit = torchvision.models.VisionTransformer(32, 8, 1, 4, 64, 128).eval()
    bert = tf.BertModel(tf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                      intermediate_size=48)).eval()
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32,
                                            bos_token_id=None, eos_token_id=None)).eval()
    told = lambda model, batch: [g.assumption for g in dependency_groups(model, batch).groups if g.heads]
    words = {"input_ids": torch.arange(24).view(2, 12)}
    assert told(vit, torch.randn(1, 3, 32, 32)) == told(bert, words) == [""]
    assert told(gpt2, words) == ["`split` cuts it at fixed places"]   # its code knows how wide queries are
