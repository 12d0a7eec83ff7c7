"""The rules of the house, kept by tests."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import headwater
from headwater import _errors
from headwater._errors import HeadwaterError
from headwater._messages import AnyMessage

SOURCE = Path(__file__).parent.parent / "src" / "headwater"

#: A module imports only from those above its own.
ORDER = [
    "_kernels", "_errors", "_limits",
    "optim", "durability", "_layout", "_consistency", "_leases", "_rows", "_book",
    "_files", "_log", "_sealed", "_snapshot", "_delta", "_versions", "_oip", "_metrics", "_messages", "_wire",
    "_plan", "_memory", "_transport", "_listener", "_table", "_dense",
    "_snapshots", "_keeper", "_servers", "_execution", "_coordinator", "_server",
    "_data", "_rows_file", "_peers", "_dense_link", "_table_link", "_lookup", "_table_copy", "_publishing", "_session",
    "_connect", "_subscription",
    "_replica", "_reader",
    "__init__",
    "_torch_embedding", "torch", "jax",
    "_keras_steps", "_keras_embedding", "keras",
    "_models", "_batching", "_serving", "_fleet", "_http",
    "_launch", "_display", "_demo", "_cli", "__main__",
]  # fmt: skip

FRAMEWORKS = ("torch", "jax", "keras", "tensorflow")
modules = pytest.mark.parametrize("module", [name for name in ORDER if name != "_kernels"])


def tree(module: str) -> ast.Module:
    return ast.parse((SOURCE / f"{module}.py").read_text())


def imports(module: str) -> set[str]:
    """Return what a module imports, anywhere in it; of headwater by the module's own name, else by the top name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {name.name.removeprefix("headwater.").split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            top, _, rest = (node.module or "").partition(".")
            if top != "headwater":
                found.add(top)
            elif rest:
                found.add(rest)
            else:
                found |= {name.name if name.name in ORDER else "__init__" for name in node.names}
    return found


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted({path.stem for path in SOURCE.iterdir() if path.suffix in (".py", ".pyi")})


@modules
def test_imports_point_one_way(module: str) -> None:
    below = ORDER[ORDER.index(module) :]
    if module in ("_torch_embedding", "torch", "jax"):
        below.remove("jax" if module == "jax" else "torch")  # the framework of this name
    if module in ("_keras_steps", "_keras_embedding", "keras"):
        below.remove("keras")
    assert imports(module).isdisjoint(below)


@modules
def test_a_name_of_a_module_has_one_value(module: str) -> None:
    """Else one of two limits that happen to share a name is in force for both."""
    targets = [t for node in tree(module).body if isinstance(node, ast.Assign) for t in node.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    assert sorted(names) == sorted(set(names))


@modules
def test_nothing_that_runs_a_peers_code_is_imported(module: str) -> None:
    assert imports(module).isdisjoint({"pickle", "marshal", "shelve", "dill", "cloudpickle"})


@modules
def test_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module))


def test_public_names_are_listed_and_sorted() -> None:
    adapters = {"jax", "keras", "torch"}  # not for `import *`
    assert headwater.__all__ == sorted(set(headwater._HOMES) - adapters)
    for name in headwater.__all__:
        assert getattr(headwater, name) is vars(headwater)[name]


def test_public_names_are_documented() -> None:
    for name in headwater.__all__:
        assert inspect.getdoc(getattr(headwater, name)), name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'headwater' has no attribute 'unheard'"):
        headwater.unheard  # noqa: B018


def run(code: str) -> str:
    """Return what a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_no_framework_is_imported() -> None:
    """Nor by what a server's process needs."""
    code = "import sys; from headwater import *; import headwater._cli, headwater._launch;"
    code += f"print([m for m in {FRAMEWORKS} if m in sys.modules])"
    assert run(code) == "[]"


def test_adapter_is_loaded_when_it_is_named() -> None:
    assert run("import headwater as hw, sys; hw.torch.Optimizer; print('torch' in sys.modules)") == "True"


def test_importing_does_nothing_but_import() -> None:
    code = """
import logging, os, signal, threading
before = dict(os.environ), os.getcwd(), logging.root.handlers[:], signal.getsignal(signal.SIGTERM)
import headwater
after = dict(os.environ), os.getcwd(), logging.root.handlers[:], signal.getsignal(signal.SIGTERM)
print(before == after, threading.active_count(), logging.getLogger("headwater").handlers)
"""
    assert run(code) == "True 1 []"


def errors_below(root: type[HeadwaterError]) -> dict[str, str]:
    """Return each error's base by name."""
    found: dict[str, str] = {}
    for child in root.__subclasses__():
        found |= {child.__name__: root.__name__} | errors_below(child)
    return found


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    drawn, stack = {}, ["HeadwaterError"]
    for line in (_errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│ ]*)[├└]── (\w+) +(.*)$", line)
        if match is None:
            continue
        depth, name, says = len(match[1]) // 4 + 1, match[2], match[3]
        drawn[name] = stack[depth - 1]
        stack[depth:] = [name]
        other = re.search(r"also a (\w+)", says)
        if other is not None:
            assert other[1] in {base.__name__ for base in vars(_errors)[name].__mro__}
    assert drawn == errors_below(HeadwaterError)


def test_every_error_is_in_the_one_place() -> None:
    for name in errors_below(HeadwaterError):
        assert vars(_errors)[name].__module__ == "headwater._errors"
        assert vars(_errors)[name].__doc__
    assert _errors.BY_NAME.keys() == errors_below(HeadwaterError).keys() | {"HeadwaterError"}


def test_every_kind_of_message_is_said_and_understood() -> None:
    """Made somewhere; and somewhere waited for, or told apart from others."""
    kinds = {kind.__name__ for kind in typing.get_args(AnyMessage)}
    said, heard = set(), set()
    for module in ORDER:
        if module in ("_kernels", "_messages"):
            continue
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
                heard.add(node.cls.id)
            elif isinstance(node, ast.Call):
                said |= {node.func.id} if isinstance(node.func, ast.Name) else set()
                for argument in node.args:  # isinstance(message, Beat), receive(Beat)
                    options = argument.elts if isinstance(argument, ast.Tuple) else [argument]
                    heard |= {option.id for option in options if isinstance(option, ast.Name)}
    assert kinds - said == set()
    assert kinds - heard == set()
