"Data in the forms that users have it: lists of numbers, examples, streams, columns, samplers, shared arguments."
import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler
from torch.utils.data import TensorDataset, WeightedRandomSampler

from pruning_bench import BadInput, prune
from pruning_bench.core.batches import Replay, as_batches, as_tensors
from pruning_bench.core.inputs import as_dataset, size_of, slice_batch
from pruning_bench.core.recovery import finetune
from pruning_bench.core.request import take_samples

X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3
IDS = torch.randint(3, 96, (40, 16), generator=torch.Generator().manual_seed(1))


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)).eval()

def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)).eval()


class Stream(IterableDataset):
    "The examples one after the other; endless where asked."
    def __init__(self, endless=False): self.endless = endless
    def __iter__(self): return iter(zip(*(itertools.cycle(t) if self.endless else t for t in (X, Y))))

class Arrays(Dataset):
    "Examples as arrays and numbers."
    def __len__(self): return len(X)
    def __getitem__(self, i): return X[i].numpy(), int(Y[i])


# streams and examples

FORMS = {"data set": lambda: TensorDataset(X, Y), "arrays": Arrays, "stream": Stream,
         "list of examples": lambda: [*zip(X, Y)], "generator of examples": lambda: zip(X, Y),
         "loader of a stream": lambda: DataLoader(Stream(), 64), "endless stream": lambda: Stream(True),
         "loader of an endless stream": lambda: DataLoader(Stream(True), 60),
         "endless generator": lambda: ((X, Y) for _ in itertools.count()),
         "generator of arrays": lambda: iter([(X.numpy(), Y.numpy())])}

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["wanda", "obd"])
def test_every_form_of_data_is_read_as_batches_and_no_further_than_needed(form, method):
    plan = prune(classifier(), method, .5, FORMS[form](), F.cross_entropy, calibration=60)
    whole = prune(classifier(), method, .5, [(X, Y)], F.cross_entropy, calibration=60)
    if form != "endless stream":   # its first batch is of 64 examples
        assert plan == whole and plan.cost["samples"] == whole.cost["samples"] == 60
    assert plan.cost["forward"] <= plan.cost["samples"] <= 64

@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_can_be_trained_on(form):
    model = classifier()
    start = [p.clone() for p in model.parameters()]
    prune(model, "magnitude", .5, FORMS[form](), F.cross_entropy, recover=finetune(steps=3))
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start))

def test_a_generator_is_read_once_and_replayed():
    drawn = []
    data = as_batches(drawn.append(i) or torch.full((4, 2), float(i)) for i in itertools.count())
    assert len([*take_samples(data, 10)]) == 3 == len(drawn) == len([*take_samples(data, 10)])
    assert [*Replay(iter(range(3)))] == [0, 1, 2]

class Once(IterableDataset):
    "A stream that is spent after one pass."
    def __init__(self): self.items = zip(X, Y)
    def __iter__(self): return self.items

class Counted:
    "Batches that can be asked for twice: the check and one pass."
    def __init__(self, passes): self.left = passes
    def __iter__(self):
        self.left -= 1
        return iter([(X, Y)] if self.left >= 0 else [])

@pytest.mark.parametrize("loader", [lambda d: d, lambda d: DataLoader(d, 20)])
def test_a_stream_that_is_spent_after_one_pass_is_kept(loader):
    model = classifier()
    prune(model, "magnitude", .5, loader(Once()), F.cross_entropy, recover=finetune(steps=8))
    plan = prune(classifier(), "wanda", .5, loader(Once()), F.cross_entropy, calibration=60)
    assert plan == prune(classifier(), "wanda", .5, [(X, Y)], F.cross_entropy, calibration=60)

def test_a_stream_that_does_not_begin_again_ends_the_training():
    with pytest.raises(BadInput, match="begins again at every pass"):
        prune(classifier(), "magnitude", .5, Counted(4), F.cross_entropy, recover=finetune(steps=50))
    with pytest.raises(BadInput, match="yields no batch"): prune(classifier(), "wanda", .5, Counted(0))

def test_batches_of_a_stream_are_not_stacked_once_more():
    class Pictures(IterableDataset):
        def __iter__(self): return iter([(torch.zeros(5, 3, 4, 4), torch.zeros(5, dtype=torch.long))] * 2)
    assert [b[0].shape for b in as_batches(Pictures())] == [(5, 3, 4, 4)] * 2


# lists of numbers, and columns

