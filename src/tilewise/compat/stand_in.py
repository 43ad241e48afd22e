"""Programs that import flash_attn and cannot be edited find Tilewise in its place.

    import tilewise.compat
    tilewise.compat.install()           # before anything imports flash_attn
    from flash_attn import flash_attn_func

`import flash_attn`, its submodules that are here, `flash_attn.cute` and `flash_attn_interface` then give the modules of
`tilewise.compat`; other submodules do not exist. `importlib.metadata` finds a distribution flash-attn too, since programs ask
it for the version. That version is flash-attn's whose interface this is, with a local part that says what it is:
2.8.3+tilewise.0.1.0 compares as at least 2.8.3. An installed flash-attn stays out of sight until `uninstall`.
"""
from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

STANDS_IN_FOR = "flash_attn", "flash_attn_interface"    # both are modules of this package
DISTRIBUTION = "flash-attn"


def install() -> None:
    """Puts Tilewise's modules in the place of flash-attn's, for this process. Again: nothing happens.

    Raises RuntimeError if flash-attn itself has been imported: what holds its functions would keep them.
    """
    ours = dict(_modules())
    for name in sorted(sys.modules):
        if name.split(".")[0] in STANDS_IN_FOR and sys.modules[name] is not ours.get(name):
            where = getattr(sys.modules[name], "__file__", None) or "elsewhere"
            raise RuntimeError(f"install: {name} has been imported from {where}: call tilewise.compat.install() before "
                               "anything imports it")
    sys.modules.update(ours)
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def uninstall() -> None:
    """Takes them out again: the next import finds what is installed. What was imported before stays as it is."""
    for name, module in _modules():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """The names that flash-attn has and the modules that stand in for them."""
    prefix = f"{__package__}."
    for top in STANDS_IN_FOR:
        module = importlib.import_module(prefix + top)
        yield top, module
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{prefix}{top}."):
            yield found.name.removeprefix(prefix), importlib.import_module(found.name)


class Finder:
    """Tells importlib.metadata of a distribution; finds no modules, they are in sys.modules."""

    def find_spec(self, fullname: str, path=None, target=None) -> None:
        return None

    def find_distributions(self, context) -> Iterable[importlib.metadata.Distribution]:
        asked = None if context.name is None else context.name.lower().replace("_", "-")
        return [Described()] if asked in (None, DISTRIBUTION) else []


class Described(importlib.metadata.Distribution):
    """The distribution flash-attn, as far as programs ask for it."""

    def read_text(self, filename: str) -> str | None:
        version = importlib.import_module(f"{__package__}.flash_attn").__version__
        texts = {"METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n"
                             "Summary: Tilewise in the place of flash-attn\n",
                 "top_level.txt": "\n".join(STANDS_IN_FOR)}
        return texts.get(filename)

    def locate_file(self, path):
        raise FileNotFoundError(f"{path}: {DISTRIBUTION} is Tilewise's stand-in and has no files")


FINDER = Finder()
