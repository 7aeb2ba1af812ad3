"""What the tests of a real vLLM share: the model that `env` made, its tokens without Terrace, and a node."""

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


@pytest.fixture(scope="session")
def expected(model):
    """`expected(A, B)`: the tokens of the same engine without Terrace, for each prompt."""
    from engine import CROWD, LONGER, MANY_TOKENS, SHORT, TOKENS, A, B, Engine

    prompts = [A, B, LONGER, SHORT, *CROWD]
    with Engine(model) as engine:
        answers = engine.generate(*prompts, tokens=MANY_TOKENS)
    return lambda *asked, tokens=TOKENS: [answers[prompts.index(ids)][:tokens] for ids in asked]


@pytest.fixture
def node():
    node = Node()
    yield node
    node.close()
