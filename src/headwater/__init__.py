"""Headwater: a parameter server for training and serving in Python.

    import headwater as hw

    session = hw.connect()                                    # $HEADWATER_ADDRESS, or a server embedded in this process
    session.register({"w": w}, hw.optim.SGD(lr=0.1))
    session.step({"w": gradient})                             # push, wait, pull
    session.parameters["w"]

With PyTorch there is `hw.torch.Optimizer`, with Keras `hw.keras.ParameterServerStrategy`, with JAX `hw.jax.Optimizer`. Importing
headwater imports no framework: every name here loads its module, and NumPy, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater import _errors as errors
    from headwater import durability, optim
    from headwater._connect import connect_session as connect
    from headwater._consistency import Consistency, asp, bsp, ssp
    from headwater._data import LeasedData, Portion
    from headwater._lookup import Changes, Table, hash_ids
    from headwater._messages import ReplicaStats, TableStats
    from headwater._reader import Reader, lookup
    from headwater._replica import Replica
    from headwater._rows import Constant, Normal, RowPolicy, Uniform
    from headwater._server import Server
    from headwater._session import Session
    from headwater._subscription import Subscription, subscribe
    from headwater._table_copy import TableCopy
    from headwater._versions import Version, Versions, Weights

__version__ = "0.1.0"
__all__ = [
    "Changes",
    "Consistency",
    "Constant",
    "LeasedData",
    "Normal",
    "Portion",
    "Reader",
    "Replica",
    "ReplicaStats",
    "RowPolicy",
    "Server",
    "Session",
    "Subscription",
    "Table",
    "TableCopy",
    "TableStats",
    "Uniform",
    "Version",
    "Versions",
    "Weights",
    "asp",
    "bsp",
    "connect",
    "durability",
    "errors",
    "hash_ids",
    "lookup",
    "optim",
    "ssp",
    "subscribe",
]

#: Public name → where it lives: a module, or a module and the name there.
_HOMES = {
    "Changes": "_lookup:Changes",
    "Consistency": "_consistency:Consistency",
    "Constant": "_rows:Constant",
    "LeasedData": "_data:LeasedData",
    "Normal": "_rows:Normal",
    "Portion": "_data:Portion",
    "Reader": "_reader:Reader",
    "Replica": "_replica:Replica",
    "ReplicaStats": "_messages:ReplicaStats",
    "RowPolicy": "_rows:RowPolicy",
    "Server": "_server:Server",
    "Session": "_session:Session",
    "Subscription": "_subscription:Subscription",
    "Table": "_lookup:Table",
    "TableCopy": "_table_copy:TableCopy",
    "TableStats": "_messages:TableStats",
    "Uniform": "_rows:Uniform",
    "Version": "_versions:Version",
    "Versions": "_versions:Versions",
    "Weights": "_versions:Weights",
    "asp": "_consistency:asp",
    "bsp": "_consistency:bsp",
    "connect": "_connect:connect_session",
    "durability": "durability",
    "errors": "_errors",
    "hash_ids": "_lookup:hash_ids",
    "jax": "jax",
    "keras": "keras",
    "lookup": "_reader:lookup",
    "optim": "optim",
    "ssp": "_consistency:ssp",
    "subscribe": "_subscription:subscribe",
    "torch": "torch",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    module, _, attribute = home.partition(":")
    found = importlib.import_module(f"headwater.{module}")
    globals()[name] = found = getattr(found, attribute) if attribute else found
    return found
