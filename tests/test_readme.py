"""The README keeps its word: its Python runs, its commands work, its make targets, paths and figures are there.

A block is left out only under a comment that says why: `<!-- not run: reason -->`. Run as a script, this file writes
the bundled model's figures into the README.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.bundled import figures
from nemotron_h.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(language: str) -> list[str]:
    return [m["code"] for m in FENCE.finditer(README) if m["language"] == language and not m["reason"]]


def commands(program: str) -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith(program + " ")]


def named(code: str) -> str:
    return next(line for line in reversed(code.splitlines()) if line.strip())[:40]


@pytest.mark.parametrize("code", blocks("python"), ids=named)
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", [b for b in blocks("bash") if b.startswith("nemotron-h ")], ids=named)
def test_commands(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block one after the other; what they write under /tmp goes elsewhere."""
    monkeypatch.chdir(ROOT)
    for command in block.splitlines():
        result = CliRunner().invoke(app, shlex.split(command.replace("/tmp/", f"{tmp_path}/"))[1:])
        assert result.exit_code == 0, (command, result.output)


def test_info_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    (command,) = (command for command in commands("nemotron-h") if "Nano-9B" in command)
    printed = CliRunner().invoke(app, shlex.split(command)[1:]).stdout.splitlines()
    (shown,) = blocks("text")
    assert [line for line in shown.splitlines() if line not in printed] == []


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {command.split()[1] for command in commands("make")}
    assert targets >= {"demo", "test", "quality", "bench", "format"}
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.M)} == set()


def test_paths() -> None:
    named = re.findall(r"`((?:\w[\w.-]*/)+[\w.-]+\.\w+)`", README)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.S)


def figures_table() -> str:
    rows = ["| right answers | with reasoning | without |", "|---|---|---|"]
    names = {"held_out": "names and sums never seen", "unseen": "sentences never seen either"}
    for split, name in names.items():
        measured = figures()[split]
        think, no_think = (measured[mode]["accuracy"] for mode in ("think", "no_think"))
        rows.append(f"| {measured['problems']} problems, {name} | {think:.1%} | {no_think:.1%} |")
    return "\n".join(rows) + "\n"


def test_figures_of_the_bundled_model() -> None:
    assert FIGURES.findall(README) == [figures_table()], "python tests/test_readme.py writes them"


SPEED = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- /speed -->)", re.S)


def speed_table() -> str:
    """From the benchmarks' committed figures; a figure measured in part (see the JSON's notes) has a star."""

    def read(name: str) -> dict:
        return json.loads((ROOT / "benchmarks" / "figures" / f"{name}.json").read_text())

    rows = ["| tokens per second | nemotron-h | transformers | llama.cpp |", "|---|---|---|---|"]
    for entry in read("prefill")["lengths"]:
        shown = [
            f"{found['tokens_per_second']:.1f}{'' if found['whole'] else '*'}"
            for found in (entry["contenders"][who] for who in ("nemotron-h", "transformers", "llama.cpp bf16"))
        ]
        rows.append(f"| prefill of {entry['length']:,} tokens, bf16 | {' | '.join(shown)} |")
    for entry in read("decode")["contexts"]:
        for ours, theirs in (("bf16", "bf16"), ("int8", "q8_0"), ("int4", "q4_0")):
            names = (f"nemotron-h {ours}", "transformers bf16", f"llama.cpp {theirs}")
            shown = [f"{entry['contenders'][who]['tokens_per_second']:.1f}" for who in names]
            shown[1] = shown[1] if ours == "bf16" else ""
            rows.append(f"| decoding at context {entry['context']:,}, {ours} ({theirs}) | {' | '.join(shown)} |")
    for entry in read("moe")["entries"]:
        shown = [f"{entry['contenders'][who]['tokens_per_second']:.1f}" for who in ("nemotron-h", "transformers")]
        rows.append(f"| 128 experts, 6 chosen: {entry['task']} | {' | '.join(shown)} | |")
    tiny = read("tiny_decode")["contenders"]
    shown = [f"{tiny[who]['tokens_per_second']:.0f}" for who in ("nemotron-h", "transformers")]
    rows.append(f"| `generate()` with the bundled model | {' | '.join(shown)} | |")
    copying = read("speculation")["speedups"]["9B dimensions, bfloat16"]
    shown = [f"{copying[way]['tokens_per_second']:.1f}" for way in ("prompt lookup", "plain")]
    name = "text that repeats itself, bf16, with prompt lookup (without)"
    rows.append(f"| {name} | {shown[0]} ({shown[1]}) | refused | |")
    machine = read("decode")["environment"]
    bf16 = "with" if machine["bf16_instructions"] else "without"
    rows += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_capability']}, {bf16} bfloat16 instructions; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, llama-cpp-python {machine['llama_cpp']}; "
        f"{machine['date']}. A star: measured on fewer tokens or one layer of each kind, and scaled.",
    ]
    return "\n".join(rows) + "\n"


def test_figures_of_the_benchmarks() -> None:
    assert SPEED.findall(README) == [speed_table()], "python tests/test_readme.py writes them"


if __name__ == "__main__":
    written = SPEED.sub(speed_table(), FIGURES.sub(figures_table(), README))
    (ROOT / "README.md").write_text(written, encoding="utf-8")
