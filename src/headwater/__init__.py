"""Headwater: a parameter server for training and serving in Python.

    import headwater as hw

    session = hw.connect()                                    # $HEADWATER_ADDRESS, or a server embedded in this process
    session.register({"w": w}, hw.optim.SGD(lr=0.1))
    session.step({"w": gradient})                             # push, wait, pull
    session.parameters["w"]

With PyTorch, `import headwater.torch` gives `hw.torch.Optimizer`; importing headwater imports no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headwater import _errors as errors
from headwater import optim
from headwater._consistency import Consistency, asp, bsp, ssp
from headwater._data import Portion
from headwater._session import Session
from headwater._session import connect_session as connect

if TYPE_CHECKING:
    from headwater._server import Server

__version__ = "0.1.0"
__all__ = ["Consistency", "Portion", "Server", "Session", "asp", "bsp", "connect", "errors", "optim", "ssp"]


def __getattr__(name: str) -> Any:
    # What not everybody needs loads when it is first named.
    if name == "torch":
        return importlib.import_module("headwater.torch")
    if name == "Server":
        return importlib.import_module("headwater._server").Server
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")
