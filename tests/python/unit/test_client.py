"""The plain client, and the package's face."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Node, free_port, until

import terrace
from terrace import _terrace


def connect(node: Node, **settings: object) -> terrace.Client:
    found: list[terrace.Client] = []

    def connected() -> bool:
        try:
            found.append(terrace.Client(node.endpoint, "notes", **settings))  # type: ignore[arg-type]
        except ConnectionError:
            return False
        return True

    until(connected, "the node to listen")
    return found[0]


def test_blocks_come_back_as_they_went(node: Node) -> None:
    prompt = list(range(40))
    with connect(node, block_tokens=8) as client:
        assert client.block_tokens == 8 and client.difference is None
        assert client.lookup(prompt) == 0 and client.get(prompt) == []
        assert client.put(prompt, [b"one", b"two" * 50_000, b"three"]) == ["cached"] * 3
        assert client.lookup(prompt) == 3
        assert client.get(prompt) == [b"one", b"two" * 50_000, b"three"]
        assert client.get(prompt, first=2) == [b"three"]
        # Another prompt with the same head shares the head.
        assert client.get([*range(16), 99, *range(17, 40)]) == [b"one", b"two" * 50_000]
        assert client.put(prompt, [b"five"], first=4) == ["cached"]
        assert client.lookup(prompt) == 3
        assert client.stats()["ram_blocks"] == 4
        assert client.invalidate(prompt) == 4
        assert client.get(prompt) == []
    with pytest.raises(ConnectionError):
        client.lookup(prompt)


def test_wrong_calls_are_refused_in_words(node: Node) -> None:
    with connect(node) as client:
        with pytest.raises(ValueError, match="1 full blocks"):
            client.put(list(range(20)), [b"a", b"b"])
        with pytest.raises(OverflowError):
            client.lookup([-1])
    with pytest.raises(ConnectionError):
        terrace.Client(f"127.0.0.1:{free_port()}", timeout_ms=300)


def test_importing_the_package_imports_no_engine() -> None:
    heavy = "{'torch', 'numpy', 'vllm', 'sglang'}"
    code = f"import sys, terrace, terrace.identity; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse((Path(_terrace.__file__).parent / "_terrace.pyi").read_text())
    assert {name for name in dir(_terrace) if not name.startswith("_")} == set(named(stub.body))
    classes = {name: item for name, item in named(stub.body).items() if isinstance(item, ast.ClassDef)}
    for name, described in classes.items():
        methods = named(described.body)
        compiled = getattr(_terrace, name)
        assert {item for item in dir(compiled) if not item.startswith("_")} == set(methods) - {"__init__"}
        for item in described.body:
            if isinstance(item, ast.FunctionDef) and not item.decorator_list and not item.name.startswith("_"):
                given = [a.arg for a in (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)][1:]
                signature = getattr(compiled, item.name).__text_signature__
                for argument in given:
                    assert argument in signature, f"{name}.{item.name}{signature}"


def named(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a stub's body describes, by name; private names are the stub's own."""
    names = {item.name: item for item in body if isinstance(item, ast.FunctionDef | ast.ClassDef)}
    values = {ast.unparse(item.target): item for item in body if isinstance(item, ast.AnnAssign)}
    return {name: item for name, item in {**names, **values}.items() if not name.startswith("_") or name == "__init__"}


FORKED = """
import gc, os, sys, terrace
endpoint = sys.argv[1]
client = terrace.Client(endpoint, "notes")
client.put(list(range(16)), [b"one"])
child = os.fork()
if child == 0:
    for call in (client.stats, lambda: client.lookup([1] * 16), lambda: client.block_tokens):
        try:
            call()
        except ConnectionError as error:
            assert "fork" in str(error), error
        else:
            raise AssertionError("a call of the parent's client was answered")
    client.close()
    with terrace.Client(endpoint, "notes") as own:
        assert own.lookup(list(range(16))) == 1
    del client
    gc.collect()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert client.lookup(list(range(16))) == 1, "the parent's connections are as they were"
client.close()
"""


def test_a_forked_child_is_refused_in_words_and_leaves_the_parents_connections_alone(node: Node) -> None:
    connect(node).close()
    subprocess.run([sys.executable, "-c", FORKED, node.endpoint], check=True, timeout=60)
