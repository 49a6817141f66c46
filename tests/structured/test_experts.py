"Experts of mixture-of-experts layers as units: removal equals a router without their rows, in every family of models."
import copy

import pytest
import torch
from torch import nn

from pruning_bench import BadInput, load_pruned, prune
from pruning_bench.core.method import Method
from pruning_bench.core.recovery import finetune
from pruning_bench.core.rule import Rule
from pruning_bench.graph.experts import Experts, expert_layers
from pruning_bench.structured.experts import choices, expert_choices

transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LATENT = dict(num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
              qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8)
FAMILIES = {"Mixtral": dict(num_local_experts=6), "Olmoe": dict(num_experts=6),
            "Qwen2Moe": dict(num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=16),
            "Qwen3Moe": dict(num_experts=6, moe_intermediate_size=16, head_dim=8),
            "DeepseekV3": dict(n_routed_experts=6, moe_intermediate_size=16, **LATENT)}


def moe(family="Mixtral", seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "num_experts_per_tok": 2, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, 0, .2)
    return model


def tokens(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 64, (2, 16), generator=g)} for _ in range(n)]


def logits(model):
    with torch.no_grad(): return model(**tokens()[0]).logits


def without_rows(model, masks):
    "The reference: the router scores the removed experts with minus infinity."
    def hook(kept):
        def closed(router, args, out):
            scores = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T
            best = scores.masked_fill(~kept, -torch.inf).softmax(-1).topk(2)
            return scores, best.values / best.values.sum(-1, keepdim=True), best.indices
        return closed
    handles = [l.router.register_forward_hook(hook(masks[n])) for n, l in expert_layers(model).items()]
    found = logits(model)
    for h in handles: h.remove()
    return found


def test_a_removed_expert_is_one_that_the_router_never_scored():
    model = moe()
    dense = copy.deepcopy(model)
    plan = prune(model, "expert-usage", .5, data=tokens())
    assert [m.sum().item() for m in plan.masks.values()] == [3, 3]
    assert torch.allclose(logits(model), without_rows(dense, plan.masks), atol=1e-5)
    assert not torch.allclose(logits(model), logits(dense), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_equals_the_bypass_and_reloads_by_every_way(family, tmp_path):
    model = moe(family)
    dense, units = copy.deepcopy(model), Experts(copy.deepcopy(model))
    plan = prune(model, "expert-usage", .5, data=tokens())
    units.apply({n: (None, m) for n, m in plan.masks.items()})
    after = logits(model)
    assert torch.allclose(logits(units.model), after, atol=1e-5)
    model.save_pretrained(tmp_path / "library")
    again = type(model).from_pretrained(tmp_path / "library").eval()
    assert torch.allclose(logits(again), after, atol=1e-6)
    plan.save(tmp_path / "ours")
    assert torch.allclose(logits(load_pruned(tmp_path / "ours", moe(family, seed=1))), after, atol=1e-6)
    plan.apply(dense)
    assert torch.allclose(logits(dense), after, atol=1e-6)
    inputs = tokens()[0]
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_groups_of_experts_are_refused():
    model = moe("DeepseekV3")
    for layer in expert_layers(model).values(): layer.router.num_group = 2
    with pytest.raises(BadInput, match="groups of experts"): prune(model, "expert-usage", .5, data=tokens())


def test_layers_of_unequal_counts_leave_the_configuration_and_reload_with_the_plan(tmp_path):
    model = moe()
    def unequal(scores, keep, space): return dict(zip(scores, (5 / 6, 3 / 6)))
    plan = prune(model, "expert-usage", 2 / 6, data=tokens(), allocate=unequal)
    assert [l.count for l in expert_layers(model).values()] == [5, 3] and model.config.num_local_experts == 6
    plan.save(tmp_path)
    assert torch.allclose(logits(load_pruned(tmp_path, moe(seed=1))), logits(model), atol=1e-6)


def test_fewer_experts_than_a_token_needs_are_refused_and_the_model_is_as_it_was():
    model = moe()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(BadInput, match="keep at least 2"): prune(model, "expert-usage", 5 / 6, data=tokens())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_choice(side):
    batch = tokens(1)[0]["input_ids"]
    pad = torch.zeros(2, 5, dtype=torch.long)
    ids = torch.cat((pad, batch) if side == "left" else (batch, pad), 1)
    padded = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    if side == "left": padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    plain, same = (expert_choices(Experts(moe()), [b]) for b in ({"input_ids": batch}, padded))
    assert all(torch.equal(shares, same[n]) for n, shares in plain.items())
    plain, same = (prune(moe(), "expert-usage", .5, data=[b]) for b in ({"input_ids": batch}, padded))
    assert plain.masks.keys() == same.masks.keys()
    assert all(torch.equal(m, same.masks[n]) for n, m in plain.masks.items())


def test_every_token_chooses_as_many_experts_as_it_needs():
    shares = expert_choices(Experts(moe()), tokens())
    assert all(s.sum().item() == pytest.approx(2) for s in shares.values())


def test_scores_that_are_zero_for_the_others_count_as_choices():
    scores = torch.tensor([[.7, 0., .3], [0., 1., 0.]])
    assert torch.equal(choices(scores, 3), (scores != 0).double())
    with pytest.raises(BadInput, match="cannot be counted"): choices(torch.rand(4, 3) + .1, 3)


def test_a_rule_with_gates_trains_on_experts():
    "Gates that are learned: their gradient is that of a factor on the expert's output, and they leave no trace."
    seen = []
    def state(w, training): return {"gate": nn.Parameter(torch.ones_like(w))}
    def gate(name, state, training): return state["gate"]
    def finish(training):
        seen.extend(training.state[n]["gate"].detach().clone() for n in training.names)
        keep = {n: training.state[n]["gate"].detach().topk(3).indices for n in training.names}
        masks = {n: torch.zeros_like(training.allowed[n]).index_fill(0, k, True) for n, k in keep.items()}
        return {n: (training.w(n), m) for n, m in masks.items()}
    model = moe()
    names = list(model.state_dict())
    method = Method(space="experts", rule=Rule(state=state, gate=gate, finish=finish), recover=finetune(4, 1e-2))
    data = [b | {"labels": b["input_ids"]} for b in tokens()]
    plan = prune(model, method, .5, data=data)
    assert len(seen) == 2 and all((g != 1).any() for g in seen)
    assert all(m.sum() == 3 for m in plan.masks.values()) and list(model.state_dict()) == names
    assert not any(m._forward_hooks or hasattr(m, "parametrizations") for m in model.modules())


def test_a_gate_of_one_changes_nothing_and_a_gate_is_linear():
    model = moe()
    units, inputs = Experts(model), tokens()[0]
    with torch.no_grad(), units.gate(lambda n: torch.ones(6)): same = model(**inputs).logits
    assert torch.equal(same, logits(model))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), units.gate(lambda n: torch.zeros(6)): raise KeyboardInterrupt
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_without_experts_is_refused():
    with pytest.raises(BadInput, match="mixture-of-experts") as refused: prune(nn.Linear(4, 4), "expert-usage", .5)
    assert "\n" not in str(refused.value)
