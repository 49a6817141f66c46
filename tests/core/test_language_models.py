"Parameters of language models that are no plain layer: experts, packed projections, output heads, adapters."
import warnings

import pytest
import torch
from torch import nn

from pruning_bench import BadInput, Plan, prune
from pruning_bench.core.mask import masks_of
from pruning_bench.core.plan import load_plan
from pruning_bench.core.space import Weights, prunable_layers
from pruning_bench.core.stats import act_norm, gram

transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = {
    "Mixtral": dict(num_local_experts=4),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "GptOss": dict(num_local_experts=4, head_dim=8),
    "Qwen2Moe": dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "GraniteMoe": dict(num_local_experts=4, num_experts_per_tok=2)}


def mixture(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **EXPERTS[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def ids():
    return torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_pruned(family, method):
    model = mixture(family)
    plan = prune(model, method, .5, data=[{"input_ids": ids()}])
    stacks = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    assert stacks and stacks.keys() <= plan.masks.keys()
    assert all((p == 0).float().mean() == .5 for p in stacks.values())
    fresh = mixture(family)
    plan.apply(fresh)
    assert all(torch.equal(m, masks_of(fresh)[n]) for n, m in masks_of(model).items())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_expert_is_calibrated_on_its_own_tokens(implementation):
    "A reference with hooks: the tokens of an expert are those that its router sends to it."
    model = mixture("Mixtral")
    model.set_experts_implementation(implementation)
    seen = {}
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], chosen=args[1]))
    model(ids())
    x, chosen = seen["x"].flatten(0, -2), seen["chosen"]
    space, name = Weights(model), "model.layers.0.mlp.experts.gate_up_proj"
    norms, moments = (s(space, [{"input_ids": ids()}])[name] for s in (act_norm, gram))
    assert model.config._experts_implementation == implementation
    assert norms.shape == (4 * 128, 32) and moments.shape == (4, 32, 32)
    for e in range(4):
        tokens = x[(chosen == e).any(-1)]
        assert 0 < len(tokens) < len(x)
        assert torch.allclose(norms.view(4, 128, 32)[e], tokens.norm(dim=0).expand(128, 32), rtol=1e-4)
        assert torch.allclose(moments[e], tokens.T @ tokens / len(tokens), rtol=1e-3, atol=1e-5)


def test_what_stays_dense_is_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.own = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x): return (self.linear(x) @ self.own).sum(0)

    with pytest.warns(UserWarning, match=r"75% of the weights .* 'own'"): prune(Net(), "magnitude", .5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(Net(), "magnitude", .5, skip="own")
        prune(mixture("Mixtral"), "magnitude", .5)


@pytest.mark.parametrize("head", [
    lambda: nn.ModuleList(nn.Linear(8, 96) for _ in range(3)), lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 96)),
    lambda: nn.ParameterDict({"table": nn.Parameter(torch.zeros(96, 8))}), lambda: [nn.Linear(8, 96)], lambda: None])
def test_an_output_head_of_any_kind_is_left_alone(head):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), head()

        def get_output_embeddings(self): return self.head

    assert list(prunable_layers(Net())) == ["body.weight"]


def test_a_codec_language_model_with_several_heads():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, num_codebooks=2,
        max_position_embeddings=64, pad_token_id=90, bos_token_id=90)
    model = transformers.MusicgenForCausalLM(config)
    prune(model, "magnitude", .5)
    assert all((head.weight != 0).all() for head in model.lm_heads)


def adapted(dropout=0.):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_adapters_are_left_alone(method):
    model = adapted()
    plan = prune(model, method, .5, data=[{"input_ids": ids()}])
    assert len(plan.masks) == 14 and not any("lora" in n for n in plan.masks)


@pytest.mark.parametrize("dropout", [0., .1])
def test_channels_are_cut_with_what_adapters_write_and_read(dropout):
    "The rank of an adapter stays; its outer sides follow the layer, and merging gives the same outputs."
    model, data = adapted(dropout), [{"input_ids": ids(), "use_cache": False}]
    for n, p in model.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=.1)   # as after a training
    plan = prune(model, "l1-filter", .5, data=data)
    mlp = model.base_model.model.model.layers[0].mlp
    wrote, read = mlp.gate_proj.lora_B["default"].weight, mlp.down_proj.lora_A["default"].weight
    assert mlp.gate_proj.base_layer.weight.shape == (32, 32) and wrote.shape == read.shape[::-1] == (32, 4)
    assert plan.masks and not any("lora" in n for n in plan.masks)
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {4}
    with torch.no_grad():
        before = model.eval()(**data[0]).logits
        assert torch.allclose(model.merge_and_unload()(**data[0]).logits, before, atol=1e-5)


def llama(**other):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 4, **other}))

OTHERS = [dict(num_hidden_layers=3), dict(num_hidden_layers=6), dict(num_key_value_heads=4),
          dict(intermediate_size=128), dict(num_attention_heads=2, head_dim=16)]
REQUESTS = {"magnitude": .5, "l1-filter": .3, "attention-heads": .5, "block-influence": .5, "cka-layer": .5,
            "truncated-svd": .5}

@pytest.mark.parametrize("method", REQUESTS)
def test_a_plan_fits_only_a_model_of_the_same_sizes(method, tmp_path):
    data = [{"input_ids": ids(), "use_cache": False}]
    pruned = llama()
    plan = prune(pruned, method, REQUESTS[method], data=data)
    plan.save(tmp_path / "plan")
    for plan in (plan, load_plan(tmp_path / "plan")):   # the second one is all that another process knows
        for sizes in OTHERS:
            other = llama(**sizes)
            before = {n: t.clone() for n, t in other.state_dict().items()}
            with pytest.raises(BadInput, match="made for another architecture"): plan.apply(other)
            assert not masks_of(other) and before.keys() == other.state_dict().keys()
            assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
        fresh = llama()
        plan.apply(fresh)
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (fresh, pruned)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("sizes", [dict(num_hidden_layers=3), dict(num_hidden_layers=6), dict(num_key_value_heads=4)])
def test_a_plan_without_the_shapes_of_its_model_is_checked_group_by_group(sizes):
    plan, other = prune(llama(), "magnitude", .5), llama(**sizes)
    with pytest.raises(BadInput, match="made for another architecture"):
        Plan(plan.space, plan.masks, plan.provenance).apply(other)
    assert not masks_of(other)
