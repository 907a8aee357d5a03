"""Prints the late imports: those of the package's own modules inside its functions, outside `cli/`.

python tests/late_imports.py [FOLDER]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def late(path: Path) -> Iterator[ast.stmt]:
    """Import statements of `path`, inside a function, that name this package."""
    seen = set()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            ours = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nemotron_h"))
            if isinstance(node, ast.Import):
                ours = any(each.name.split(".")[0] == "nemotron_h" for each in node.names)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                ours = ast.unparse(node.args[0]).lstrip("f'").startswith((".", "nemotron_h", "{__name__}"))
            if ours and node.lineno not in seen:
                seen.add(node.lineno)
                yield node


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])
    number = 0
    for path in sorted((root / "nemotron_h").rglob("*.py")):
        if (name := path.relative_to(root)).parts[1] != "cli":
            for node in late(path):
                print(f"{name}:{node.lineno}: {ast.unparse(node)}")
                number += 1
    print(f"{number} late imports of our own outside cli/")


if __name__ == "__main__":
    main()
