"A removal touches only modules that own what is removed, and one of nothing is the identity."
import pytest
import torch
from torch import nn

from pruning_bench import prune
from pruning_bench.core.inputs import forward
from pruning_bench.graph.groups import Channels
from pruning_bench.graph.surgery import cut, example_outputs, kept_slices


def values(model):
    "Every plain attribute of every module."
    kinds = int, float, str, tuple, list
    return {n: {k: v for k, v in vars(m).items() if isinstance(v, kinds)} for n, m in model.named_modules()}


class Scaled(nn.Module):
    "Its attribute `channels` is no width of its convolution."
    def __init__(self, into, out):
        super().__init__()
        self.conv, self.channels = nn.Conv2d(into, out, 3, padding=1), out
    def forward(self, x): return self.conv(x) * self.channels ** -.5


class OddHeads(nn.Module):
    "The joint projection holds two parts, not three, and `embed_dim` is a number of its own."
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = heads, width // heads, 99
        self.qkv, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)
    def forward(self, x):
        b, n, c = x.shape
        k, v = self.qkv(x).reshape(b, n, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(((k @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


PLAIN = {"other channels": (lambda: Scaled(3, 8), (2, 3, 6, 6)), "other heads": (OddHeads, (2, 5, 16)),
         "attention": (lambda: nn.TransformerEncoderLayer(16, 4, 32), (2, 5, 16)),
         "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1, groups=6)),
                          (2, 3, 6, 6)),
         "recurrence": (lambda: nn.LSTM(4, 6, 2), (2, 3, 4))}

@pytest.mark.parametrize("name", PLAIN)
def test_cutting_nothing_is_the_identity(name):
    make, shape = PLAIN[name]
    model, x = make().eval(), torch.randn(shape)
    before, answer, kinds = values(model), model(x), [type(m) for m in model.modules()]
    cut(model, {})
    assert values(model) == before and [type(m) for m in model.modules()] == kinds
    a, b = (t[0] if isinstance(t, tuple) else t for t in (answer, model(x)))
    assert torch.equal(a, b)

def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM
    return GptOssForCausalLM(GptOssConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                          num_local_experts=4, head_dim=8))

def qwen_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=96, hidden_size=64, intermediate_size=256, pad_token_id=0,
                                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                              num_experts=4, moe_intermediate_size=64, num_experts_per_tok=2,
                                              shared_expert_intermediate_size=64))

@pytest.mark.parametrize("make", [gpt_oss, qwen_moe])
def test_cutting_nothing_leaves_experts_and_their_configuration(make):
    model, batch = make().eval(), {"input_ids": torch.randint(3, 96, (2, 8))}
    before, config, answer = values(model), model.config.to_dict(), forward(model, batch).logits
    cut(model, {})
    assert values(model) == before and model.config.to_dict() == config
    assert torch.equal(forward(model, batch).logits, answer)

def test_a_configuration_that_named_another_width_keeps_it():
    model, batch = qwen_moe().eval(), {"input_ids": torch.randint(3, 96, (2, 8))}
    prune(model, "l1-filter", .5, data=[batch])
    assert model.config.intermediate_size == 256   # of layers that this model does not have
    assert forward(model, batch).logits.isfinite().all()

class Permuted(nn.Module):
    "A layer norm over the channels of an image."
    def __init__(self, width): super().__init__(); self.norm = nn.LayerNorm(width)
    def forward(self, x): return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

@pytest.mark.parametrize("into", [8, 64])   # in the second, the attribute equals a width that is cut
def test_an_attribute_of_a_module_in_which_nothing_was_removed_stays(into):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Permuted(8), nn.ReLU(), nn.Conv2d(8, into, 1), nn.Flatten(2),
                          nn.Unflatten(2, (8, 8)), Scaled(into, 64), nn.Flatten(), nn.Linear(64 * 64, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    plan = prune(model, "l1-filter", .5, data=x, skip=["6.*", "8.*"])
    assert list(plan.masks) == ["0.weight"] and model[0].out_channels == 4 and model[6].channels == 64

def test_an_attribute_that_the_code_computes_with_keeps_its_value():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Scaled(8, 8), nn.Conv2d(8, 2, 1)).eval()
    prune(model, "l1-filter", .5, data=torch.randn(2, 3, 6, 6))   # compared with the masked model
    assert model[2].conv.weight.shape[:2] == (4, 4) and model[2].channels == 8

