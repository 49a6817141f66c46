"Tasks: replayable batches, a cache that trains once, identity, and the promises of the embedded tasks."
import dataclasses, itertools, subprocess, sys, threading

import pytest
import torch
from torch import nn

from pruning_bench.bench.tasks import digits, digits_data, digits_ddpm, pydoc_text
from pruning_bench.bench.task import (Batches, cache_folder, load_or_train, content_hash, dense_outputs,
                                      narrower_network, find_task, tasks_table)
from pruning_bench.core.batches import as_batches
from pruning_bench.core.inputs import BadInput, as_loss, forward
from pruning_bench.core.recovery import finetune

NAMES = ["digits-mlp", "digits-cnn", "pydoc-llama", "digits-ddpm", "digits-data", "digits-data-noisy"]
each = pytest.mark.parametrize("name", NAMES)

def flat(batch):
    if isinstance(batch, torch.Tensor): return [batch]
    values = batch.values() if isinstance(batch, dict) else batch
    return [t for v in values for t in flat(v)]

def same(a, b): return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))

def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

@pytest.fixture
def cold(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"

@pytest.fixture
def quick():
    "digits-mlp with a training of 20 steps."
    t = find_task("digits-mlp")
    return dataclasses.replace(t, name="quick", train=finetune(20, lr=1e-2), config={"steps": 20})


# batches

def test_a_pass_can_be_repeated_and_an_epoch_has_no_duplicates():
    stream = Batches(lambda ids, g: ids, range(10), 4, 10, seed=1)
    first, again = list(stream), list(stream)
    assert len(first) == len(stream) == 10 and all(map(torch.equal, first, again))
    drawn = torch.cat(first)
    assert all(sorted(drawn[i:i+10].tolist()) == list(range(10)) for i in range(0, 40, 10))
    assert not torch.equal(drawn, torch.cat(list(Batches(lambda ids, g: ids, range(10), 4, 10, seed=2))))

def test_fewer_examples_than_a_batch_holds():
    assert [len(b) for b in Batches(lambda ids, g: ids, [3, 5], 7, 3, seed=0)] == [7, 7, 7]

def test_a_row_of_indices_per_round():
    drawn = list(Batches(lambda ids, g: ids, torch.arange(30).view(3, 10), 5, 9, seed=0))
    assert [set((ids // 10).tolist()) for ids in drawn] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3


# cache

def test_cache_trains_once_and_returns_the_same_bits(cold, quick):
    first = quick.dense(3)
    assert len(list(cold.glob("*.safetensors"))) == 1 and not list(cold.glob("*.part"))
    stamp = next(cold.glob("*.safetensors")).stat().st_mtime_ns
    assert same_weights(first, quick.dense(3)) and next(cold.glob("*.safetensors")).stat().st_mtime_ns == stamp
    assert same_weights(first, quick.trained(3)) and quick.record(3)["seed"] == 3

def test_parallel_callers_train_once(cold):
    calls = []
    def train(model):
        calls.append(1)
        nn.init.constant_(model.weight, 3.)
    models = [nn.Linear(2, 2) for _ in range(8)]
    crew = [threading.Thread(target=load_or_train, args=(m, "one", train)) for m in models]
    for t in crew: t.start()
    for t in crew: t.join()
    assert calls == [1] and all((m.weight == 3).all() for m in models)

def test_a_failed_training_leaves_nothing_behind(cold):
    def train(model): raise RuntimeError("no")
    with pytest.raises(RuntimeError): load_or_train(nn.Linear(2, 2), "fails", train)
    assert not list(cold.glob("*.safetensors")) and not list(cold.glob("*.part"))
    assert "seconds" in load_or_train(nn.Linear(2, 2), "fails", lambda model: None)

def test_another_recipe_is_another_file(cold, quick):
    longer = dataclasses.replace(quick, train=finetune(40, lr=1e-2), config={"steps": 40})
    assert not same_weights(quick.dense(), longer.dense()) and len(list(cold.glob("*.safetensors"))) == 2

def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PRUNING_BENCH_CACHE")
    assert "pruning_bench" in str(cache_folder())


# the noun

def test_dense_starts_from_initial(cold, quick):
    still = dataclasses.replace(quick, name="still", train=lambda model, data, loss, part=1.: None)
    assert same_weights(still.dense(5), quick.initial(5)) and not same_weights(quick.initial(5), quick.initial(6))

def test_the_callers_random_state_and_mode_survive(cold, quick):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = quick.dense().train()
    quick.evaluate(model)
    assert torch.equal(before, torch.get_rng_state()) and model.training

def test_identity_covers_recipe_protocol_and_data(quick):
    changed = [{"config": {"steps": 21}}, {"protocol": {"metrics": "other"}}, {"fingerprint": lambda: "other"},
               {"version": 2}, {"metric": "loss"}]
    digests = {quick.digest, *(dataclasses.replace(quick, **c).digest for c in changed)}
    assert len(digests) == 6 and all(len(d) == 64 for d in digests)

def test_content_hash_sees_shape_type_and_values():
    a = torch.arange(6.)
    assert len({content_hash(a), content_hash(a.view(2, 3)), content_hash(a.double()), content_hash(a + 1),
                content_hash(a, a)}) == 5

def test_narrower_counts_parameters():
    full, half = (sum(p.numel() for p in narrower_network(digits.mlp, 128)(f).parameters()) for f in (1, .5))
    assert full == 26122 and abs(half / full - .5) < .02

def test_the_tasks_without_a_download_are_listed_first():
    "In a fresh process, where no test has imported a chapter before the others."
    code = "from pruning_bench.bench.task import tasks_table; print(*tasks_table().index)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert listed[:len(NAMES)] == NAMES and set(listed) <= set(tasks_table().index)

def test_names():
    assert set(tasks_table().track) == {"cnn", "llm", "diffusion", "data"}
    with pytest.raises(BadInput, match="did you mean digits-cnn"): find_task("digit-cnn")
    with pytest.raises(BadInput, match="unknown split 'train'"):
        find_task("digits-mlp").evaluate(nn.Identity(), "train")


# the embedded tasks

@each
def test_batches_and_calibration_are_deterministic_and_fit_model_and_loss(name):
    t = find_task(name)
    assert all(map(same, t.calibration(0), t.calibration(0))) and not same(t.calibration(0)[0], t.calibration(1)[0])
    two = [list(itertools.islice(t.batches(s), 2)) for s in (0, 0, 1)]
    assert all(map(same, two[0], two[1])) and not same(two[0][0], two[2][0])
    model, batch = t.initial(0), as_batches(t.calibration(0))[0]
    loss = as_loss(t.loss)(model, batch)
    assert torch.isfinite(loss) and loss.requires_grad
    forward(model, batch)

def test_digests_are_the_same_in_another_process():
    code = f"from pruning_bench.bench.task import find_task; print(*(find_task(n).digest for n in {NAMES}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [find_task(n).digest for n in NAMES] == other

@each
def test_retraining_is_a_fraction_of_training(name):
    t = find_task(name)
    assert t.recover.steps <= .25 * t.train.steps

def test_splits_are_disjoint_and_stratified():
    images = [digits.digits(s)[0].flatten(1) for s in ("train", "validation", "test")]
    rows = [{tuple(r) for r in x.tolist()} for x in images]
    assert [len(x) for x in images] == [1197, 200, 400]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    texts = [set(pydoc_text.passages(s).split("\n\n")) for s in ("train", "validation", "test")]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]

def test_calibration_comes_from_the_training_split():
    train = {tuple(r) for r in digits.digits("train")[0].flatten(1).tolist()}
    assert all(tuple(r) in train for x, _ in find_task("digits-cnn").calibration(0) for r in x.flatten(1).tolist())
    text = pydoc_text.pydoc_tokens("train").unfold(0, 128, 1)
    assert all((text == w).all(1).any() for b in find_task("pydoc-llama").calibration(0)[:1]
               for w in b["input_ids"][:3])

def test_exactly_a_fifth_of_the_labels_is_wrong_and_tests_stay_clean():
    wrong = digits_data.noisy_labels() != digits.digits("train")[1]
    assert wrong.sum() == 239 and torch.equal(digits_data.noisy_labels(), digits_data.noisy_labels(.2, 777))
    for seed in (0, 1, 2):   # the order of the batches does not know which labels are wrong
        first = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))[:239]
        assert .1 < wrong[first].float().mean() < .3
    assert torch.equal(find_task("digits-data-noisy").examples().tensors[1], digits_data.noisy_labels())
    assert torch.equal(find_task("digits-data").examples().tensors[1], digits.digits("train")[1])

def test_keep_restricts_training_to_those_examples():
    t = find_task("digits-data")
    images = t.examples().tensors[0][[4, 8, 15]].flatten(1).tolist()
    assert all(r in images for x, _ in itertools.islice(t.batches(0, keep=[4, 8, 15]),
                                                        2) for r in x.flatten(1).tolist())

def test_sampling_is_deterministic_and_follows_the_noise():
    model, noise = find_task("digits-ddpm").initial(0), digits_ddpm.fixed_noise(3, 0)
    a, b = digits_ddpm.generate_digits(model, noise, steps=3), digits_ddpm.generate_digits(model, noise, steps=3)
    assert torch.equal(a, b) and a.shape == noise.shape and 0 <= a.min() and a.max() <= 1
    assert not torch.equal(a, digits_ddpm.generate_digits(model, digits_ddpm.fixed_noise(3, 1), steps=3))

def test_noise_is_mixed_in_by_the_schedule():
    x, noise = digits.digits("test")[0][:2], digits_ddpm.fixed_noise(2, 0)
    seen, target = digits_ddpm.noisy_inputs(x, torch.tensor([10, 900]), noise)
    share = digits_ddpm.digits_scheduler().alphas_cumprod[[10, 900]].view(2, 1, 1, 1)
    assert target is noise
    assert torch.allclose(seen["sample"], share.sqrt() * (2 * x - 1) + (1 - share).sqrt() * noise, atol=1e-6)

def test_tied_embeddings_survive_the_cache(cold):
    lm = dataclasses.replace(find_task("pydoc-llama"), name="tied", train=lambda model, data, loss, part=1.: None)
    model = lm.dense(0)
    assert model.lm_head.weight is model.model.embed_tokens.weight and same_weights(model, lm.initial(0))

@pytest.mark.parametrize("seed", range(3))
def test_dense_digits(seed):
    cnn, mlp = find_task("digits-cnn"), find_task("digits-mlp")
    assert cnn.evaluate(cnn.dense(seed))["accuracy"] >= .97 and mlp.accepts(mlp.evaluate(mlp.dense(seed))["accuracy"])

def test_dense_llama_beats_frequencies():
    t = find_task("pydoc-llama")
    assert t.evaluate(t.dense())["perplexity"] < pydoc_text.unigram_perplexity("test") / 4

def test_dense_ddpm_draws_digits():
    t = find_task("digits-ddpm")
    result = t.evaluate(t.dense(), dense=dense_outputs(t, 0, "test"))
    assert result["confidence"] >= .8 and t.accepts(result["kid-phi"]) and result["mse"] == 0
