"An exception or an interruption at any point of a pruning leaves the model, and the process, as they were."
import functools
import random
import zlib
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from pruning_bench import BadInput, build, prune, pruning
from pruning_bench.core.mask import MEMORY, MaskedParameter, masks_of
from worlds import NAMES, settings_of, world

TRAINED = [n for n in NAMES if build(n).rule and build(n).space != "examples"]   # these prune inside a training
ERRORS = (KeyboardInterrupt, RuntimeError, MemoryError, FloatingPointError)   # Ctrl-C, a bug, memory, divergence


class Events(TorchDispatchMode):
    "Counts tensor operations, calls of modules and changes of their attributes, and raises before one of them."
    def __init__(self, at=None, error=RuntimeError):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def happen(self):
        self.count += 1
        if self.count == self.at:
            raise self.error("an interruption, for a test")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.happen()
        return func(*args, **(kwargs or {}))


WATCHED = ("__call__", "__setattr__", "__delattr__", "register_forward_hook", "register_forward_pre_hook")


@contextmanager
def events(at=None, error=RuntimeError):
    "Watch the block inside; raise before the event number `at`."
    mode, own = Events(at, error), {name: getattr(nn.Module, name) for name in WATCHED}

    def watched(name):
        @functools.wraps(own[name])
        def method(self, *args, **kwargs):
            mode.happen()
            return own[name](self, *args, **kwargs)
        return method

    try:
        for name in WATCHED:
            setattr(nn.Module, name, watched(name))
        with mode:
            yield mode
    finally:
        for name, method in own.items():
            setattr(nn.Module, name, method)


def content(value):
    "The entries of a container, or the value itself, for a comparison by `is`."
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def memory(t):
    return None if t is None else MEMORY.__get__(t).detach().clone()


def hooks(t):
    found = (t._backward_hooks, getattr(t, "_post_accumulate_grad_hooks", None))
    return [len(h) if h else 0 for h in found]


class Picture:
    "What can be seen of a model: its tree, attributes, hooks, tensors, masks, gradients, modes and configuration."
    def __init__(self, model):
        named = dict(model.named_modules())
        self.tree = [(n, m, type(m), m.training) for n, m in named.items()]
        self.attributes = {n: {k: (v, content(v)) for k, v in vars(m).items()} for n, m in named.items()}
        self.tensors = {(n, k): (t, type(t), memory(t), t.requires_grad, t.grad, memory(t.grad), hooks(t))
                        for n, m in named.items() for k, t in [*m._parameters.items(), *m._buffers.items()]
                        if t is not None}
        self.masks = masks_of(model)
        self.state = list(model.state_dict())
        configs = [m.config for m in named.values() if hasattr(m, "config")]
        self.configs = [(c, repr(c), list(vars(c))) for c in configs]

    def check(self, other):
        assert [(n, id(m), t, mode) for n, m, t, mode in self.tree] == \
            [(n, id(m), t, mode) for n, m, t, mode in other.tree]
        for n, own in self.attributes.items():
            assert list(own) == list(other.attributes[n]), n
            for k, (value, entries) in own.items():
                now, entries_now = other.attributes[n][k]
                assert (now is value or now == value) and type(now) is type(value), (n, k)
                assert len(entries) == len(entries_now), (n, k)
                assert all(a is b or a == b for a, b in zip(entries, entries_now)), (n, k)
        assert list(self.tensors) == list(other.tensors)
        for k, (t, kind, values, flag, grad, slope, hooked) in self.tensors.items():
            now, kind_now, values_now, flag_now, grad_now, slope_now, hooked_now = other.tensors[k]
            assert now is t and kind_now is kind and flag_now == flag and hooked_now == hooked, k
            assert values.dtype == values_now.dtype and torch.equal(values, values_now), k
            assert grad_now is grad and (grad is None or torch.equal(slope, slope_now)), k
        assert list(self.masks) == list(other.masks)
        assert all(torch.equal(m, other.masks[n]) for n, m in self.masks.items())
        assert self.state == other.state
        assert [(id(c), text, keys) for c, text, keys in self.configs] == \
            [(id(c), text, keys) for c, text, keys in other.configs]


