"""Fetch mamba-ssm, causal-conv1d, and the Triton that interprets their kernels, for `tests/kernels`.

    python tests/kernels/fetch_packages.py

Nothing is compiled or installed: what `requirements.txt` beside this file names is put into a folder of its own under
`.cache/kernels/` of this repository, which git ignores and only the tests' child processes look into. It does nothing
where they already are, and the test suite itself never downloads.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "kernels"
COMMAND = "python tests/kernels/fetch_packages.py"
SOURCES = ("mamba-ssm", "causal-conv1d")


def pinned() -> list[str]:
    lines = (line.strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def folder() -> Path:
    """Where the packages of these versions are for this Python, once fetched."""
    what = "\n".join([sys.implementation.cache_tag, *pinned()])
    return CACHE / hashlib.sha256(what.encode()).hexdigest()[:16]


def fetched() -> bool:
    return folder().is_dir()


def _pip(*arguments: str) -> None:
    # Their setup.py is asked for the version only; it would look for a CUDA compiler first.
    environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet", "--disable-pip-version-check"]
    subprocess.run(command, check=True, env=environment, stderr=subprocess.PIPE, text=True)


def unpack(archive: Path, package: str, into: Path) -> None:
    """Write the Python files of a package in a source distribution."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts[1:]  # the one top folder is the distribution's name and version
            if member.isfile() and parts[:1] == (package,) and ".." not in parts and member.name.endswith(".py"):
                target = into.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]


def download(into: Path) -> None:
    packages = into / "packages"
    for requirement in pinned():
        name = requirement.split("==")[0]
        if name in SOURCES:
            # Without build isolation pip would first install a torch of its own.
            _pip("download", requirement, "--no-binary", ":all:", "--no-build-isolation", "--dest", str(into))
            package = name.replace("-", "_")
            (archive,) = into.glob(f"{package}-*.tar.gz")
            unpack(archive, package, packages)
        else:
            _pip("install", requirement, "--only-binary", ":all:", "--target", str(packages))


def main() -> int:
    if fetched():
        print(f"kernels: {', '.join(pinned())} already in {folder()}")
        return 0
    print(f"kernels: downloading {', '.join(pinned())}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        try:
            download(Path(temporary))
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            if "No matching distribution found" in error.stderr:
                print("The package index does not have it, so tests/kernels is skipped.", file=sys.stderr)
                return 0
            print(f"It could not be downloaded: run `{COMMAND}` again.", file=sys.stderr)
            return 1
        # Moved at the end, so that a run which is cut short leaves nothing that looks complete.
        (Path(temporary) / "packages").rename(folder())
    print(f"kernels: in {folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
