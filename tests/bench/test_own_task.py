"A task made from a user's own parts."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pruning_bench import BadInput, prune
from pruning_bench.bench.run import run_with_status, dense_run
from pruning_bench.bench.task import Task, describe_task
from pruning_bench.core.recovery import finetune

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()
DATA, TEST = TensorDataset(X[:150], Y[:150]), TensorDataset(X[150:], Y[150:])

def right(model, loader): return torch.cat([model(x).argmax(1) == y for x, y in loader]).float().mean()

@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    finetune(200, lr=1e-2)(net, [(X[:150], Y[:150])], F.cross_entropy)
    return net

def test_the_original_is_never_touched_and_numbers_are_its_own(net):
    before = copy.deepcopy(net.state_dict())
    own = Task.from_parts(net, DATA, TEST, F.cross_entropy, right, recover=finetune(20))
    assert own.metric == "right"
    assert own.evaluate(own.dense())["right"] == right(net.eval(), [(X[150:], Y[150:])]).item()
    run, _, plan = run_with_status(own, "global-magnitude", .75, 0)
    assert run["status"] == "ok"
    assert abs(plan.sparsity - .75) < .01
    assert run["quality"]["after_recover"]["right"] >= run["quality"]["after_prune"]["right"] - .2
    assert dense_run(own, 0)["quality"]["right"] > .8
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())

def test_runs_are_bit_identical(net):
    own = Task.from_parts(net, DATA, TEST, F.cross_entropy, right, recover=finetune(10))
    a, b = (run_with_status(own, "wanda", .5, 3)[0] for _ in range(2))
    assert a["quality"] == b["quality"] and a["plan"] == b["plan"]

def test_metrics_by_name_and_own_fields(net):
    own = Task.from_parts(net, DATA, TEST, F.cross_entropy, lambda m,
                          loader: {"loss": sum(F.cross_entropy(m(x), y).item() for x, y in loader), "n": 1.},
                          higher=False, name="mine", bound=9.)
    assert own.metric == "loss"
    assert own.accepts(own.evaluate(own.dense())["loss"])
    assert describe_task(own)["metric"] == "loss (low is good)"

def test_a_function_makes_a_task_that_can_train():
    own = Task.from_parts(lambda: nn.Linear(6, 2), DATA, TEST, F.cross_entropy, right,
                          dense_training=finetune(100, lr=.05), recover=finetune(10))
    assert own.evaluate(own.trained(0))["right"] > own.evaluate(own.initial(0))["right"] and own.batches(0).steps == 100

def test_data_of_dicts_and_the_models_own_loss():
    class Text(Dataset):
        def __len__(self): return 12
        def __getitem__(self, i): return {"x": X[i], "y": Y[i]}
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.inner = nn.Linear(6, 2)
        def forward(self, x, y):
            self.loss = F.cross_entropy(self.inner(x), y)
            return self
    own = Task.from_parts(Own(), Text(), Text(), None, lambda m, loader: sum(m(**b).loss for b in loader), higher=False)
    plan = prune(own.dense(), "magnitude", .5, own.calibration(0))
    assert plan.density == .5 and own.fingerprint() == own.fingerprint()

def test_other_data_is_another_task(net):
    make = lambda data: Task.from_parts(net, data, TEST, F.cross_entropy, right).digest
    assert make(DATA) == make(TensorDataset(X[:150].clone(), Y[:150])) != make(TensorDataset(X[:150] + 1, Y[:150]))

def test_refusals(net):
    with pytest.raises(BadInput, match="empty"):
        Task.from_parts(net, TensorDataset(X[:0], Y[:0]), TEST, F.cross_entropy, right)
    with pytest.raises(BadInput, match="counted and indexed|Dataset"):
        Task.from_parts(net, 7, TEST, F.cross_entropy, right)
