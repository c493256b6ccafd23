"""Imports PLUME into a program that may have a `data` or a `model` of its own.

Our modules import each other as `data` and `model`, names that the program's own may have.  Here they become
modules of a package, plume_1a2b3c4d.data, and an `import data` in one of them means that one.  The program's
modules and its sys.path stay as they are, and a pickle finds its classes by the package's name.
"""

import builtins
import hashlib
import importlib
import os
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).resolve().parent.parent
PACKAGE = "plume_" + hashlib.blake2b(os.fsencode(HOME), digest_size=4).hexdigest()
NAMES = {file.stem for file in HOME.glob("*.py")} | {file.parent.name for file in HOME.glob("*/__init__.py")}


def load(name):
    """Our module `name`, as engine.stream; if the program has imported PLUME itself, the one it then has."""
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
        package.__path__ = [str(HOME)]
        sys.meta_path.insert(0, Finder)
    file = getattr(sys.modules.get("model"), "__file__", None)
    if file and Path(file).resolve() == HOME / "model.py":
        return importlib.import_module(name)
    return importlib.import_module(f"{PACKAGE}.{name}")


class Finder:
    """Where Python finds the modules of the package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if not name.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and spec.origin:
            spec.loader = Loader(name, spec.origin)
        return spec


class Loader(SourceFileLoader):
    """An import statement calls __import__ of the module's builtins: there it is `import_ours`."""

    def exec_module(self, module):
        module.__builtins__ = vars(builtins) | {"__import__": import_ours}
        super().exec_module(module)


def import_ours(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.partition(".")[0]
    if level or top not in NAMES:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = builtins.__import__(f"{PACKAGE}.{name}", globals, locals, fromlist)
    return module if fromlist else getattr(module, top)  # as Python does: `import a.b` binds a
