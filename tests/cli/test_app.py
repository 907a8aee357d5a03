"""The command itself: help, version, both ways to start it."""

import subprocess
import sys

import pytest

from nemotron_h import __version__

COMMANDS = ("generate", "demo", "info")


@pytest.mark.core
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_an_example(cli, command: str, option: str) -> None:
    text = cli(command, option).stdout
    assert f"Example: nemotron-h {command}" in text
    assert "--json" in text


def test_help_names_every_command(cli) -> None:
    text = cli("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "Example: nemotron-h generate" in text


def test_version(cli) -> None:
    assert cli("--version").stdout == f"nemotron-h {__version__}\n"


def test_usage_errors(cli) -> None:
    assert "No such command" in cli("generat", code=2).stderr
    assert "--max-new-tokens" in cli("generate", "Hi", "--max-new-tokens", "0", code=2).stderr


@pytest.mark.core
def test_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "nemotron_h", "info", "nowhere"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("nemotron-h: There is no folder 'nowhere'")
