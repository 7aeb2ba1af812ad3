"""What is in an engine's identity, and what is not."""

import json
import struct

import pytest
from terrace import identity


def safetensors(path, tensors):
    """A file of this kind, by hand: length of the header, the header, the bytes."""
    spans, data = {}, b""
    for name, content in tensors.items():
        spans[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps({"__metadata__": {"format": "pt"}, **spans}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    safetensors(folder / "model.safetensors", {"query": bytes(1000), "key": bytes(3000)})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_fine_tuned_child_has_other_weights(model):
    """Same names, same shapes, same sizes: only bytes inside one tensor differ."""
    parent = identity.weights(str(model))
    safetensors(model / "model.safetensors", {"query": bytes(1000), "key": bytes(1500) + b"\x01" * 1500})
    assert identity.weights(str(model)) != parent


def test_a_copy_elsewhere_has_the_same_weights(model, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (other / "notes.txt").write_text("not weights")
    (other / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    assert identity.weights(str(model)) == identity.weights(str(other))


def test_one_more_file_is_other_weights(model):
    before = identity.weights(str(model))
    safetensors(model / "more.safetensors", {"value": bytes(10)})
    assert identity.weights(str(model)) != before


def test_a_file_of_another_kind_is_sampled_all_over(model):
    (model / "model.safetensors").unlink()
    weights = bytearray(100_000)
    (model / "model.gguf").write_bytes(weights)
    before = identity.weights(str(model))
    assert identity.weights(str(model / "model.gguf")) == before
    weights[50_000:51_000] = b"\x01" * 1000
    (model / "model.gguf").write_bytes(weights)
    assert identity.weights(str(model)) != before


def test_a_header_that_is_none_is_no_error(model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"not json")
    assert len(identity.weights(str(model))) == 32


def test_what_is_not_on_disk_is_not_found(tmp_path):
    assert identity.weights(str(tmp_path / "nowhere")) == "not found"
    assert identity.tokenizer(str(tmp_path)) == "not found"


def test_a_tokenizer_is_its_files(model):
    before = identity.tokenizer(str(model))
    (model / "tokenizer.json").write_text('{"model": 1}')
    assert identity.tokenizer(str(model)) != before


def test_a_name_does_not_depend_on_the_place(model):
    assert identity.name_of(str(model)) == "llama"
    assert identity.name_of("org/llama", "v2") == "org/llama@v2"


def test_a_long_text_keeps_its_head_and_stays_different():
    long = "é" * 300
    assert identity.text("short") == "short"
    assert len(identity.text(long).encode()) <= identity.TEXT_BYTES
    assert identity.text(long).startswith("é" * 100) and identity.text(long) != identity.text(long + "x")


def test_only_a_random_root_is_nobody_elses(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert identity.hash_root("sha256", "a") == identity.hash_root("sha256_cbor", "b") == ("default", True)
    ours, shared = identity.hash_root("xxhash", "a")
    assert not shared and ours != identity.hash_root("xxhash", "b")[0]
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    assert identity.hash_root("xxhash", "a") == identity.hash_root("xxhash", "b")
    assert identity.hash_root("sha256", "a")[0] != "default", "another seed, other hashes, another namespace"
    assert "12345" not in identity.hash_root("xxhash", "a")[0], "a seed may be a secret"
