"Depth pruning and the configuration: what `from_pretrained` builds is the pruned model, or the request is refused."
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from pruning_bench import BadInput, Plan, load_pruned, prune
from pruning_bench.core.blocks import Blocks, block_list
from pruning_bench.core.depth_config import counting_attributes, entry_options, names_after

transformers = pytest.importorskip("transformers")
COMMON = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(**COMMON, hidden_size=32, num_hidden_layers=4)
HEADS = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2, num_experts=4, shared_expert_intermediate_size=16)
STACKS = dict(**COMMON, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
              decoder_attention_heads=4, decoder_start_token_id=2)
T5 = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_heads=4, decoder_start_token_id=0, pad_token_id=0)
FAMILIES = {   # name: (class of the model, of the configuration, its values)
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **HEADS}),
    "layers by index": ("SmolLM3ForCausalLM", "SmolLM3Config", {**SIZES, **HEADS}),
    "numbers of layers": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**SIZES, **HEADS, **EXPERTS,
                                                                    "mlp_only_layers": [0, 2]}),
    "all numbers of layers": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**SIZES, **HEADS, **EXPERTS,
                                                                        "mlp_only_layers": [0, 1, 2, 3]}),
    "a border": ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", {
        **SIZES, **HEADS, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "runs of kinds": ("GPTNeoForCausalLM", "GPTNeoConfig", dict(
        vocab_size=96, hidden_size=32, num_layers=4, num_heads=4, max_position_embeddings=64, window_size=4,
        attention_types=[[["global", "local"], 2]])),
    "blocks of two kinds": ("Lfm2ForCausalLM", "Lfm2Config", {**SIZES, **HEADS, "layer_types": [
        "conv", "full_attention", "conv", "full_attention"]}),
    "computed kinds": ("MambaForCausalLM", "MambaConfig", {**SIZES, "state_size": 4}),
    "indices of kinds": ("BambaForCausalLM", "BambaConfig", {
        **SIZES, **HEADS, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
        "attn_layer_indices": [1, 3]}),
    "experts": ("GptOssForCausalLM", "GptOssConfig", {**SIZES, **HEADS, "num_local_experts": 4, "head_dim": 8}),
    "decoder": ("BartForConditionalGeneration", "BartConfig", {
        **STACKS, "encoder_layers": 3, "decoder_layers": 4, "max_position_embeddings": 64}),
    "equal stacks": ("BartForConditionalGeneration", "BartConfig", {
        **STACKS, "encoder_layers": 4, "decoder_layers": 4, "max_position_embeddings": 64}),
    "speech": ("WhisperForConditionalGeneration", "WhisperConfig", {
        **STACKS, "encoder_layers": 4, "decoder_layers": 4, "num_mel_bins": 8, "max_source_positions": 16,
        "max_target_positions": 32}),
    "shared positions": ("T5ForConditionalGeneration", "T5Config", {**T5, "num_layers": 4, "num_decoder_layers": 3}),
    "shared positions of the decoder": ("T5ForConditionalGeneration", "T5Config", {
        **T5, "num_layers": 3, "num_decoder_layers": 4})}


def make(family):
    kind, config, values = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**values)).eval()
    for p in model.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=.2)   # blocks that matter, tables as a training has them
    return model

def inputs(family):
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    if family == "speech":
        return {"input_features": torch.linspace(-1, 1, 512).view(2, 8, 32), "decoder_input_ids": ids[:, :8]}
    stacks = FAMILIES[family][0].endswith("ConditionalGeneration")
    return {"input_ids": ids, "decoder_input_ids": ids[:, :8]} if stacks else {"input_ids": ids, "use_cache": False}

def logits(model, batch):
    with torch.no_grad(): return model(**batch).logits