def process():
    "What a pruning could leave behind outside the model."
    return (len(torch_optimizer._global_optimizer_post_hooks), len(torch_optimizer._global_optimizer_pre_hooks),
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled(),
            len(_get_current_dispatch_mode_stack()), len(nn.modules.module._global_forward_hooks))


def lived_in(name):
    "A model as people have it: masks and gradients from before, a frozen bias, a hook, modules in both modes."
    model, data, loss = world(name)
    if build(name).space == "weights":
        prune(model, "magnitude", .25)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    frozen = [p for p in model.parameters() if p.dim() == 1]
    frozen[0].requires_grad_(False)
    list(model.children())[-1].train()
    calls = []
    handle = model.register_forward_hook(lambda m, args, out: calls.append(1))
    return model, data, loss, handle


def use(name, model, data, loss):
    return prune(model, name, .5, data, loss, **settings_of(name))


def train_inside(name, model, data, loss):
    "The loop of a user around a method that prunes inside a training."
    settings = {k: v for k, v in settings_of(name).items() if k not in ("steps", "lr")}
    batches = [data[0], data[1]]
    with pruning(model, name, .5, steps=len(batches), data=data, loss=loss, **settings) as loop:
        trained = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.SGD(trained, .1, momentum=.9)
        for batch in batches:
            opt.zero_grad()
            value = model(**batch, labels=batch["input_ids"]).loss if loss is None else loss(model(batch[0]), batch[1])
            value.backward()
            opt.step()
    return loop.plan


# spaces that try several ways, and go on where one of them fails
TRIED = "channels", "heads", "blocks", "residuals", "sublayers"


@functools.cache
def whole_run(name, work):
    "How many events a run to the end has, and its plan."
    model, data, loss, _ = lived_in(name)
    torch.manual_seed(0)
    with events() as seen:
        plan = work(name, model, data, loss)
    return seen.count, plan


def interrupt(name, work, part, parts, seed):
    "Interrupt a run at a random point of one part of it, and look; `--seed` chooses other points."
    number = random.Random(zlib.crc32(f"{name} {part} {seed}".encode()))
    n, expected = whole_run(name, work)
    at = min(n, 1 + int(n * (part + number.random()) / parts))
    model, data, loss, handle = lived_in(name)
    torch.manual_seed(0)
    before, around, error, state = Picture(model), process(), number.choice(ERRORS), torch.get_rng_state()
    try:
        with events(at, error):
            plan = work(name, model, data, loss)
    # a trial run of the model explains what went wrong, and so does `load_state_dict` of torch
    except (error, BadInput, RuntimeError) as e:
        assert "for a test" in str(e)
    else:   # groups have a second way to be traced, and a configuration without some blocks has further candidates
        assert issubclass(error, Exception) and build(name).space in TRIED and plan == expected
        return
    before.check(Picture(model))
    assert process() == around
    if work is use:   # a loop of the user draws its own numbers
        assert torch.equal(torch.get_rng_state(), state)
    assert all(type(p) is MaskedParameter for n, p in model.named_parameters() if n in before.masks)
    handle.remove()
    assert not any(h.__module__ == __name__ for h in model._forward_hooks.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_pruning_leaves_everything_as_it_was(name, pytestconfig):
    interrupt(name, use, 0, 1, pytestconfig.getoption("seed"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("name", NAMES)
def test_a_pruning_interrupted_anywhere_leaves_everything_as_it_was(name, part, pytestconfig):
    interrupt(name, use, part, 12, pytestconfig.getoption("seed"))


@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_training_inside_leaves_everything_as_it_was(name, pytestconfig):
    interrupt(name, train_inside, 0, 1, pytestconfig.getoption("seed"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_interrupted_anywhere_leaves_everything_as_it_was(name, part, pytestconfig):
    interrupt(name, train_inside, part, 12, pytestconfig.getoption("seed"))