def test_lists_of_numbers_become_tensors_and_short_rows_are_marked():
    batch = as_tensors({"input_ids": [[1, 2, 3], [4]], "labels": [[1, 2, 3], [4]], "use_cache": False, "name": "a"})
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]] and batch["use_cache"] is False
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    same = {"more": [torch.ones(2)], "x": torch.ones(2, 2)}
    assert as_tensors(same) is same

COLUMNS = {"lists": lambda d: d, "torch": lambda d: d.with_format("torch"), "numpy": lambda d: d.with_format("numpy"),
           "pandas": lambda d: d.with_format("pandas"), "stream": lambda d: d.to_iterable_dataset(),
           "loader": lambda d: DataLoader(d, 16), "loader of tensors": lambda d: DataLoader(d.with_format("torch"), 16),
           "transformed": lambda d: d.with_transform(lambda b: {"input_ids": torch.tensor(b["input_ids"])}),
           "loader of a stream": lambda d: DataLoader(d.to_iterable_dataset(), 16)}

@pytest.mark.parametrize("form", COLUMNS)
def test_a_data_set_with_columns_is_batched_in_every_format(form):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "text": ["a"] * len(IDS), "row": list(range(40))})
    plan = prune(llama(), "wanda", .5, COLUMNS[form](table))
    assert plan == prune(llama(), "wanda", .5, [{"input_ids": IDS}]) and plan.cost["samples"] == 40

def test_columns_that_no_model_can_read_are_refused_before_work():
    datasets = pytest.importorskip("datasets")
    text = datasets.Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(BadInput, match="'text'.*tokenize"): prune(llama(), "wanda", .5, text)
    with pytest.raises(BadInput, match="'train'.*one of them"):
        prune(llama(), "wanda", .5, datasets.DatasetDict({"train": text}))

def test_examples_can_be_chosen_from_columns():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = classifier()
        def forward(self, x, labels=None):
            out = self.net(x)
            return OrderedDict(loss=F.cross_entropy(out, labels), logits=out)
    assert len(prune(None, "random-subset", .5, table).subset(table)) == 30
    batch = next(iter(as_batches(table, model=Named())))
    assert batch["labels"].tolist() == Y.tolist() and batch["x"].shape == X.shape


# samplers

SAMPLERS = {"random": lambda i: dict(sampler=SubsetRandomSampler(i)), "list": lambda i: dict(sampler=i),
            "batches": lambda i: dict(batch_sampler=BatchSampler(SubsetRandomSampler(i), 8, False)),
            "list of batches": lambda i: dict(batch_sampler=[i[:20], i[20:]]),
            "weighted": lambda i: dict(sampler=WeightedRandomSampler([float(k in i) for k in range(60)], 30))}

@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("method", ["random-subset", "el2n"])
def test_only_examples_that_the_loader_draws_are_chosen(kind, method):
    few = list(range(59, 29, -1))
    loader = DataLoader(TensorDataset(X, Y), **SAMPLERS[kind](few))
    short = {} if method == "random-subset" else {"epochs": 1, "runs": 1}
    plan = prune(classifier(), method, .5, loader, F.cross_entropy, **short)
    assert plan.masks["examples"].shape[-1] == 30 and len(plan.kept()) == 15
    chosen = [torch.equal(X[i], x) for x, *_ in plan.subset(loader) for i in range(30)]
    assert len(plan.subset(loader)) == 15 and not any(chosen)
    with pytest.raises(BadInput, match="among 30 examples, but the data has 60"): plan.subset(loader.dataset)

def test_a_shuffling_loader_stands_for_its_whole_data_set():
    data = TensorDataset(X, Y)
    for loader in (DataLoader(data, 8, shuffle=True), DataLoader(data, 8), DataLoader(data, batch_size=None)):
        assert as_dataset(loader) is data
    assert len(as_dataset(DataLoader(Subset(data, range(7)), 2))) == 7


def test_the_examples_of_a_generator_can_be_chosen_when_it_ends():
    assert len(prune(None, "random-subset", .5, iter([(X[:20], Y[:20]), (X[20:], Y[20:])])).kept()) == 30
    assert len(prune(None, "random-subset", .5, zip(X, Y)).kept()) == 30
    with pytest.raises(BadInput, match="not ended"):
        prune(None, "random-subset", .5, (torch.ones(1) for _ in itertools.count()))


# labels