@pytest.mark.parametrize("kept", [(0, 1, 1, 1), (1, 0, 0, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bypassed_removed_and_loaded_models_are_one(family, kept, tmp_path):
    model, batch = make(family), inputs(family)
    blocks = Blocks(model, [batch])
    blocks.apply({blocks.path: (None, torch.tensor(kept).bool())})
    bypassed = logits(model, batch)
    blocks.remove()
    assert torch.allclose(logits(model, batch), bypassed, atol=1e-5)
    model.save_pretrained(tmp_path)
    back, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.allclose(logits(back.eval(), batch), bypassed, atol=1e-5)


def test_the_plan_repeats_it_and_a_shared_configuration_stays(tmp_path):
    model, batch = make("equal stacks"), inputs("equal stacks")
    fresh, shared = copy.deepcopy(model), make("equal stacks")
    fresh.config = shared.config
    plan = prune(model, "block-influence", .5, data=[batch])
    plan.save(tmp_path / "plan", model)
    plan.apply(fresh)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert torch.equal(logits(load_pruned(tmp_path / "plan", make("equal stacks")).eval(), batch), logits(model, batch))
    assert (shared.config.encoder_layers, shared.config.decoder_layers) == (4, 4)


@pytest.mark.parametrize("kind,config,values,why", [
    ("GPT2LMHeadModel", "GPT2Config", dict(
        vocab_size=96, n_embd=32, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True), "scaling"),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**SIZES, **HEADS, **EXPERTS, "decoder_sparse_step": 2}, "mlp")])
@pytest.mark.parametrize("method", ["block-influence", "cka-layer"])
def test_what_no_configuration_can_say_is_refused_before_work(kind, config, values, why, method):
    torch.manual_seed(0)
    model, ran = getattr(transformers, kind)(getattr(transformers, config)(**values)), []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: ran.append(m))
    data = [{"input_ids": torch.zeros(2, 8).long()}] * 9
    with pytest.raises(BadInput, match=why): prune(model, method, .5, data=data)
    assert len(ran) < 3 and len(block_list(model)[1]) == 4


class Reads(nn.Module):
    "The embedding of the first block is used by all, as in diffusion transformers."
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        shift = self.blocks[0].bias
        for b in self.blocks: x = x + b(x) + shift
        return x


def test_code_that_uses_a_block_elsewhere_is_found_and_the_model_put_back():
    torch.manual_seed(0)
    model, x = Reads(), torch.randn(4, 8)
    with torch.no_grad(): model.blocks[0].weight.zero_()
    before = model(x)
    with pytest.raises(BadInput, match="computes something else"):
        prune(model, score="magnitude", space="blocks", sparsity=.25, data=[x])
    assert len(model.blocks) == 4 and torch.equal(model(x), before)


def test_a_diffusion_transformer():
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, sample_size=8,
                 patch_size=2)
    model = diffusers.DiTTransformer2DModel(**sizes, num_layers=4, num_embeds_ada_norm=10)
    Plan("blocks", {"transformer_blocks": torch.tensor([True, False, True, False])}).apply(model)
    assert model.config.num_layers == len(model.transformer_blocks) == 2


def test_adapters_go_with_their_block():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules="all-linear"))
    prune(model, "block-influence", .5, data=[inputs("llama")])
    base = model.base_model.model
    assert len(base.model.layers) == base.config.num_hidden_layers == 2
    assert len([n for n, _ in model.named_parameters() if "lora_A" in n]) == 2 * 7


def test_numbered_names_stay_those_of_the_class():
    vit = torchvision.models.VisionTransformer(16, 8, 4, 2, 32, 64)
    prune(vit, score="magnitude", space="blocks", sparsity=.5)
    torchvision.models.VisionTransformer(16, 8, 2, 2, 32, 64).load_state_dict(vit.state_dict())
    assert names_after(["a", "b"], [False, True]) == ["b"] and names_after(["1", "2"], [False, True]) == ["1"]


def test_numbers_that_only_look_like_positions_stay():
    blocks = nn.ModuleList(nn.Conv1d(4, 4, 3) for _ in range(3))
    for i, b in enumerate(blocks): b.layer_idx, b.width, b.layer_scale = i + 5, i, 2 * i
    assert counting_attributes(blocks) == {("", "layer_idx"): 5}
    assert entry_options([8, 8, 8], [True, False, True]) == [[8, 8]] and entry_options([9, 1], [True] * 3) == []


NETWORKS = {"resnet18": 5, "resnet34": 13, "resnet50": 12, "regnet_y_400mf": 12, "mobilenet_v2": 10, "swin_t": 12}

@pytest.mark.parametrize("name", NETWORKS)
def test_gates_stand_on_all_blocks_that_keep_the_shape(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    size = sum(p.numel() for p in model.parameters())
    data = [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))]
    plan = prune(model, "polarize", .5, data=data, loss=F.cross_entropy, steps=1)
    (mask,) = plan.masks.values()
    assert len(mask) == NETWORKS[name] and mask.sum() == int(.5 * len(mask) + .5)
    assert sum(p.numel() for p in model.parameters()) < .75 * size and model.eval()(data[0][0]).shape == (2, 10)
    fresh = getattr(torchvision.models, name)(num_classes=10)
    plan.apply(fresh)
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_gates_on_blocks_with_names():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, 4, 2, 32, 64, num_classes=10)
    data = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    for method in ("polarize", "layer-lottery"):
        model = copy.deepcopy(vit)
        prune(model, method, .5, data=data, loss=F.cross_entropy, **({"steps": 2} if method == "polarize" else {}))
        assert list(model.encoder.layers._modules) == ["encoder_layer_0", "encoder_layer_1"]
