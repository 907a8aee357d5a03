"""Fetch the tests that belong to the installed `transformers`, for `tests/library/test_model_tester.py`.

    python tests/library/fetch.py

The wheel holds no tests, the source distribution on the package index does. This downloads it with pip, without its
dependencies, and unpacks only its `tests/` into `.cache/transformers-tests/<version>/` of this repository, which git
ignores. It does nothing where they already are, and the test suite itself never downloads.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests"
COMMAND = "python tests/library/fetch.py"


def version() -> str:
    return importlib.metadata.version("transformers")


def folder() -> Path:
    """Where the tests of the installed version are, once fetched."""
    return CACHE / version() / "tests"


def fetched() -> bool:
    return (folder() / "test_modeling_common.py").exists()


def download(into: Path) -> Path:
    """The source distribution of the installed version, downloaded into a folder."""
    command = [sys.executable, "-m", "pip", "download", f"transformers=={version()}", "--no-deps", "--dest", str(into)]
    command += ["--no-binary", "transformers", "--disable-pip-version-check", "--quiet"]
    if importlib.util.find_spec("setuptools") is not None:
        # pip only asks the sources for their metadata; without this it first installs a setuptools of its own.
        command.append("--no-build-isolation")
    subprocess.run(command, check=True)
    (archive,) = into.glob("transformers-*.tar.gz")
    return archive


def unpack_tests(archive: Path, into: Path) -> int:
    """Write the regular files under `tests/` of the archive; returns how many."""
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            # the archive's one top folder is transformers-<version>/
            parts = Path(member.name).parts[1:]
            if not member.isfile() or parts[:1] != ("tests",) or ".." in parts:
                continue
            target = into.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            count += 1
    return count


def main() -> int:
    if fetched():
        print(f"transformers {version()}: tests already in {folder()}")
        return 0
    print(f"transformers {version()}: downloading the source distribution for its tests")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        try:
            archive = download(Path(temporary))
        except subprocess.CalledProcessError:
            print(
                f"The source distribution of transformers {version()} could not be downloaded (pip's reason is above): "
                f"run `{COMMAND}` again with access to the package index.",
                file=sys.stderr,
            )
            return 1
        unpacked = Path(temporary) / "unpacked"
        count = unpack_tests(archive, unpacked)
        # Moved at the end, so that a run which is cut short leaves nothing that looks complete.
        unpacked.rename(folder().parent)
    print(f"transformers {version()}: {count} files in {folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
