"Language models of three kinds for tests: grouped queries with tied embeddings, biases, transposed weights."
import torch

from pruning_bench.core.inputs import seeded


def transformer(kind, dtype=torch.float32):
    "A LLaMA, an OPT or a GPT-2 of two blocks, 16 features, 4 heads and 48 tokens; the same weights every time."
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
    made = {"llama": lambda: LlamaForCausalLM(LlamaConfig(
                vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)),
            "opt": lambda: OPTForCausalLM(OPTConfig(
                vocab_size=48, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=32, word_embed_proj_dim=16)),
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=32))}
    with seeded(0): return made[kind]().to(dtype).eval()
