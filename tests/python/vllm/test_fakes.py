"""What the light unit tests take for vLLM is checked against vLLM itself: names, constructors, signatures."""

import importlib
import inspect
import pathlib
import sys

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "unit"))

import fake_vllm
from terrace.vllm import TerraceConnector


def real(place):
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("place", fake_vllm.FIELDS)
def test_what_the_connector_reads_is_there(place):
    kind = real(place)
    source = inspect.getsource(kind)
    for name in fake_vllm.FIELDS[place]:
        assert hasattr(kind, name) or f"{name}:" in source or f"self.{name} " in source or f"self.{name}:" in source, (
            name
        )


def test_an_event_takes_what_the_fake_takes():
    stored = real("vllm.distributed.kv_events:BlockStored")
    fields = fake_vllm.BlockStored.__dataclass_fields__
    event = stored(**{name: None for name in fields})
    assert all(hasattr(event, name) for name in fields)


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(TerraceConnector, inspect.isfunction)])
def test_every_method_is_called_as_the_base_class_says(name):
    base = getattr(KVConnectorBase_V1, name, None)
    if name.startswith("_") and name != "__init__":
        return
    assert base is not None, f"vLLM never calls {name}"
    ours, theirs = (inspect.signature(method).parameters for method in (getattr(TerraceConnector, name), base))
    assert list(ours) == list(theirs)


def test_nothing_abstract_is_left():
    assert not TerraceConnector.__abstractmethods__
