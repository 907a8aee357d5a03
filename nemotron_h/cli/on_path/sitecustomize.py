"""`nemotron-h exec` puts this folder on PYTHONPATH: it registers the family in every Python that imports transformers.

Python imports a `sitecustomize` when it starts. This one waits until `transformers` is imported, which a process may
never do, and then imports the `nemotron_h` that it lies in. It also runs the `sitecustomize` that it stands in front
of. It runs in whatever Python the command uses, so it needs nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(os.path.dirname(_HERE))
_LOG = "NEMOTRON_H_EXEC_LOG"


class _WhenImported:
    """A finder that finds `transformers` where the others do, and has `_register` called once it is there."""

    def __init__(self) -> None:
        self._asked = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers" or self._asked:
            return None
        self._asked = True  # while the other finders are asked
        try:
            spec = find_spec(name)
        finally:
            self._asked = False
        if spec is None or spec.loader is None:
            return spec
        # The loader itself is kept: importlib.resources and inspect ask it for more than to load.
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    if "nemotron_h" not in sys.modules:  # it imports transformers, and registers itself
        import transformers

        spec = spec_from_file_location(
            "nemotron_h", os.path.join(_PACKAGE, "__init__.py"), submodule_search_locations=[_PACKAGE]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["nemotron_h"] = package = module_from_spec(spec)
        try:
            spec.loader.exec_module(package)
        except Exception as error:
            del sys.modules["nemotron_h"]
            raise ImportError(
                f"nemotron_h cannot register itself with transformers {transformers.__version__} of {sys.executable} "
                f"({type(error).__name__}: {error}); install versions there that it supports, or run the command "
                "without `nemotron-h exec`."
            ) from error
    _answer_by_name()
    if file := os.environ.get(_LOG):
        _log_models(file)


def _answer_by_name() -> None:
    """`transformers.NemotronHForCausalLM` is this package's, in every copy of the module.

    The command `transformers` imports the library a second time under the same name, and looks classes up in that copy.
    """
    import transformers

    package = sys.modules["nemotron_h"]
    module_type: Any = type(transformers)  # a lazy module, which asks __getattr__ for what it has not handed out yet
    look_up = module_type.__getattr__

    def answer(self: ModuleType, name: str) -> Any:
        if self.__name__ == "transformers" and name.startswith("NemotronH") and name in package.__all__:
            return getattr(package, name)
        return look_up(self, name)

    module_type.__getattr__ = answer


def _log_models(file: str) -> None:
    """A line for each class of this family that a model is made of, whoever wrote the class."""
    from transformers import PreTrainedModel

    seen = set()
    make = PreTrainedModel.__init__

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        if getattr(config, "model_type", None) == "nemotron_h" and name not in seen:
            seen.add(name)
            with open(file, "a", encoding="utf-8") as log:
                log.write(f"{os.getpid()} {os.path.basename(sys.argv[0])} {name}\n")
        make(self, config, *args, **kwargs)

    PreTrainedModel.__init__ = init


def _run_the_next() -> None:
    """The `sitecustomize` that Python would have imported without this folder."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _HERE]
    if spec := PathFinder.find_spec("sitecustomize"):
        assert spec.loader is not None
        # Under its own name: this module has done its work.
        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if "transformers" not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())  # type: ignore[arg-type]
_run_the_next()
