"""torch without its compiler, until somebody compiles.

Each step of an optimiser imports `torch._dynamo`, to tell a compiler where to break its graph. Nothing is compiled here, but
the import alone takes as long as that of the rest of torch, at every start of a trainer. So a stand-in is put in its place,
with the two functions that eager training calls; whatever else is asked of it is answered by the real one, loaded then.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


class Uncompiled(ModuleType):
    """Stands for `torch._dynamo` where there is no graph."""

    def __init__(self) -> None:
        super().__init__(NAME)

    @staticmethod
    def graph_break(*_: object, **__: object) -> None:
        """Break no graph."""

    @staticmethod
    def disable(fn: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        """The function as it is, which nobody compiles."""
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)  # the import machinery's own questions
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        return getattr(importlib.import_module(NAME), name)


def leave_out_the_compiler() -> None:
    """Have this process import torch's compiler only when it is used."""
    sys.modules.setdefault(NAME, Uncompiled())
