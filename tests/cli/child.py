"""Command lines run in one child process, which has so much memory and time and no more: `run(commands, folder)`.

As a script: `python child.py COMMANDS.json`, which prints what came of each as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MORE_MEMORY = 3 << 30
"""Above what the process has mapped once everything is imported."""
SECONDS = 30
"""For one command; the slowest takes about 3 here."""


def run(commands: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """Exit code, standard output and standard error of each command line of `nemotron-h`, in order."""
    (folder / "commands.json").write_text(json.dumps(commands))
    environment = {name: value for name, value in os.environ.items() if name != "NEMOTRON_H_DEBUG"}
    environment |= {"COLUMNS": "120", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    child = [sys.executable, __file__, str(folder / "commands.json")]
    done = subprocess.run(child, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(commands), f"{commands[len(found)]} ended the process: {done.stderr[-2000:]}"
    return found


def _main(path: str) -> None:
    import resource
    import signal

    import peft  # noqa: F401 - what a command would import has its memory before the limit is set
    import torch
    import transformers  # noqa: F401
    from typer.testing import CliRunner

    import nemotron_h
    from nemotron_h.checkpoints import formats, gguf  # noqa: F401
    from nemotron_h.cli import app

    torch.set_num_threads(1)
    nemotron_h.NemotronHForCausalLM  # noqa: B018 - imports the model
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for command in json.loads(Path(path).read_text()):
        signal.alarm(SECONDS)  # which ends the process
        result = CliRunner().invoke(app, command)
        signal.alarm(0)
        print(json.dumps({"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