def families():
    from pruning_bench.bench.model_builders import TIMM_MODELS, model_builders, transformers_model
    hugging = [n for n, f in model_builders().items() if f is transformers_model]
    slow = [pytest.param(f"timm:{n}", marks=pytest.mark.slow) for n in TIMM_MODELS]
    return hugging + slow

@pytest.mark.parametrize("name", families())
def test_cutting_nothing_is_the_identity_in_every_family(name):
    from pruning_bench.bench.model_builders import model_builders, timm_builders
    if name.startswith("timm:"): pytest.importorskip("timm")
    model, batch = (model_builders() | timm_builders())[name](name)
    answer = example_outputs(model, lambda: forward(model, batch))
    before = values(model)   # a forward pass may set attributes of its own
    config = getattr(model, "config", None) and model.config.to_dict()
    cut(model, {})
    assert values(model) == before and (config is None or model.config.to_dict() == config)
    assert all(map(torch.equal, answer, example_outputs(model, lambda: forward(model, batch))))

@pytest.mark.slow
@pytest.mark.parametrize("name", ["cait_xxs24_224", "crossvit_tiny_240", "pvt_v2_b0", "nf_regnet_b0",
                                  "tnt_s_patch16_224"])
def test_a_pruned_model_of_timm_halves_runs_and_trains(name):
    pytest.importorskip("timm")
    from pruning_bench.bench.model_builders import timm_model
    model, batch = timm_model(f"timm:{name}")
    space = Channels(model, [batch])
    inside = {p for g in space.groups.values() for p, _ in g.members}
    assert sum(p.numel() for n, p in model.named_parameters() if n in inside) > .4 * sum(
        p.numel() for p in model.parameters())
    if "regnet" not in name: assert any(g.heads for g in space.groups.values())
    assert .5 <= prune(model, "rand-struct", {"macs": .5}, data=[batch]).budget["achieved"] < .52
    model(batch).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize("most", [1, 2, 3])
def test_experts_of_any_width_of_the_stream_run(most):
    model, batch = qwen_moe().eval(), {"input_ids": torch.randint(3, 96, (2, 8))}
    stream = next(g for g in Channels(model, [batch], residual=True).groups.values() if g.residual)
    kept = torch.arange(len(stream)) >= most   # a grouped product needs rows of 16 bytes
    cut(model, kept_slices(model, {stream.name: stream}, {stream.name: kept}))
    assert forward(model, batch).logits.isfinite().all() and model.config.hidden_size == 64 - most

class Cached(nn.Module):
    "Adds biases that it computes once, as attention modules of several libraries do."
    def __init__(self, width): super().__init__(); self.bias, self.known = nn.Parameter(torch.randn(width)), {}

    def forward(self, x):
        if str(x.device) not in self.known: self.known[str(x.device)] = 2 * self.bias
        return x + self.known[str(x.device)]

def test_tensors_that_a_module_computed_for_its_old_width_are_computed_again():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), Cached(8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 6)
    model(x)
    assert model[1].known["cpu"].shape == (8,)
    prune(model, "l1-filter", .5, data=x)   # compared with the masked model
    assert model[0].out_features == 4 and model(x).shape == (3, 4) and model[1].known["cpu"].shape == (4,)

def test_dictionaries_that_hold_something_else_stay():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 6)
    model[0].names = {"a": 1}
    prune(model, "l1-filter", .5, data=x)
    assert model[0].names == {"a": 1} and model[0]._parameters.keys() == {"weight", "bias"}
