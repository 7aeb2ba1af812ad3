"""What the tests of a real vLLM share: the model that `env` made, and a node."""

import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", OMP_WAIT_POLICY="PASSIVE", VLLM_CPU_KVCACHE_SPACE="1")

from node import Node


@pytest.fixture(scope="session")
def model():
    return str(pathlib.Path(sys.prefix) / "model")


@pytest.fixture
def node():
    node = Node()
    yield node
    node.close()
