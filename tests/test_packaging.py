"""What installing and importing the package brings along."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import nemotron_h

ROOT = Path(__file__).parents[1]


def modules_after(*statements: str) -> list[set[str]]:
    """The top-level modules that are loaded after each statement, in a process of its own."""
    report = "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    code = "import json, sys\n" + "".join(f"{statement}\n{report}\n" for statement in statements)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in result.stdout.splitlines() if line.startswith("[")]


@pytest.mark.core
def test_import_brings_nothing_optional() -> None:
    """Importing is cheap: nothing of the command line, no kernels, nothing that transformers does not load itself."""
    before, after = modules_after(
        "from transformers import AutoModelForCausalLM, PreTrainedModel; import transformers.modeling_layers, torch",
        "import nemotron_h",
    )
    brought = after - before
    assert "nemotron_h" in brought
    assert not brought & {"causal_conv1d", "mamba_ssm", "peft", "rich", "triton", "typer"}


def test_command_line_modules_import_no_more_than_typer_and_rich() -> None:
    before, after = modules_after("import nemotron_h, typer, rich.table", "import nemotron_h.cli")
    assert not after - before


def test_version() -> None:
    assert metadata.version("nemotron-h") == nemotron_h.__version__


@pytest.mark.core
def test_torch_and_transformers_are_not_pinned() -> None:
    """A user's own torch is kept; the window of transformers is the one that is tested."""
    requirements = metadata.requires("nemotron-h") or []
    (torch,) = (line for line in requirements if re.match(r"torch\b", line))
    (transformers,) = (line for line in requirements if re.match(r"transformers\b", line))
    assert "==" not in torch and "<" not in torch
    assert ">=5.17" in transformers and "<6" in transformers
    assert "transformers==5.17.0\n" in (ROOT / "constraints-floor.txt").read_text()


def test_wheel(tmp_path: Path) -> None:
    """A built wheel holds the bundled model, the type marker and the license, and nothing of the tests."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "nemotron_h", source / "nemotron_h", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"nemotron_h/py.typed", "nemotron_h/cli/__init__.py"} <= names
    for folder, wanted in {"word-problems": "config.json", "word-problems-mtp": "mtp.safetensors"}.items():
        bundled = f"nemotron_h/bundled/{folder}/"
        assert bundled + wanted in names
        shipped = {path.name for path in (ROOT / bundled).iterdir()}
        assert {name.removeprefix(bundled) for name in names if name.startswith(bundled)} == shipped
        assert sum((ROOT / bundled / name).stat().st_size for name in shipped) <= 8 * 2**20
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"nemotron_h"}
