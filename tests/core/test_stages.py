"Stages: block after block against the whole network, interrupted and resumed, refused, and on many architectures."
import copy, os, signal, subprocess, sys, textwrap, weakref
import pytest, torch, torchvision, transformers as tf
from torch import nn
from pruning_bench import BadInput, Method, batch_loss, prune
from pruning_bench.core import request
from pruning_bench.core.block_by_block import block_by_block, chains
from pruning_bench.core.cost import CostMeter
from pruning_bench.core.inputs import in_mode
from pruning_bench.core.mask import masks_of
from pruning_bench.core.padding import without_padding
from pruning_bench.core.pattern import unstructured
from pruning_bench.core.schedule import Schedule
from pruning_bench.core.score import Score
from pruning_bench.core.solve import Solver
from pruning_bench.core.space import Weights
from pruning_bench.core.stages import STAGES, Run
from pruning_bench.core.stats import PROVIDERS, Stats, provider
from pruning_bench.weight.sparsegpt import obs, sparsegpt

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
IDS = torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[:3, :6] = 0
TEXT = [{"input_ids": IDS[a:a + 3], "attention_mask": PADDED[a:a + 3]} for a in (0, 3)]
IMAGES = list(torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def llama(blocks=4, **more):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, "num_hidden_layers": blocks, **more}))


def alternating():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3TextConfig(**SMALL, num_hidden_layers=4, head_dim=8, sliding_window=6, layer_types=kinds,
                                 attn_implementation="eager")   # eager attention always receives a mask
    return tf.Gemma3ForCausalLM(config)


MODELS = {
    "llama": (llama, TEXT),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32,
                                                      bos_token_id=0, eos_token_id=0)), TEXT),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=3,
                                                   num_attention_heads=4, max_position_embeddings=32,
                                                   word_embed_proj_dim=16)), TEXT),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, num_hidden_layers=4, use_sliding_window=True,
                                                         sliding_window=6, max_window_layers=2)), TEXT),
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SMALL, num_hidden_layers=3, head_dim=8)), TEXT),
    "gemma3": (alternating, TEXT),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_hidden_layers=2,
                                                               num_local_experts=2)), TEXT),
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                                                                    num_hidden_layers=3, num_attention_heads=4)), TEXT),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                                              num_attention_heads=4, image_size=16,
                                                              patch_size=4)), IMAGES),
    "vit_torchvision": (lambda: torchvision.models.VisionTransformer(16, 4, 3, 4, 32, 48), IMAGES),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3,
                                                             num_heads=4, decoder_start_token_id=0)),
           [{**b, "decoder_input_ids": b["input_ids"][:, :9]} for b in TEXT]),
    "resnet": (lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 2, 2],
                                                 num_classes=4), IMAGES),
}
SPARSEGPT = dict(score=obs, solve=sparsegpt)
DENSE, PRUNED = block_by_block(propagate="dense"), block_by_block()


def same_weights(a, b):
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def built(name):
    torch.manual_seed(1)
    return MODELS[name][0]()


@pytest.mark.parametrize("name", MODELS)
def test_without_propagation_it_is_the_whole_network_bit_for_bit(name):
    kind = dict(score="wanda", pattern="per_row") if name == "resnet" else SPARSEGPT
    model, data = built(name), MODELS[name][1]
    models = [copy.deepcopy(model) for _ in range(3)]
    whole, dense, pruned = (prune(m, data=data, stages=s, **kind) for m, s in zip(models, ("whole", DENSE, PRUNED)))
    assert whole == dense and same_weights(models[0], models[1])
    assert whole != pruned and not same_weights(models[0], models[2])   # the blocks did see something else
    kept = lambda plan: plan.table().kept.tolist()
    assert kept(whole) == kept(pruned) and whole.masks.keys() == pruned.masks.keys() == masks_of(models[2]).keys()


