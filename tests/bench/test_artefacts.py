"Artefacts: what is stored comes back, and what a stranger may have written is refused before it is used."
import hashlib
import io
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save

from pruning_bench.bench.artefacts import MOST_ARTEFACT_BYTES, check_tensors, get, get_metadata, put
from pruning_bench.core.inputs import BadInput

TENSORS = {"mask": torch.arange(77).reshape(7, 11) % 3 == 0, "values": torch.tensor([1.5, -2.]),
           "indices": torch.tensor([[3], [1]]), "correct": torch.tensor([0, 1, 1], dtype=torch.uint8),
           "half": torch.ones(3, dtype=torch.float16), "empty": torch.zeros(0, 4, dtype=torch.bool)}


def plant(folder, data):
    "Put bytes where an artefact of that content lies."
    sha = hashlib.sha256(data).hexdigest()
    (folder / f"{sha}.safetensors").write_bytes(data)
    return sha


def with_header(header, numbers=b""):
    "A safetensors file with any header."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def about(masks=None, metadata=None):
    return {"about": json.dumps({"masks": masks or {}, "metadata": metadata or {}})}


def test_what_is_stored_comes_back(tmp_path):
    sha = put(TENSORS, tmp_path, {"space": "weights", "shape": [1, 2]})
    back = get(sha, tmp_path)
    assert back.keys() == TENSORS.keys()
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in TENSORS.items())
    assert get_metadata(sha, tmp_path) == {"space": "weights", "shape": [1, 2]}


def test_the_name_is_the_content_whatever_the_order(tmp_path):
    shas = {put(dict(sorted(TENSORS.items(), reverse=r)), tmp_path / str(r), dict([("b", 1), ("a", 2)][::1 - 2 * r]))
            for r in (False, True)}
    assert len(shas) == 1
    assert put({**TENSORS, "values": torch.tensor([1.5, 2.])}, tmp_path) not in shas


def test_a_mask_costs_one_bit_per_weight(tmp_path):
    sha = put({"m": torch.ones(1000, 800, dtype=torch.bool)}, tmp_path)
    assert (tmp_path / f"{sha}.safetensors").stat().st_size < 100_000 + 300


@pytest.mark.parametrize("tensors, why", [
    ({"w": torch.zeros(2, dtype=torch.float64)}, "float64"), ({"w": [1, 2]}, "list"),
    ({"w": torch.zeros(MOST_ARTEFACT_BYTES // 4 + 1)}, "at most 8,000,000")])
def test_what_cannot_be_stored_leaves_nothing(tmp_path, tensors, why):
    with pytest.raises(BadInput, match=why): put(tensors, tmp_path)
    assert not list(tmp_path.iterdir())


def torch_pickle():
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    return buffer.getvalue()


ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
HOSTILE = {
    "pickle": (pickle.dumps(print), "pickle"), "zip": (torch_pickle(), "pickle"), "empty": (b"", "no safetensors"),
    "text": (b"just a line of text", "no safetensors"), "length": (struct.pack("<Q", 2**63) + b"{}", "no safetensors"),
    "binary": (with_header(b"\xff\xfe\xfd"), "no text"), "list": (with_header([1]), "no object"),
    "deep": (with_header(b"[" * 5000 + b"]" * 5000), "nested"), "twice": (with_header(b'{"a":1,"a":2}'), "twice"),
    "double": (save({"w": torch.zeros(2, dtype=torch.float64)}, about()), "F64"),
    "short": (with_header({"__metadata__": about(), "w": {**ONE, "data_offsets": [0, 9]}}, b"\0"), "no safetensors"),
    "overlap": (with_header({"__metadata__": about(), "a": ONE, "b": ONE}, b"\0"), "no safetensors"),
    "gap": (with_header({"__metadata__": about(), "a": ONE}, b"\0\0\0"), "no safetensors"),
    "bare": (save({"w": torch.zeros(2)}), "about"),
    "more": (save({"w": torch.zeros(2)}, {**about(), "x": "y"}), "about"),
    "no json": (save({"w": torch.zeros(2)}, {"about": "{"}), "no JSON"),
    "shape": (save({"m": torch.zeros(2, dtype=torch.uint8)}, about({"m": [[99], True]})), "does not fit"),
    "huge": (save({"m": torch.zeros(2, dtype=torch.uint8)}, about({"m": [[2**62, 2**62], True]})), "does not fit"),
    "float mask": (save({"m": torch.zeros(2)}, about({"m": [[16], True]})), "does not fit"),
    "gone": (save({"m": torch.zeros(2)}, about({"n": [[16], True]})), "does not hold"),
    "beyond": (save({"m": torch.full((1,), 255, dtype=torch.uint8)}, about({"m": [[3], True]})), "beyond"),
    "bare shape": (save({"m": torch.zeros(2, dtype=torch.uint8)}, about({"m": [16]})), "does not fit"),
    "markup": (save({"m": torch.zeros(2)}, about(metadata={"x": "<script>"})), "markup")}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path, name):
    data, why = HOSTILE[name]
    with pytest.raises(BadInput, match=why) as refused: get(plant(tmp_path, data), tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_changed_a_large_and_a_linked_file_are_refused(tmp_path):
    sha = put(TENSORS, tmp_path)
    file = tmp_path / f"{sha}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BadInput, match="another content"): get(sha, tmp_path)
    with open(file, "wb") as f: f.truncate(MOST_ARTEFACT_BYTES + 1)
    with pytest.raises(BadInput, match="at most 8,000,000 are read"): get(sha, tmp_path)
    file.unlink()
    with pytest.raises(BadInput, match="does not exist"): get(sha, tmp_path)
    (tmp_path / "real").write_bytes(whole)
    file.symlink_to(tmp_path / "real")
    with pytest.raises(BadInput, match="symbolic link"): get(sha, tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 62 + "/.", None, 7])
def test_a_name_that_is_no_digest_is_refused(tmp_path, name):
    with pytest.raises(BadInput, match="no SHA-256"): get(name, tmp_path)


def test_names_types_and_shapes_are_compared():
    wanted = {n: (t.dtype, t.shape) for n, t in TENSORS.items()}
    assert check_tensors(TENSORS, wanted, "plan") is TENSORS
    for change, why in (({"values": (torch.float16, (2,))}, "expected"),
                        ({"values": (torch.float32, (3,))}, "expected"),
                        ({"more": (torch.float32, (3,))}, "lacks")):
        with pytest.raises(BadInput, match=why): check_tensors(TENSORS, {**wanted, **change}, "plan")
    with pytest.raises(BadInput, match="too many"): check_tensors(TENSORS, {}, "plan")
