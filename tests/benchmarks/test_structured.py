"""Coupled groups and one pruning step against Torch-Pruning, in one process; LLaMA-architecture models
in processor seconds."""
import copy, signal, time, warnings

import pytest
import torch
import torchvision

from pruning_bench import prune
from pruning_bench.structured.filters import member_sums
from pruning_bench.graph.groups import dependency_groups
from pruning_bench.graph.surgery import cut, kept_slices

MODELS = {"ResNet-50": "resnet50", "ViT-B/16": "vit_b_16", "ConvNeXt-T": "convnext_tiny", "Swin-T": "swin_t",
          "DenseNet-121": "densenet121"}

def theirs(model, x):
    tp = pytest.importorskip("torch_pruning")
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    tp.pruner.MetaPruner(model, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=.5,
                         ignored_layers=heads).step()

def ours(model, x):
    groups = {g.name: g for g in dependency_groups(model, x).groups if len(g) > 1}
    weights = {n: p.detach().abs() for n, p in model.named_parameters()}
    score = {n: sum(member_sums(g, weights, g.produces).values()) for n, g in groups.items()}
    cut(model, kept_slices(model, groups, {n: s.argsort().argsort() >= len(s) // 2 for n, s in score.items()}))

def careful(model, x): prune(model, "l1-filter", .5, data=[x], residual=True)

LIMIT = 60   # seconds

def enough(*_): raise TimeoutError

def once(work, model, x):
    "Seconds of a run on a copy, and how it failed; what takes longer than the limit is timed until then."
    mine, failed, before = copy.deepcopy(model), "", signal.signal(signal.SIGALRM, enough)
    signal.alarm(LIMIT)
    start = time.perf_counter()
    try: work(mine, x)
    except Exception as e: failed = type(e).__name__
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)
    return time.perf_counter() - start, failed

def in_turns(works, model, x, rounds=5):
    "The fastest run of each; what failed is not tried again."
    found = {work: [] for work in works}
    for work in works * rounds:
        if not found[work] or not found[work][-1][1]: found[work].append(once(work, model, x))
    return [(min(t for t, _ in found[work]), found[work][-1][1]) for work in works]

@pytest.mark.parametrize("name", MODELS)
def test_analysis_and_a_step_take_two_thirds_of_the_time_of_torch_pruning(name):
    "Groups, norms of filters, half of the channels removed; `prune` with its checks is timed beside them."
    warnings.filterwarnings("ignore")   # those of the opponent
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, MODELS[name])(weights=None).eval(), torch.randn(1, 3, 224, 224)
    for work in (ours, careful): once(work, model, x)   # loads the code
    (step, wrong), (whole, broken), (opponent, failed) = in_turns([ours, careful, theirs], model, x)
    print(
        f"\n{name}: {step:.2f} s, Torch-Pruning {opponent:.2f} s{failed and f' (ends in {failed})'}, "
        f"ratio {step / opponent:.2f}; prune with its precautions {whole:.2f} s, ratio {whole / opponent:.2f}")
    assert not wrong and not broken and step <= .7 * opponent

@pytest.mark.parametrize("layers", [2, 16])
def test_llama_takes_less_than_two_seconds(layers):
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256,
                                         num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4)).eval()
    batch = {"input_ids": torch.arange(32).view(2, 16)}
    start = time.process_time()
    found = dependency_groups(model, batch)
    took = time.process_time() - start
    print(f"\nLLaMA architecture, {layers} layers: {len(found.groups)} groups in {took:.2f} s")
    assert took < 2 and len(found.groups) >= layers
