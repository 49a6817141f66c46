"Coupled groups and one pruning step against Torch-Pruning, in one process; LLaMA-architecture models in processor seconds."
import copy, signal, time, warnings

import pytest
import torch
import torchvision

from pruning_bench import prune
from pruning_bench.structured.groups import coupling

MODELS = {"ResNet-50": "resnet50", "ViT-B/16": "vit_b_16", "ConvNeXt-T": "convnext_tiny", "Swin-T": "swin_t", "DenseNet-121": "densenet121"}

def theirs(model, x):
    tp = pytest.importorskip("torch_pruning")
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    tp.pruner.MetaPruner(model, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=.5, ignored_layers=heads).step()

def ours(model, x): prune(model, "l1-filter", .5, data=[x], stream=True)

LIMIT = 60   # seconds

def enough(*_): raise TimeoutError

def seconds(work, model, x, repeats=3):
    "The fastest of a few runs, each on its own copy; what fails, or takes longer than the limit, is timed until then, once."
    found, failed, before = [], "", signal.signal(signal.SIGALRM, enough)
    while len(found) < repeats and not failed:
        mine = copy.deepcopy(model)
        signal.alarm(LIMIT)
        start = time.perf_counter()
        try: work(mine, x)
        except Exception as e: failed = type(e).__name__
        finally: signal.alarm(0)
        found.append(time.perf_counter() - start)
    signal.signal(signal.SIGALRM, before)
    return min(found), failed

@pytest.mark.parametrize("name", MODELS)
def test_analysis_and_a_step_take_two_thirds_of_the_time_of_torch_pruning(name):
    warnings.filterwarnings("ignore")   # those of the opponent
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, MODELS[name])(weights=None).eval(), torch.randn(1, 3, 224, 224)
    (by_library, ok), (by_them, failed) = seconds(ours, model, x), seconds(theirs, model, x)
    print(f"\n{name}: {by_library:.2f} s, Torch-Pruning {by_them:.2f} s{failed and f' (ends in {failed})'}, ratio {by_library / by_them:.2f}")
    assert not ok and by_library <= .7 * by_them

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
