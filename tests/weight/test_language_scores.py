"RIA, GBLM and OWL: the identities of their papers."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning_bench import BadInput, prune
from pruning_bench.core.space import Weights
from pruning_bench.core.stats import Stats, collect
from pruning_bench.weight.language_scores import blocks_of_layers, outlier_shares, owl, ria


def llama(layers=4):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    return LlamaForCausalLM(config).eval()


def words(n=3):
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 48, (4, 16), generator=g) for _ in range(n)]
    return [{"input_ids": i, "labels": i} for i in ids]


@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (12, 1)])
def test_shares_of_rows_and_columns_add_up(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    s = ria(w, Stats(act_norm=torch.ones(1, shape[1])))
    assert torch.isclose(s.sum(), torch.tensor(float(sum(shape))), rtol=1e-5)


def test_an_input_with_four_times_the_norm_counts_twice():
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    large = torch.ones(1, 8)
    large[:, 3] = 4
    ratio = ria(w, Stats(act_norm=large)) / ria(w, Stats(act_norm=torch.ones(1, 8)))
    assert torch.allclose(ratio, large.sqrt().expand_as(w))


def test_a_scale_of_the_matrix_changes_no_mask_of_ria():
    model, data = llama(), words()
    one = prune(copy.deepcopy(model), "ria", .5, data=data)
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight.mul_(8.)
    masks = prune(copy.deepcopy(model), "ria", .5, data=data).masks
    assert torch.equal(masks["model.layers.1.mlp.up_proj.weight"], one.masks["model.layers.1.mlp.up_proj.weight"])


def test_gblm_without_gradients_is_wanda_and_with_many_it_is_their_order():
    model, data = llama(), words()
    def masks(method, **settings): return prune(copy.deepcopy(model), method, .5, data=data, **settings).masks
    wanda, none, only = masks("wanda"), masks("gblm", alpha=0.), masks("gblm", alpha=1e6)
    assert all(torch.equal(wanda[n], none[n]) for n in wanda)
    space = Weights(model)
    found = collect(space, data, {"grad_norm", "act_norm"})
    for n in space.names():
        s = space.w(n).abs() * (found[n].act_norm + 1e6 * found[n].grad_norm)
        order = s.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(only[n]).scatter_(1, order[:, :order.shape[1] // 2], True)
        assert torch.equal(kept, only[n]), n


def test_grad_norm_does_not_depend_on_the_batches():
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 3), torch.randn(12, 6), torch.arange(12) % 3
    def found(cuts): return collect(Weights(net), [(x[a:b], y[a:b]) for a, b in zip(cuts, cuts[1:])], {"grad_norm"},
                                    F.cross_entropy)["weight"].grad_norm
    assert torch.allclose(found((0, 12)), found((0, 5, 6, 12)), rtol=1e-5)


@pytest.mark.parametrize("half", [0., .04, .08])
def test_owl_meets_the_budget_and_its_span(half):
    model = llama()
    model.model.layers[2].mlp.down_proj.weight.data[0, :3] *= 50   # outliers in one block
    space, data = Weights(model), words()
    stats = collect(space, data, {"act_norm"})
    shares = outlier_shares(space, stats, blocks_of_layers(space), 5.)
    assert max(shares, key=shares.get) == "model.layers.2."
    plan = prune(copy.deepcopy(model), "owl", .7, data=data, half=half, pattern="unstructured")
    density = plan.table().set_index("group").density
    inside = density[density.index.str.startswith("model.layers")]
    blocks = inside.groupby(inside.index.str.split(".").str[2]).mean()
    assert abs(plan.density - .3) < 1e-3 and blocks.max() - blocks.min() == pytest.approx(2 * half, abs=.03)
    assert half == 0 or blocks.idxmax() == "2"


def test_owl_works_with_every_score_and_where_there_are_no_blocks():
    data = words()
    for score in ("magnitude", "wanda", "ria"):
        assert abs(prune(llama(), score=score, allocate="owl", sparsity=.7, data=data).density - .3) < 1e-3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    assert set(blocks_of_layers(Weights(net)).values()) == {"0.weight", "2.weight"}
    assert prune(net, "owl", .5, data=[torch.randn(8, 16)]).density == pytest.approx(.5, abs=.01)


def test_a_span_that_leaves_zero_to_one_is_refused_before_anything_is_touched():
    model = llama()
    model.model.layers[2].mlp.down_proj.weight.data[0, :3] *= 50
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match="lower it"): prune(model, "owl", .95, data=words(), half=.4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert owl(half=0.).name == "owl"
