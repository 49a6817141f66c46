"Clocks, memory and energy: meters against things of known size, on fakes where the machine cannot be trusted."
import mmap, sys, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pruning_bench.bench.measure import latency
from pruning_bench.core.memory import peak_memory
from pruning_bench.bench.measure.latency import (EnergyCounter, measure_energy, gpu_joules, interleaved_timing,
                                                 compare_latency, energy_counters, latency_table, is_stable, stopwatch,
                                                 latency_summary)
from pruning_bench.core import memory
from pruning_bench.core.inputs import BadInput
from pruning_bench.core.driver import prune

MB = 2**20
CPU = torch.device("cpu")


# order statistics

def test_summary_by_hand():
    got = latency_summary({"a": [4, 2, 6, 8, 10], "b": [2, 1, 3, 4, 5]})
    # 0.9 of the way: 8 + 0.6 * 2
    assert got["a"]["min"] == 2 and got["a"]["p50"] == 6 and got["a"]["p90"] == pytest.approx(9.2)
    # twice as fast in every round, so in every resample
    assert got["b"]["speedup"] == got["b"]["low"] == got["b"]["high"] == 2
    assert got["a"]["speedup"] == 1 and all(isinstance(v, (float, bool)) for row in got.values() for v in row.values())

def test_pairing_makes_the_interval_narrow():
    g = np.random.default_rng(0)
    common = g.lognormal(0, .3, 60)
    paired = latency_summary({"a": common, "b": common / 2 * g.lognormal(0, .01, 60)})["b"]
    apart = latency_summary({"a": common, "b": g.permutation(common) / 2})["b"]
    assert 1.95 < paired["low"] < 2 < paired["high"] < 2.05
    assert apart["high"] - apart["low"] > 3 * (paired["high"] - paired["low"])

def test_speedup_is_reciprocal_and_free_of_units():
    g = np.random.default_rng(1)
    a, b = g.lognormal(0, .1, 30), g.lognormal(-1, .1, 30)
    ab, ba, ms = latency_summary({"a": a, "b": b})["b"], latency_summary({"b": b, "a": a})["a"], latency_summary(
        {"a": 1000 * a, "b": 1000 * b})["b"]
    assert ab["speedup"] * ba["speedup"] == pytest.approx(1)
    assert ab["low"] * ba["high"] == pytest.approx(1)
    assert ms["low"] == pytest.approx(ab["low"])

def test_the_interval_covers_the_truth():
    g = np.random.default_rng(2)
    rows = [latency_summary({"a": g.lognormal(0, .1, 40), "b": g.lognormal(-np.log(2), .1, 40)}, seed=i)["b"]
            for i in range(200)]
    assert .90 <= np.mean([r["low"] <= 2 <= r["high"] for r in rows]) <= 1

@pytest.mark.parametrize("times,calm", [([1.] * 20, True), ([1.] * 4, False), ([1.] * 17 + [2.] * 3, False),
                                        ([1.] * 19 + [2.], True),
                                        (np.linspace(1, 1.3, 20), False), (np.linspace(1.3, 1, 20), False),
                                        (np.linspace(1, 1.1, 20), True)])
def test_steady(times, calm): assert is_stable(times) == calm


# clocks

def test_rounds_go_back_and_forth():
    order = []
    times = interleaved_timing({n: lambda n=n: order.append(n) for n in "abc"}, lambda run: (run(), 1.)[1],
                               max_rounds=6,
                               min_seconds=.1)
    assert "".join(order) == "aaabbbccc" + "abccba" * 3 and all(t == [1.] * 6 for t in times.values())

def test_short_runs_are_repeated_and_divided():
    calls = []
    def timer(run):
        before = len(calls); run()
        return (len(calls) - before) * 1e-4
    times = interleaved_timing({"short": lambda: calls.append(1)}, timer, max_rounds=5, min_seconds=.001)
    assert len(calls) == 3 + 5 * 10 and times["short"] == pytest.approx([1e-4] * 5)

def test_the_budget_ends_the_rounds_but_not_before_five():
    times = interleaved_timing({"a": lambda: time.sleep(.002)}, stopwatch(CPU), max_rounds=10_000, max_seconds=0.)
    assert len(times["a"]) == 5

class Nap(nn.Module):
    def __init__(self, seconds): super().__init__(); self.seconds = seconds
    def forward(self, x): time.sleep(self.seconds); return x

def test_a_nap_takes_no_less_than_it_says():
    got = compare_latency({"long": Nap(.03), "short": Nap(.015)}, torch.zeros(1), pairs=9)
    assert got["models"]["short"]["min"] >= .015 and got["models"]["long"]["min"] >= .03
    assert got["device"] == "cpu" and got["threads"] == 1 and got["rounds"] == 9

