"""What the core promises to its callers: help texts, spaces with one interface, and optional libraries."""
import inspect, sys
import pytest, torch, torchvision
from torch import nn
from pruning_bench import BadInput, Method, Plan, load_plan, load_pruned, methods, prune, pruning
from pruning_bench.core.allocate import ALLOCATORS
from pruning_bench.core.blocks import Blocks
from pruning_bench.core.inputs import optional
from pruning_bench.core.recovery import Preparation, no_preparation, remember_start, train_before_pruning
from pruning_bench.core.space import SPACES, Examples, GatedSpace, PartedSpace, Space, Weights, prunable_layers


def small_net(): return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
def small_vit(): return torchvision.models.VisionTransformer(16, 8, 4, 2, 32, 64)


@pytest.mark.parametrize("thing", [prune, pruning, Method, Plan], ids=lambda f: f.__name__)
def test_help_explains_every_parameter(thing):
    lines = inspect.getdoc(thing).splitlines()
    assert lines[0] and "raise" in "\n".join(lines).lower()
    rows = lines[lines.index("Parameters") + 2:]
    explained = {name.strip() for row in rows for name in row.partition(": ")[0].split(",") if row.partition(": ")[2]}
    assert explained == set(inspect.signature(thing).parameters)


METHODS_OF_SPACES = "names", "w", "cost", "alive", "reduce", "apply", "remove", "slices", "restore"


def test_every_registered_space_has_the_methods_of_the_protocol():
    spaces = dict(SPACES)
    assert {"weights", "examples", "blocks", "channels", "heads"} <= spaces.keys()
    for name, cls in spaces.items():
        missing = [m for m in METHODS_OF_SPACES if not callable(getattr(cls, m, None))]
        assert not missing and isinstance(cls.unit, str), (name, missing)


def test_spaces_satisfy_the_protocols():
    net = small_net()
    weights, examples, blocks = Weights(net), Examples(None, torch.arange(8.)), Blocks(small_vit())
    assert all(isinstance(s, Space) for s in (weights, examples, blocks)) and not isinstance(net, Space)
    assert isinstance(weights, PartedSpace) and isinstance(blocks, GatedSpace)
    assert not isinstance(examples, (PartedSpace, GatedSpace))


def test_preparations_have_the_names_of_their_functions():
    for record in (no_preparation, remember_start, train_before_pruning):
        assert isinstance(record, Preparation) and record.name == record.fn.__name__
    assert [r.trains for r in (no_preparation, remember_start, train_before_pruning)] == [False, False, True]


@pytest.mark.parametrize("name", ["uniform", "erk", "er", "uniform_plus", "keep_current"])
def test_allocators_that_read_only_shapes_say_so_and_do_so(name):
    allocate, space = ALLOCATORS[name], Weights(small_net())
    meta = {n: torch.empty(space.w(n).shape, device="meta") for n in space.names()}
    assert allocate.shapes_only and allocate(meta, .3, space) == allocate({n: space.w(n) for n in meta}, .3, space)


def test_scores_of_named_blocks_are_those_of_their_weights():
    vit = small_vit()
    space = Blocks(vit)
    leaf = {n: torch.rand_like(layer.read()) for n, layer in space.layers.items()}
    layers = prunable_layers(vit)
    def inside(layer, block): return any(layer.module is m for m in block.modules())
    expected = torch.stack([sum(leaf[n].sum() for n, layer in layers.items() if inside(layer, block))
                            for block in vit.encoder.layers])
    assert expected.min() > 0 and torch.allclose(space.reduce(space.path, leaf), expected)


def test_blocks_without_any_score_are_refused():
    vit = small_vit()
    before = {n: t.clone() for n, t in vit.state_dict().items()}
    with pytest.raises(BadInput, match="encoder_layer_2.*cannot be ranked"):
        prune(vit, score="magnitude", space="blocks", skip="encoder.layers.encoder_layer_2")
    assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items()) and len(vit.encoder.layers) == 4


def test_named_blocks_are_removed_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    vit, x = small_vit().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for p in vit.encoder.layers[1].parameters(): p.mul_(.1)
    plan = prune(vit, score="magnitude", space="blocks", sparsity=.25, data=[x])
    assert plan.masks == {"encoder.layers": plan.masks["encoder.layers"]} and len(vit.encoder.layers) == 3
    assert plan.masks["encoder.layers"].tolist() == [True, False, True, True]
    plan.save(tmp_path / "plan")
    fresh = small_vit()
    load_plan(tmp_path / "plan").apply(fresh)
    fresh.load_state_dict(vit.state_dict())
    again = load_pruned(tmp_path / "plan", small_vit())
    with torch.no_grad(): assert torch.equal(fresh.eval()(x), vit(x)) and torch.equal(again.eval()(x), vit(x))


def without(monkeypatch, *libraries):
    "As if some libraries were not installed."
    for loaded in [m for m in sys.modules if m.partition(".")[0] in libraries]: monkeypatch.delitem(sys.modules, loaded)
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] in libraries: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


CALLS = {"table": ("pandas", lambda plan: plan.table()), "diff": ("pandas", lambda plan: plan.diff(plan)),
         "plot": ("matplotlib", lambda plan: plan.plot()), "methods": ("pandas", lambda plan: methods())}


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_library_is_named_with_the_extra_that_installs_it(call, monkeypatch):
    library, run = CALLS[call]
    plan = prune(small_net(), "magnitude", .5)
    without(monkeypatch, library)
    with pytest.raises(BadInput) as refused: run(plan)
    assert f"needs {library}, which is not installed: pip install 'pruning_bench[bench]'" in str(refused.value)


@pytest.mark.parametrize("library", ["pandas", "jinja2"])
def test_a_plan_is_shown_as_text_without_the_libraries_of_tables(library, monkeypatch):
    plan = prune(small_net(), "magnitude", .5)
    assert "<table" in plan._repr_html_()
    without(monkeypatch, library)
    assert plan._repr_html_() is None and "0.5000 kept" in repr(plan)


def test_a_library_that_is_installed_and_broken_is_not_reported_as_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"): optional("broken_library", "bench")