@pytest.mark.parametrize("stages", [DENSE, PRUNED])
def test_one_block_is_the_whole_network(stages):
    one, other = llama(1), llama(1)
    assert prune(one, data=TEXT, stages="whole", **SPARSEGPT) == prune(other, data=TEXT, stages=stages, **SPARSEGPT)
    assert same_weights(one, other)


def by_hand(model, batches, keep=.5):
    "Every layer in turn: run the network as it is now, read what the layers of a block receive, prune them."
    for block in model.model.layers:
        layers = {m: [] for m in block.modules() if isinstance(m, nn.Linear)}
        def read(m, args): layers[m].append(args[0].reshape(-1, args[0].shape[-1]))
        hooks = [m.register_forward_pre_hook(read) for m in layers]
        with torch.no_grad(), in_mode(model, False):
            for batch in batches: model(**batch)
        for hook in hooks: hook.remove()
        for m, rows in layers.items():
            total = 0
            for f in rows: total = total + f[None].transpose(1, 2) @ f[None]
            stats = Stats(gram=total / sum(len(f) for f in rows))
            w, _ = sparsegpt(m.weight.data.clone(), stats, obs(m.weight.data, stats), keep, unstructured())
            m.weight.data.copy_(w)


def test_it_is_pruning_layer_by_layer_by_hand():
    model, hand = llama(), llama()
    prune(model, data=TEXT, stages=PRUNED, **SPARSEGPT)
    by_hand(hand, without_padding(TEXT))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), hand.parameters()))


def test_every_block_gets_its_own_arguments():
    model = alternating().eval()
    seen, layers = [], model.model.layers
    def read(module, args, kwargs): seen.append(kwargs["attention_mask"])
    for layer in layers: layer.register_forward_pre_hook(read, with_kwargs=True)
    model(**TEXT[0])
    real = [m.clone() for m in seen]
    seen.clear()
    for part, batches in PRUNED.parts(Weights(model), TEXT[:1], Run()):
        if part.model in [*layers]:
            seen.clear()
            part.model(**batches[0])
            assert torch.equal(seen[0], real[[*layers].index(part.model)])
    assert not torch.equal(real[0], real[1]) and torch.equal(real[0], real[2])


STATE = {}


def drawn(w, stats):
    "A random score that counts its calls and fails at one of them."
    STATE["calls"] += 1
    if STATE["calls"] == STATE["stop"]: raise STATE["error"]("stopped")
    return torch.rand(w.shape) * stats.act_norm


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_stopped_and_resumed_bit_for_bit(tmp_path, propagate, error):
    rate = Score(drawn, "drawn", needs=frozenset({"act_norm"}))   # one for all calls: its code belongs to the digest
    STATE.update(stop=None, calls=0, error=error)
    straight, model, dense = llama(5), llama(5), llama(5)
    plan = prune(straight, score=rate, data=TEXT, stages=block_by_block(propagate=propagate))
    STATE.update(calls=0, stop=7 * 3 + 2)
    stages = block_by_block(propagate=propagate, folder=tmp_path / "run")
    with pytest.raises(error): prune(model, score=rate, data=TEXT, stages=stages)
    assert same_weights(model, dense) and len(list((tmp_path / "run").glob("*.safetensors"))) == 3
    STATE.update(calls=0, stop=None)
    resumed = prune(model, score=rate, data=TEXT, stages=stages)
    assert STATE["calls"] == 7 * 2 and resumed == plan and same_weights(model, straight)
    assert str(tmp_path) not in str(resumed.provenance)
    assert resumed.provenance["stages"].startswith(f"block_by_block(propagate='{propagate}'")
    STATE.update(calls=0)
    again = llama(5)
    assert prune(again, score=rate, data=TEXT, stages=stages) == plan and STATE["calls"] == 0
    assert same_weights(again, straight)