class Work(nn.Module):
    done = 0   # products of all of them together
    def __init__(self, times): super().__init__(); self.times, self.w = times, nn.Parameter(torch.eye(256))
    def forward(self, x):
        for _ in range(self.times): x = x @ self.w
        Work.done += self.times
        return x

def test_twice_the_products_are_twice_the_time_of_a_clock_that_counts_them():
    def clock(run): before = Work.done; run(); return (Work.done - before) * 1e-3
    got = compare_latency({"once": Work(4), "twice": Work(8)}, torch.randn(128, 256), pairs=9, timer=clock)["models"]
    assert got["once"]["min"] == pytest.approx(.004)
    assert got["twice"]["min"] == pytest.approx(.008)
    assert got["twice"]["speedup"] == pytest.approx(.5)

def test_a_noisy_clock_says_unstable():
    g = np.random.default_rng(0)
    models = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    noisy = compare_latency(models, torch.zeros(1, 2), timer=lambda run: g.lognormal(-5, .6))
    assert not any(m["stable"] for m in noisy["models"].values()) and (latency_table(noisy) == "unstable").all().all()
    calm = compare_latency(models, torch.zeros(1, 2), timer=lambda run: (run(), .01)[1])
    assert all(m["stable"] for m in calm["models"].values())
    assert latency_table(calm).loc["b"].tolist() == ["10 ms", "10 ms", "10 ms", "1.00 (1.00 to 1.00)"]

def test_a_ratio_needs_both_to_be_stable():
    got = latency_summary({"noisy": np.random.default_rng(0).lognormal(-5, .6, 40), "calm": [.01] * 40})
    table = latency_table({"models": got})
    assert table.loc["calm", "p50"] == "10 ms"
    assert table.loc["calm", "speed-up"] == "unstable"
    assert table.loc["noisy", "p50"] == "unstable"

def test_latency_leaves_threads_and_modes_alone():
    net, before = nn.Sequential(nn.Linear(2, 2), nn.Dropout(.5)).train(), torch.get_num_threads()
    seen = []
    net[1].register_forward_hook(lambda m, a,
                                 o: seen.append((m.training, torch.get_num_threads(), torch.is_grad_enabled())))
    compare_latency({"net": net}, (torch.zeros(3, 2), torch.zeros(3)), pairs=5, cores=2)
    assert set(seen) == {(False, 2, False)} and net.training and net[1].training and torch.get_num_threads() == before

