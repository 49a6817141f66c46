"Heads and channels of a model with LoRA adapters whose base is frozen: cut with their layer, merged afterwards."
import copy

import pytest
import torch
import transformers as tf

from pruning_bench import prune

peft = pytest.importorskip("peft")
tf.logging.set_verbosity_error()
IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS, "labels": IDS}]

def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2))
def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                                            bos_token_id=1, eos_token_id=2))

def adapted(make, targets):
    torch.manual_seed(0)
    conv1d = dict(fan_in_fan_out=True) if make is gpt2 else {}
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=targets, **conv1d)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n: p.normal_(std=.1)
    return model

def logits(model):
    with torch.no_grad(): return model(input_ids=IDS).logits

def close(a, b): return torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max().item())

CASES = [(llama, ["q_proj", "v_proj"]), (llama, ["q_proj", "k_proj", "v_proj"]), (llama, ["o_proj"]),
         (llama, ["gate_proj", "up_proj", "down_proj"]), (llama, "all-linear"), (gpt2, ["c_attn"]),
         (gpt2, ["c_attn", "c_fc", "c_proj"])]

@pytest.mark.parametrize("how", ["attention-heads", "l1-filter"])
@pytest.mark.parametrize("make, targets", CASES)
def test_base_and_adapter_are_cut_together_and_merged_afterwards(make, targets, how):
    model = adapted(make, targets)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    plan = prune(model, how, .5, data=DATA)
    assert not any("lora" in n for n in plan.masks) and len(plan.masks) >= 2
    assert any(p.shape != shapes[n] for n, p in model.named_parameters() if "lora" not in n)
    assert all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())
    inner = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert all(len(p) == 4 for p in inner)   # the rank is no width of the model
    assert close(logits(copy.deepcopy(model).merge_and_unload()), logits(model))
    model.train()(**DATA[0]).loss.backward()
    assert all((p.grad is not None) == ("lora" in n) for n, p in model.named_parameters())

MERGED = [(*case, how) for how in ("attention-heads", "l1-filter") for case in CASES] + [
    (*case, how) for how in ("l2-filter", "depgraph", "fpgm") for case in CASES[-3::2]]

@pytest.mark.parametrize("make, targets, how", MERGED)
def test_what_goes_and_the_function_are_those_of_the_merged_model(make, targets, how):
    model, merged = adapted(make, targets), adapted(make, targets).merge_and_unload().requires_grad_(True).eval()
    mine, other = (prune(m, how, .5, data=DATA).masks for m in (model, merged))
    def plain(n): return n.replace("base_model.model.", "").replace(".base_layer", "")
    assert {plain(n): m.tolist() for n, m in mine.items()} == {n: m.tolist() for n, m in other.items()}
    assert close(logits(model), logits(merged))

def test_a_head_adapter_costs_no_heads_of_the_output_layer():
    model = adapted(llama, ["q_proj"])
    prune(model, "attention-heads", .5, data=DATA)
    layer = model.base_model.model.model.layers[0].self_attn
    assert layer.q_proj.lora_A["default"].weight.shape == (4, 32)
    assert layer.q_proj.lora_B["default"].weight.shape == (16, 4) and layer.q_proj.base_layer.weight.shape == (16, 32)
    assert layer.o_proj.weight.shape == (32, 16) and model.config.num_attention_heads == 2

def test_a_filter_that_its_adapter_cancels_goes_first():
    up, down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    up.weight.data = torch.linspace(1, 2, 8)[:, None].expand(8, 6).clone()   # the last filters are the largest
    config = peft.LoraConfig(target_modules=["0"], r=1, lora_alpha=1)
    model = peft.get_peft_model(torch.nn.Sequential(up, torch.nn.ReLU(), down), config)
    lora = model.base_model.model[0]
    lora.lora_A["default"].weight.data.fill_(1.)
    lora.lora_B["default"].weight.data[4:] = -lora.base_layer.weight.data[4:, :1]
    plan = prune(model, "l1-filter", .5, data=[torch.randn(5, 6)])
    assert [m.tolist() for m in plan.masks.values()] == [[True] * 4 + [False] * 4]
    assert torch.equal(lora.base_layer.weight[:, 0], torch.linspace(1, 2, 8)[:4])
