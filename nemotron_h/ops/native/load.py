"""native.c, built where a C compiler is found and left out where none is.

Nothing needs it: all it does torch does too. It is built once a machine, beginning with the first decoded
token, and kept in the user's cache folder. Nothing waits for it: until it is there everything goes on in torch, and
a process that ends sooner drops it.
`NEMOTRON_H_KERNELS=0` keeps to torch; `CC` names another compiler, `XDG_CACHE_HOME` another cache.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from .signatures import declare

logger = logging.getLogger("nemotron_h")
SOURCE = Path(__file__).with_name("native.c")
ENVIRONMENT_VARIABLE = "NEMOTRON_H_KERNELS"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_lock = threading.Lock()
_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)  # RuntimeError: no home folder


# The plain dictionary on CPython, whose keys are encoded; elsewhere os.environ itself.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = ENVIRONMENT_VARIABLE if _ENVIRONMENT is os.environ else os.environ.encodekey(ENVIRONMENT_VARIABLE)


def switched_off() -> bool:
    """Whether the environment keeps every op to torch."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto").lower() in ("0", "off", "false", "no")


def library() -> ctypes.CDLL | None:
    return find()[0]


def reason() -> str:
    """Why there is a library, or why not, in words."""
    return find()[1]


loaded: Any = None  # what `find` found, where that is a library
_thread: threading.Thread | None = None
_building: str | None = None


def ready() -> bool:
    """Whether the library is there and wanted.

    Where it has to be built first, that begins now, beside whatever is going on."""
    global _thread
    if _ENVIRONMENT.get(_KEY) is not None and switched_off():
        return False
    if loaded is not None:
        return True
    if _thread is None:
        compiler = _compiler()
        if compiler is None:
            return library() is not None
        try:
            waits = not _path(compiler).exists()
        except _FAILURES:
            waits = False
        if not waits:
            return library() is not None
        with _lock:
            if _thread is None:
                _thread = threading.Thread(target=find, name="nemotron_h native.c", daemon=True)
                _thread.start()
                atexit.register(_drop)
    return False


def _drop() -> None:
    """At exit: what a compiler is still writing goes nowhere, and its folder goes."""
    if _building is not None:
        shutil.rmtree(_building, ignore_errors=True)


def find() -> tuple[ctypes.CDLL | None, str]:
    """The library, built first where it has to be, and why there is one or none."""
    global loaded
    # Looked up at every call, so that it may change; in the dictionary behind os.environ, whose own look-up, which
    # encodes the name and decodes the value, costs more than choosing a linear layer's path.
    if _ENVIRONMENT.get(_KEY) is not None and switched_off():
        return None, f"{ENVIRONMENT_VARIABLE}={os.environ[ENVIRONMENT_VARIABLE]}"
    if loaded is not None:
        return loaded
    with _lock:
        found = _built()
    if found[0] is not None:
        loaded = found
    return found


@functools.cache
def _built() -> tuple[ctypes.CDLL | None, str]:
    compiler = _compiler()
    if compiler is None:
        return None, "no C compiler was found (cc, gcc, clang), so decoding on this CPU runs in torch, slower"
    try:
        native = declare(ctypes.CDLL(str(_cached(compiler))))
    except _FAILURES as error:
        said = getattr(error, "stderr", None) or b""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        # The compiler's own words first; it may have failed without any.
        words = " ".join((said or str(error)).split())
        words = words if len(words) <= 200 else f"{words[:100]} ... {words[-100:]}"
        logger.info("native.c was not built with %s: %s", compiler, words)
        return None, f"{compiler} cannot build native.c ({words}), so decoding on this CPU runs in torch, slower"
    return native, f"native.c, built with {Path(compiler).name}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def _path(compiler: str) -> Path:
    """Where the built library is, or will be; its name says what it is built from, by what, on which processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, errors="replace", check=True, timeout=60
    ).stdout
    what = repr((SOURCE.read_text(), _FLAGS, version, _processor(), torch.__version__))
    name = f"native-{hashlib.sha256(what.encode()).hexdigest()[:20]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemotron_h"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK) or folder.stat().st_uid != os.getuid():
            raise PermissionError
    except OSError:
        folder = _own_folder(tempfile.gettempdir())
    return folder / name


@functools.cache
def _own_folder(parent: str) -> Path:
    """Of this process, gone with it: where the cache folder cannot be written."""
    folder = tempfile.mkdtemp(prefix="nemotron_h-", dir=parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cached(compiler: str) -> Path:
    path = _path(compiler)
    if not path.exists():
        _build(compiler, path)
    return path


def _build(compiler: str, path: Path) -> None:
    global _building
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as building:
        _building = building
        compiled, linked = Path(building) / "native.o", Path(building) / path.name
        # Linked without -fopenmp: the OpenMP that torch has loaded serves, so there is one pool of threads, whose
        # number `torch.set_num_threads` sets.
        for command in (
            [compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=120)
        os.replace(linked, path)
    _building = None


def _processor() -> str:
    """What -march=native means here: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()
