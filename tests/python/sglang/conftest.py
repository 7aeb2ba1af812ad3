"""SGLang without a GPU's libraries: its storage classes are plain Python, what they drag in is not.

`triton` and `torchvision` are imported, decorated with and named in annotations on the way to the storage classes, and
never called there. Modules that answer to any name stand in for them, once everything that looks whether they are
installed has looked.
"""

import importlib.abc
import importlib.machinery
import os
import pathlib
import sys
import types

import pytest

HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "unit"), str(HERE.parents[3] / ".venv-sglang")]
os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE")

import torch._inductor.compile_fx  # noqa: E402
import torch.utils.flop_counter  # noqa: E402, F401
import transformers.utils.import_utils  # noqa: E402

transformers.utils.import_utils.is_torchvision_available()


class Anything(types.ModuleType):
    """A module, a decorator and a type, whatever it is taken for."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        made = Anything(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *positional, **named):
        return positional[0] if len(positional) == 1 and callable(positional[0]) and not named else lambda it: it

    def __getitem__(self, index):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    names = ("triton", "torchvision")

    def find_spec(self, fullname, path=None, target=None):
        absent = fullname.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if absent else None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Absent())

from node import Node  # noqa: E402


@pytest.fixture(scope="session")
def node():
    node = Node()
    yield node
    node.close()