def test_models_on_two_devices_are_refused():
    with pytest.raises(BadInput, match="on cpu and meta"):
        compare_latency({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")}, torch.zeros(1, 2))
    with pytest.raises(BadInput, match="no device"): compare_latency({}, torch.zeros(1, 2))

@pytest.mark.gpu
def test_cuda_events():
    got = compare_latency({"once": Work(50).cuda(), "twice": Work(100).cuda()}, torch.randn(4096, 256), pairs=40)
    assert got["models"]["twice"]["speedup"] == pytest.approx(.5, rel=.3) and got["device"] != "cuda"


# memory

def known(meter):
    if meter.bytes is None: pytest.skip("this system does not tell the peak of a process")
    return meter.bytes / MB

def hold(megabytes):
    "Pages mapped for this and given back at once; an allocator may keep what it was handed."
    torch.frombuffer(mmap.mmap(-1, megabytes * MB), dtype=torch.uint8).fill_(1)

@pytest.mark.parametrize("megabytes", [40, 128])
def test_an_allocation_of_known_size(megabytes):
    with peak_memory() as taken: hold(megabytes)
    assert known(taken) == pytest.approx(megabytes, rel=.1)

def test_many_small_allocations_count_together_and_freed_memory_does_not_hide_the_next():
    for _ in range(2):
        with peak_memory() as taken: blocks = [torch.ones(MB // 4) for _ in range(64)]
        assert known(taken) == pytest.approx(64, rel=.1)
        del blocks

def test_peaks_in_turn_do_not_add_up():
    with peak_memory() as taken: hold(64); hold(64)
    assert known(taken) == pytest.approx(64, rel=.1)

def test_nested_meters():
    with peak_memory() as outer:
        hold(96)
        with peak_memory() as inner: hold(32)
        with peak_memory() as last: pass
    assert known(outer) == pytest.approx(96, rel=.1)
    assert known(inner) == pytest.approx(32, rel=.15)
    assert last.bytes < 4 * MB
    assert not memory.ACTIVE_METERS
    with peak_memory() as outer:
        kept = torch.ones(32 * MB // 4)
        with peak_memory() as inner: hold(64)
    assert known(inner) == pytest.approx(64, rel=.1) and known(outer) == pytest.approx(96, rel=.1) and len(kept)

def test_an_error_inside_still_ends_the_meter():
    with pytest.raises(ZeroDivisionError):
        with peak_memory() as taken: hold(40); 1 / 0
    assert known(taken) == pytest.approx(40, rel=.1) and not memory.ACTIVE_METERS

def status(folder, high, now):
    (folder/"status").write_text(f"Name:\tpython\nVmPeak:\t999999 kB\nVmHWM:\t{high} kB\nVmRSS:\t{now} kB\n")
    (folder/"clear_refs").write_text("")

def test_a_fake_proc(tmp_path):
    status(tmp_path, 900, 100)
    with peak_memory(folder=tmp_path) as taken:
        assert (tmp_path/"clear_refs").read_text() == "5"
        status(tmp_path, 350, 120)
    assert taken.bytes == 250 * 1024

@pytest.mark.parametrize("broken", ["nothing", "no mark", "no reset"])
def test_where_nothing_is_known_the_answer_is_none(broken, tmp_path):
    if broken == "no mark": (tmp_path/"status").write_text("Name:\tpython\n"); (tmp_path/"clear_refs").write_text("")
    if broken == "no reset":
        (tmp_path/"status").write_text("VmHWM:\t9 kB\nVmRSS:\t9 kB\n"); (tmp_path/"clear_refs").mkdir()
    with peak_memory(folder=tmp_path) as taken: hold(1)
    assert taken.bytes is None and not memory.ACTIVE_METERS

def test_pruning_reports_its_peak():
    net = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    cost = prune(net, "magnitude", .5).cost
    if cost["peak_bytes"] is None: pytest.skip("this system does not tell the peak of a process")
    assert 16 * MB < cost["peak_bytes"] < 160 * MB     # the scores alone are as large as the weights: 16 MB

@pytest.mark.gpu
def test_the_allocator_of_a_gpu_is_exact():
    with peak_memory("cuda") as taken: torch.ones(32 * MB // 4, device="cuda")
    assert taken.bytes == 32 * MB


# energy

def zone(folder, name, title, now, reach=1000):
    (folder/name).mkdir(exist_ok=True)
    for file, text in (("name", title), ("energy_uj", now), ("max_energy_range_uj", reach)):
        (folder/name/file).write_text(f"{text}\n")

def test_the_counter_wraps_around(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 900)
    one = EnergyCounter(tmp_path/"intel-rapl:0")
    for now, used in ((950, 50), (100, 200), (100, 200), (99, 1199)):
        zone(tmp_path, "intel-rapl:0", "package-0", now); one.tick()
        assert one.used == used

def test_only_whole_packages_are_counted(tmp_path):
    for name, title in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "package-1"),
                        ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, name, title, 0)
    assert [p.file.parent.name for p in energy_counters(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]
    with measure_energy(folder=tmp_path) as used:
        for name, now in (("intel-rapl:0", 30), ("intel-rapl:0:0", 20), ("intel-rapl:1", 12), ("intel-rapl:2", 60)):
            zone(tmp_path, name, "package" if name != "intel-rapl:2" else "psys", now)
    assert used.cpu == used.joules == pytest.approx(42e-6) and used.gpu is None

def test_a_long_block_is_followed_through_several_wraps(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    steps = iter([600, 200, 800, 400, 0])      # 600 microjoules each time
    class Slow(EnergyCounter):
        def tick(self):
            self.file.write_text(str(next(steps, 0)))
            super().tick()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(latency, "energy_counters", lambda folder: [Slow(tmp_path/"intel-rapl:0")])
        with measure_energy(folder=tmp_path, interval=.01) as used:
            end = time.time() + 5
            while next_left(steps) and time.time() < end: time.sleep(.005)
    assert used.cpu == pytest.approx(3000e-6)

def next_left(steps): return steps.__length_hint__()

def test_unreadable_counters_give_none_and_never_zero(tmp_path):
    with measure_energy(folder=tmp_path/"nothing") as none: pass
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path/"intel-rapl:0"/"energy_uj").unlink()
    (tmp_path/"intel-rapl:0"/"energy_uj").mkdir()    # as unreadable as a file of another user
    with measure_energy(folder=tmp_path) as locked: pass
    assert none.joules is none.cpu is none.gpu is locked.joules is locked.cpu is None

def test_a_gpu_counter_through_nvml(monkeypatch, tmp_path):
    counter = iter([1_000, 1_000, 8_500])
    fake = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
                           nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    with measure_energy("cuda", folder=tmp_path) as used: pass
    assert used.gpu == used.joules == 7.5 and used.cpu is None

def test_no_gpu_counter(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_joules(torch.device("cuda")) is None and gpu_joules(CPU) is None
