"Routing of attention heads as a rule: selections and gradients by hand, budgets, hooks that end, refusals."
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from pruning_bench import BadInput, prune
from pruning_bench.structured.head_routing import route, router_hook


def bert(heads=4, seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_labels=2,
                                                    num_attention_heads=heads, intermediate_size=64))


def rows(n=3):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 50, (8, 7), generator=g), "labels": torch.randint(0, 2, (8,), generator=g)}
            for _ in range(n)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_k_heads_are_selected_and_the_gradient_is_that_of_the_softmax(k):
    torch.manual_seed(k)
    logits, weight = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    z = route(logits, k)
    best = logits.topk(k, 1).indices
    assert torch.allclose(z.detach(), torch.zeros(6, 4).scatter(1, best, 1.), atol=1e-6)
    soft = torch.autograd.grad((logits.softmax(-1) * weight).sum(), logits)[0]
    assert torch.allclose(torch.autograd.grad((z * weight).sum(), logits)[0], soft, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 6), (3, 2, 5, 6)])
def test_outputs_of_other_heads_are_zero_and_the_first_token_decides(shape):
    torch.manual_seed(0)
    x, index = torch.randn(shape), torch.tensor([[0, 3], [1, 4], [2, 5]])   # the columns of a head need not be together
    state = {"router": torch.randn(3, 6), "bias": torch.zeros(3), "usage": torch.zeros(3)}
    y, = router_hook(index, state, 1)(nn.Identity().train(), (x,))
    first = x.flatten(1, -2)[:, 0] if x.dim() > 2 else x
    best = (first @ state["router"].T).argmax(1)
    for b in range(3):
        mine = index[best[b]]
        assert torch.allclose(y[b][..., mine], x[b][..., mine])
        other = [c for c in range(6) if c not in mine.tolist()]
        assert y[b][..., other].abs().max() < 1e-6
    assert torch.allclose(state["usage"], .05 * F.one_hot(best, 3).float().mean(0), atol=1e-6)
    router_hook(index, state, 1)(nn.Identity().eval(), (x,))
    assert torch.allclose(state["usage"].sum(), torch.tensor(.05))   # evaluation is not counted


@pytest.mark.parametrize("sparsity, left", [(.25, 3), (.5, 2), (.75, 1), (.95, 1)])
def test_every_attention_keeps_its_share_of_heads_and_no_hook_or_parameter(sparsity, left):
    model = bert()
    before = set(model.state_dict())
    plan = prune(model, "shrp", sparsity, rows(), steps=3)
    assert [int(m.sum()) for m in plan.masks.values()] == [left, left]
    assert [b.attention.self.query.out_features for b in model.bert.encoder.layer] == [8 * left] * 2
    assert set(model.state_dict()) == before and not any(m._forward_pre_hooks for m in model.modules())


def test_fused_attention_is_refused_and_left_alone():
    from torchvision.models import VisionTransformer
    model = VisionTransformer(8, 4, 2, 4, 16, 32, num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match="not called as a linear layer.*attention-heads"):
        prune(model, "shrp", .5, [(torch.rand(4, 3, 8, 8), torch.randint(0, 10, (4,)))], F.cross_entropy, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