@pytest.mark.slow
def test_killed_and_resumed_in_another_process(tmp_path):
    code = textwrap.dedent("""
        import os, signal, sys
        from pruning_bench import prune
        from pruning_bench.core.block_by_block import block_by_block
        from test_stages import SPARSEGPT, TEXT, llama
        from safetensors.torch import save_file
        from pruning_bench.core.space import Weights
        folder, out, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
        load, kept = Weights.apply, []
        def apply(self, solved):
            load(self, solved)
            kept.append(self.model)
            if len(kept) == after: os.kill(os.getpid(), signal.SIGKILL)
        Weights.apply = apply
        model = llama(5)
        prune(model, data=TEXT, stages=block_by_block(folder=folder), **SPARSEGPT)
        save_file({n: p.clone() for n, p in model.named_parameters() if n != "lm_head.weight"}, out)
    """)
    def run(folder, out, after):
        here = os.path.dirname(__file__)
        paths = [here, os.path.dirname(os.path.dirname(here)), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-c", code, str(folder), str(out), str(after)]
        return subprocess.run(command, env=env, capture_output=True, text=True)
    killed = run(tmp_path / "run", tmp_path / "a", 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 3
    for folder, out in ((tmp_path / "run", tmp_path / "a"), (tmp_path / "other", tmp_path / "b")):
        done = run(folder, out, 0)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_of_another_request_is_refused(tmp_path):
    stages = block_by_block(folder=tmp_path)
    first = dict(score="wanda", sparsity=.5, data=TEXT)
    prune(llama(), **first, stages=stages)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = llama()
    other.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1e-3
    def double(w, stats): return w.abs() * stats.act_norm**2
    renamed = Score(double, "wanda", needs=frozenset({"act_norm"}))
    dense = block_by_block(folder=tmp_path, propagate="dense")
    longer = [{n: t.roll(1) for n, t in b.items()} for b in TEXT]
    for model, what, changed in ((other, "model", {}), (llama(), "budget", {"sparsity": .6}),
                                 (llama(), "data", {"data": longer}), (llama(), "data", {"calibration": 3}),
                                 (llama(), "seed", {"seed": 1}), (llama(), "settings", {"score": renamed}),
                                 (llama(), "settings", {"pattern": "per_row"}),
                                 (llama(), "settings", {"skip": "*.up_proj*"}),
                                 (llama(), "method", {"method": "wanda"}),
                                 (llama(), "stages", {"stages": dense})):
        before = copy.deepcopy(model)
        with pytest.raises(BadInput, match=f"holds parts made with another {what} .digest") as refused:
            prune(model, **{**first, "stages": stages, **changed})
        assert str(refused.value).count(". ") == 0 and same_weights(model, before) and not masks_of(model)
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "stages.json").unlink()
    with pytest.raises(BadInput, match="holds other files"): prune(llama(), **first, stages=stages)
    with pytest.raises(BadInput, match="is a file"):
        prune(llama(), **first, stages=block_by_block(folder=tmp_path / "0000.safetensors"))
    with pytest.raises(BadInput, match="the schedule has 5 steps"):
        prune(llama(), **first, schedule="geometric", stages=block_by_block(folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_settings_of_a_method_belong_to_the_request(tmp_path):
    stages = block_by_block(folder=tmp_path)
    prune(llama(2), "sparsegpt", .5, data=TEXT, stages=stages)
    with pytest.raises(BadInput, match="another settings"):
        prune(llama(2), "sparsegpt", .5, data=TEXT, stages=stages, damp=.1)
    prune(llama(2), "sparsegpt", .5, data=TEXT, stages=stages)


def refused_parts():
    yield dict(allocate="global"), "allocation 'global' reads the scores of all groups"
    yield dict(allocate=lambda scores, keep, space: dict.fromkeys(scores, keep)), "allocation 'custom' reads the scores"
    yield dict(solve=Solver(len, "joint", joint=True)), "solver 'joint' updates all groups together"
    yield dict(score=Score(len, "ranking", scope="space")), "score 'ranking' ranks the units of all groups"
    taylor, odd = (Score(len, "custom", needs=frozenset({need})) for need in ("grad", "of_the_test"))
    yield dict(score=taylor), "statistic 'grad' needs the loss of the whole network"
    yield dict(score=odd), "statistic 'of_the_test' needs the whole network"
    yield dict(schedule=Schedule(len, "adaptive", most=3)), "schedule 'adaptive' looks at the network"
    yield dict(space="blocks"), "a space of blocks cannot be taken apart"
    yield dict(stages=block_by_block(store="cuda:77")), "device 'cuda:77' cannot be used here"
    yield dict(stages=block_by_block(device="meta")), "device 'meta' cannot be used here"
    yield dict(stages=block_by_block(device="nonsense")), "device 'nonsense' cannot be used here"


@pytest.mark.parametrize("parts, sentence", refused_parts())
def test_what_must_see_all_groups_is_refused(parts, sentence):
    provider(replaces=True)(of_the_test)
    try:
        model, dense = llama(2), llama(2)
        with pytest.raises(BadInput, match=sentence) as refused: prune(model, data=TEXT, **{"stages": PRUNED, **parts})
        assert ": " in str(refused.value) and same_weights(model, dense) and not masks_of(model)
    finally: PROVIDERS.discard("of_the_test")


def of_the_test(space, batches, loss=None): raise AssertionError("this statistic is refused before it is computed")


def test_a_rule_is_refused():
    def rule(method, keep): raise AssertionError("the rule is refused before it is made")
    model = llama(2)
    with pytest.raises(BadInput, match="decides by its rule"):
        prune(model, Method(rule=rule), data=TEXT, stages=PRUNED, recover="finetune")
    with pytest.raises(BadInput, match="rule 'rule' trains the whole network"):
        prune(model, Method(rule=rule, stages=PRUNED), data=TEXT, recover="finetune")


class InBetween(nn.Module):
    "A list of blocks with something between its blocks."
    def __init__(self, between):
        super().__init__()
        self.list, self.between = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), between

    def forward(self, x):
        for block in self.list: x = self.between(block, x)
        return x


class Told(nn.Linear):
    def forward(self, x, scale): return super().forward(x) * scale


class Told3(nn.Module):
    "Blocks that are told something about the activations before them."
    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList(Told(8, 8) for _ in range(3))

    def forward(self, x):
        for block in self.list: x = block(x, x.mean())
        return x


class InPlace(nn.Linear):
    def forward(self, x): return super().forward(x.relu_())


def networks_without_chains():
    yield InBetween(lambda block, x: block(x) * 2), "a block does not receive what the block before it returns"
    yield InBetween(lambda block, x: block(block(x))), "the blocks are not called once each"
    yield Told3(), "the further arguments of a block depend on what the blocks before it compute"
    yield nn.Sequential(InPlace(8, 8), InPlace(8, 8)), "a block changes its input in place"
    yield nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "Sequential has no list of equal blocks"
    big = nn.Linear(8, 800)
    small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    yield nn.Sequential(small, big), "less than a quarter of its weights is in lists of equal blocks"


@pytest.mark.parametrize("net, sentence", networks_without_chains())
def test_networks_without_a_chain_of_blocks_are_refused(net, sentence):
    before = copy.deepcopy(net)
    with pytest.raises(BadInput, match=sentence) as refused:
        prune(net, score="wanda", data=[torch.randn(4, 8)], stages=PRUNED)
    assert "use stages='whole'" in str(refused.value) and same_weights(net, before)
    assert not any("forward" in vars(m) for m in net.modules())


def test_the_same_network_without_anything_in_between_is_accepted():
    net = InBetween(lambda block, x: block(x))
    assert [*chains(Weights(net), [torch.randn(4, 8)], Run())] == ["list"]


@pytest.mark.parametrize("at", [1, 6, 9, 23, 28])
@pytest.mark.parametrize("restore", [True, False])
def test_modes_hooks_and_devices_are_put_back_on_interruption(at, restore):
    model, calls = llama().train(), []
    model.model.layers[1].eval()
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
    modes, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    hooks = lambda: [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before, clean = copy.deepcopy(model), hooks()
    def stopping(w, stats):
        calls.append(w)
        if len(calls) == at: raise KeyboardInterrupt
        return w.abs()
    with pytest.raises(KeyboardInterrupt):
        rate = Score(stopping, "stopping", needs=frozenset({"act_norm"}))
        prune(model, score=rate, data=TEXT, stages=block_by_block(device="cpu"), restore=restore)
    assert modes == [m.training for m in model.modules()] and grads == [p.requires_grad for p in model.parameters()]
    assert not any("forward" in vars(m) for m in model.modules())
    if restore: assert same_weights(model, before) and hooks() == clean and not masks_of(model)


def test_a_block_moves_to_the_device_and_back():
    moves = []
    class Noting(nn.Linear):
        def to(self, *args, **kwargs):
            moves.append((self.number, args[0]))
            return super().to(*args, **kwargs)
    net = nn.Sequential(*[Noting(8, 8) for _ in range(3)])
    for i, block in enumerate(net): block.number = i
    prune(net, score="wanda", data=[torch.randn(4, 8)], stages=block_by_block(device="cpu"))
    assert moves == [(i, d) for i in range(3) for d in ("cpu", torch.device("cpu"))]


@pytest.mark.gpu
def test_blocks_compute_on_a_gpu_and_stay_where_they_were():
    model = llama()
    plan = prune(model, data=TEXT, stages=block_by_block(device="cuda"), **SPARSEGPT)
    assert plan.density == .5 and {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_calls_of_blocks_are_counted():
    model = llama(4)
    cost = prune(model, data=TEXT, stages=PRUNED, **SPARSEGPT).cost
    assert (cost["forward"], cost["block_forward"], cost["samples"], cost["backward"]) == (2, 2 * (4 + 3), 6, 0)
    cost = prune(llama(4), data=TEXT, **SPARSEGPT).cost
    assert (cost["forward"], cost["block_forward"]) == (2, 0)
    cost = prune(llama(4), "magnitude", stages="block_by_block").cost
    assert (cost["forward"], cost["block_forward"]) == (0, 0)
    with CostMeter(model, [*model.model.layers]) as cost:
        model(**TEXT[0])
        with pytest.raises(TypeError): model.model.layers[0](nonsense=1)
        model.model.layers[0].mlp(torch.randn(2, 32))
    assert (cost.forward, cost.block_forward) == (1, 1)


def test_layers_outside_the_blocks_are_the_last_part_or_the_first():
    model = built("bert")
    for propagate, place in (("pruned", -1), ("dense", 0)):
        parts = [p for p, _ in block_by_block(propagate=propagate).parts(Weights(copy.deepcopy(model)), TEXT, Run())]
        assert len(parts) == 4 and parts[place].names() == ["bert.pooler.dense.weight", "classifier.weight"]
    assert sum(len(p.names()) for p in parts) == len(Weights(model).names())


@pytest.mark.parametrize("sparsity", [.1, .37, .5, .813])
@pytest.mark.parametrize("allocate", ["uniform", "erk"])
def test_the_count_is_exact_over_the_whole_network(sparsity, allocate):
    asked = dict(sparsity=sparsity, allocate=allocate, data=TEXT, score="wanda")
    plans = [prune(built("bert"), stages=stages, **asked) for stages in ("whole", PRUNED)]
    kept = [p.table().kept.tolist() for p in plans]
    total = plans[0].table().units.sum()
    assert kept[0] == kept[1] and sum(kept[1]) == int((1 - sparsity) * total + .5)


def test_patterns_and_schedules_work():
    model = llama(3)
    plan = prune(model, "wanda", "2:4", data=TEXT, stages=PRUNED)
    assert all((m.view(len(m), -1, 4).sum(-1) == 2).all() for m in plan.masks.values())
    steps = llama(3)
    plan = prune(steps, score="wanda", sparsity=.6, schedule=[.7, .4], data=TEXT, stages=PRUNED)
    assert abs(plan.density - .4) < 1e-3


def test_memory_is_that_of_one_block():
    def of_gram(w, stats): return w.abs() * stats.gram.diagonal(dim1=1, dim2=2).sqrt()
    rate = Score(of_gram, "of_gram", needs=frozenset({"gram"}))
    wide = dict(intermediate_size=2048, hidden_size=128)   # six second moments of 16 MiB
    peaks = {}
    for stages in ("whole", PRUNED):
        plan = prune(llama(6, **wide), score=rate, data=TEXT, stages=stages, restore=False)
        peaks[str(stages)] = plan.cost["peak_bytes"]
    if None in peaks.values(): pytest.skip("nobody can measure memory here")
    assert peaks["whole"] > 6 * 2048**2 * 4 and peaks[str(PRUNED)] < .7 * peaks["whole"]


def test_no_activations_are_kept_but_those_between_two_blocks():
    model, seen, dead = llama(3), [], []
    def note(module, args, kwargs):
        dead.extend(ref() is None for ref in seen[-1:])   # what the batch before gave has made room for its output
        seen.append(weakref.ref(next(iter([*args, *kwargs.values()]))))
    for part, batches in PRUNED.parts(Weights(model), TEXT, Run()):
        if part.model is model.model.layers[1]: part.model.register_forward_pre_hook(note, with_kwargs=True)
    assert dead == [True]


def test_block_by_block_is_the_default_where_the_second_moments_do_not_fit(monkeypatch):
    need = 4 * sum(l.read().shape[1]**2 for l in Weights(llama()).layers.values())
    monkeypatch.setattr(request, "available_bytes", lambda device: need)
    assert prune(llama(), data=TEXT, **SPARSEGPT).provenance["stages"] == "whole"
    monkeypatch.setattr(request, "available_bytes", lambda device: need - 1)
    chosen, asked = llama(), llama()
    with pytest.warns(UserWarning, match=f"need {need:,} bytes and {need - 1:,} are available"):
        plan = prune(chosen, data=TEXT, **SPARSEGPT)
    assert plan.provenance["stages"].startswith("block_by_block(")
    assert f"{need:,} bytes" in plan.provenance["stages_because"]
    assert plan == prune(asked, data=TEXT, stages=PRUNED, **SPARSEGPT) and same_weights(chosen, asked)
    assert prune(llama(), data=TEXT, stages="whole", **SPARSEGPT).provenance["stages"] == "whole"   # as the user says
    assert prune(llama(), score="wanda", data=TEXT).provenance["stages"] == "whole"                  # nothing quadratic
    # must see all groups
    assert prune(llama(), data=TEXT, allocate="global", **SPARSEGPT).provenance["stages"] == "whole"
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert prune(net, data=[torch.randn(32, 8)], **SPARSEGPT).provenance["stages"] == "whole"         # no blocks


def test_the_size_of_second_moments_is_what_they_hold():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 3, 1), nn.Flatten(), nn.Linear(3 * 36, 5))
    space = Weights(net)
    held = {n: g.numel() for n, g in PROVIDERS["gram"](space, [torch.randn(2, 4, 8, 8)]).items()}
    assert held == {n: PROVIDERS["gram"].size(layer) for n, layer in space.layers.items()}


def test_a_loss_that_runs_the_network_itself_runs_it_here_too():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = llama(3)
        def forward(self, ids, more): return self.net(ids).logits
    loss = batch_loss(lambda model, batch: model(batch, None).mean())
    one, other = Wrapped(), Wrapped()
    a = prune(one, data=[IDS], loss=loss, stages="whole", **SPARSEGPT)
    b = prune(other, data=[IDS], loss=loss, stages=DENSE, **SPARSEGPT)
    assert a == b and same_weights(one, other)


def test_names_and_provenance():
    assert "block_by_block" in STAGES
    plan = prune(llama(2), "wanda", .5, data=TEXT, stages="block_by_block")
    assert plan.provenance["stages"] == "block_by_block(propagate='pruned', store='cpu', device=None)"
    with pytest.raises(BadInput, match="unknown propagate 'prund': did you mean pruned"):
        block_by_block(propagate="prund")
    with pytest.raises(BadInput, match="unknown stages"): prune(llama(2), stages="block_for_block")