@pytest.mark.parametrize("labels, reason", [(Y + 1, "from 1 to 3"), (torch.where(Y == 0, -100, Y), "from -100 to 2")])
def test_class_numbers_without_a_class_are_refused_before_training(labels, reason, monkeypatch):
    monkeypatch.setattr("pruning_bench.data.dynamics.fit", lambda *_: pytest.fail("a training has begun"))
    with pytest.raises(BadInput, match=reason):
        prune(classifier(), "el2n", .5, TensorDataset(X, labels), F.cross_entropy, epochs=1, runs=1)

def test_class_numbers_of_a_criterion_are_named():
    with pytest.raises(BadInput, match="from 1 to 3.*0 to 2"):
        prune(classifier(), "obd", .5, [(X, Y + 1)], F.cross_entropy)

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_labels_of_one_byte_are_class_numbers(dtype):
    plans = [prune(classifier(), "el2n", .5, TensorDataset(X, Y.to(d)), F.cross_entropy, epochs=1, runs=1)
             for d in (dtype, torch.int64)]
    assert plans[0] == plans[1]


# arguments that examples share

@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("method", ["obd", "attention-heads", "wanda"])
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_positions_may_be_shared_by_all_examples(make, method, rows):
    positions = torch.arange(16) if rows is None else torch.arange(16).expand(rows, 16)
    if make is llama and rows is None: positions = positions[None]   # this model asks for two dimensions
    plain = prune(make(), method, .5, [{"input_ids": IDS[:4]}])
    assert plain == prune(make(), method, .5, [{"position_ids": positions, "input_ids": IDS[:4]}])

@pytest.mark.parametrize("extra", [{"attention_mask": None}, {"use_cache": False}, {"return_dict": True}])
def test_flags_and_missing_arguments_are_passed_on(extra):
    batches = [{**extra, "input_ids": IDS[:4]}, {"input_ids": IDS[:4], **extra}, {"input_ids": IDS[:4]}]
    plans = [prune(llama(), "obd", .5, [b]) for b in batches]
    assert plans[0] == plans[1] == plans[2] and plans[0].cost["samples"] == 4

def test_what_has_no_row_per_example_stays_whole():
    batch = {"position_ids": torch.arange(4), "flag": True, "none": None, "scale": torch.tensor(2.),
             "x": torch.ones(4, 2), "table": torch.ones(7, 2), "input_ids": torch.ones(4, 4)}
    one = slice_batch(batch, slice(1, 2))
    assert {k: len(v) for k, v in one.items() if isinstance(v, torch.Tensor) and v.dim()} == {
        "position_ids": 4, "x": 1, "table": 7, "input_ids": 1}
    assert size_of({"a": torch.ones(7, 2), "b": torch.ones(4), "c": torch.ones(4, 1)}) == 4
    axes = {"position_ids": torch.zeros(3, 5, 8), "input_ids": torch.zeros(5, 8)}
    assert slice_batch(axes, slice(0, 2))["position_ids"].shape == (3, 2, 8)
    pictures = [torch.zeros(3, 8, 8)] * 2, [{"boxes": torch.zeros(5, 4)}] * 2
    few = slice_batch(pictures, slice(0, 1))
    assert size_of(pictures) == 2 and [len(p) for p in few] == [1, 1] and few[0][0].shape == (3, 8, 8)
    two = (torch.zeros(6, 2), torch.zeros(6, 3)), torch.zeros(6)
    assert size_of(two) == 6 and [t.shape[0] for t in slice_batch(two, torch.tensor([0, 4]))[0]] == [2, 2]
    assert size_of({"flag": True}) == 1 and np.isclose(size_of(torch.tensor(1.)), 1)


# weights that cannot be pruned as they are

def test_weights_that_are_elsewhere_or_in_codes_are_refused():
    meta, coded, int8 = classifier().to("meta"), classifier(), classifier()
    coded[2].weight = nn.Parameter(coded[2].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    int8[2].weight = nn.Parameter(torch.ones(3, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match="meta device"): prune(meta, "magnitude", .5)
    for model, kind in ((coded, "float8_e4m3fn"), (int8, "int8")):
        with pytest.raises(BadInput, match=f"'2.weight' are quantised .{kind}"): prune(model, "magnitude", .5)
        assert prune(model, "magnitude", .5, skip=("2*",)).density == .5

def test_an_overflow_is_called_an_overflow():
    model = classifier().half()
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(BadInput, match="not finite.*bfloat16"): prune(model, method, .5, [(6e4 * X).half()])

def test_no_calibration_example_is_refused_with_its_number():
    with pytest.raises(BadInput, match="calibration=0"): prune(classifier(), "wanda", .5, [X], calibration=0)
    assert prune(classifier(), "magnitude", .5, [X], calibration=0).density == .5
