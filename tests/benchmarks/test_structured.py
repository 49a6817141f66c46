"Coupled groups of LLaMA-architecture models, in processor seconds."
import time

import pytest
import torch

from pruning_bench.structured.groups import coupling

@pytest.mark.parametrize("layers", [2, 16])
def test_llama_takes_less_than_two_seconds(layers):
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4)).eval()
    batch = {"input_ids": torch.arange(32).view(2, 16)}
    start = time.process_time()
    found = coupling(model, batch)
    took = time.process_time() - start
    print(f"\nLLaMA architecture, {layers} layers: {len(found.groups)} groups in {took:.2f} s")
    assert took < 2 and len(found.groups) >= layers
