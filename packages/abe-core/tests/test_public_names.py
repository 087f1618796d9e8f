"""What each package exports: imports and `__all__` say the same, and importing it costs no more than it must."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import abe

PACKAGE = Path(abe.__file__).parent
MODULES = sorted(
    ".".join(("abe", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)
EXPORTING = sorted(
    ".".join(("abe", *path.parent.relative_to(PACKAGE).parts))
    for path in PACKAGE.rglob("__init__.py")
    if "__all__" in path.read_text()
)
LAZY = ["abe", "abe.testing"]


def imported_names(package: str) -> set[str]:
    """Return the names that the package's `__init__` imports from abe, those for the type checker included."""
    source = Path(importlib.import_module(package).__file__ or "").read_text()
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "abe"
        for alias in node.names
    }


def python(code: str, text: str = "") -> str:
    """Run code in a fresh interpreter, with its warnings as errors, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", EXPORTING)
def test_what_a_package_imports_and_what_it_exports_are_the_same_and_sorted(package: str) -> None:
    module = importlib.import_module(package)
    exported = list(module.__all__)
    assert exported == sorted(exported)
    assert len(exported) == len(set(exported))
    defined = {name for name in exported if getattr(getattr(module, name), "__module__", None) == package}
    assert set(exported) - defined - {"__version__"} == imported_names(package) & set(exported)
    if package not in {"abe.backends"}:
        assert imported_names(package) == set(exported) - defined - {"__version__"}


@pytest.mark.parametrize("package", LAZY)
def test_a_name_imported_when_asked_for_is_the_one_that_the_type_checker_sees(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__ or "").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("abe."):
            for alias in node.names:
                assert getattr(module, alias.name) is getattr(importlib.import_module(node.module or ""), alias.name)


@pytest.mark.parametrize("package", LAZY)
def test_a_package_with_lazy_names_lists_them_and_has_no_others(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense
    with pytest.raises(ImportError):
        exec(f"from {package} import nonsense")


def test_the_version_is_the_installed_distributions() -> None:
    assert abe.__version__ == version("abe-core")


FIRST = """
import os, sys, traceback
import asyncio, concurrent.futures, importlib.metadata, logging.handlers, msgspec, pytest  # once for all
for statement in sys.stdin.read().splitlines():
    child = os.fork()
    if not child:
        try:
            exec(statement)
        except BaseException:
            print(statement)
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_and_every_public_name_can_be_the_first_one_imported() -> None:
    names = [f"from {package} import {name}" for package in LAZY for name in importlib.import_module(package).__all__]
    statements = [f"import {module}" for module in MODULES] + names
    assert len(statements) > 60
    assert python(FIRST, "\n".join(statements)) == "", "a circle of imports shows where a module is imported first"


def test_importing_abe_imports_none_of_its_modules_and_no_third_party() -> None:
    loaded = python("import sys, abe; print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith(("abe.", "msgspec", "email"))] == []


def test_the_pytest_plugin_imports_nothing_of_the_library() -> None:
    loaded = python("import sys, abe.testing.plugin; print(*sys.modules)").split()
    ours = sorted(name for name in loaded if name.startswith(("abe", "msgspec")))
    assert ours == ["abe", "abe.testing", "abe.testing.plugin"]


QUIET = """
import logging, threading
from abe import *
library = logging.getLogger("abe")
print(logging.getLogger().handlers, library.handlers, library.level, threading.active_count())
"""


def test_importing_the_library_configures_no_logging_and_starts_no_thread() -> None:
    assert python(QUIET) == "[] [] 0 1"
