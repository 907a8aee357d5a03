"""Sizes of the package in a checkout, and what a decoded token passes through; two checkouts are compared by two runs.

    python tests/house.py [FOLDER]
    PYTHONPATH=FOLDER [NEMOTRON_H_KERNELS=0] python tests/house.py FOLDER --token

Lines are counted in the Python files of FOLDER/nemotron_h. With `--token` the package is imported, from where Python
finds it, and the files and code objects of it that one forward of one token enters are counted by `sys.setprofile`.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
MODELS = {"the 9B's pattern": NANO_9B, "the same, one MLP a MoE": NANO_9B[:-1] + "E"}
FILE, FORWARD = 540, ("NemotronHModel", "NemotronHForCausalLM")
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Qualified name and number of lines of every function, decorators left out."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{prefix}{node.name}" if named else ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node.end_lineno - node.lineno + 1
        yield from functions(node, f"{name}." if named else prefix)


def code_lines(text: str, tree: ast.AST) -> int:
    """Lines with something else than comments and bare strings, which docstrings are."""
    bare = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - bare)


def sizes(folder: Path) -> None:
    lines, code, long = {}, 0, {}
    for path in sorted((folder / "nemotron_h").rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(folder))
        tree = ast.parse(text)
        lines[name] = text.count("\n")
        code += code_lines(text, tree)
        long |= {f"{name} {function}": length for function, length in functions(tree)}
    print(f"all lines: {sum(lines.values())} in {len(lines)} files")
    print(f"code lines, without blanks, comments and docstrings: {code}")
    over = [f"{name} {count}" for name, count in lines.items() if count > FILE]
    print(f"files over {FILE} lines: {len(over)}", *over, sep="\n  ")
    print("longest functions:", *(f"{long[name]} {name}" for name in sorted(long, key=long.get)[:-6:-1]), sep="\n  ")
    for name in FORWARD:
        found = [f"{count} ({where})" for where, count in long.items() if where.endswith(f" {name}.forward")]
        print(f"{name}.forward: {', '.join(found) or 'none of its own'}")


def token(pattern: str) -> set[tuple[str, str, int]]:
    """File, name and first line of every code object of the package that a forward of one token enters."""
    import torch

    import nemotron_h

    config = nemotron_h.NemotronHConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, hybrid_override_pattern=pattern, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=16,
        chunk_size=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    model = nemotron_h.NemotronHForCausalLM(config).eval()
    root = str(Path(nemotron_h.__file__).parent)
    entered = set()

    def profile(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            code = frame.f_code
            entered.add((code.co_filename[len(root) + 1 :], code.co_name, code.co_firstlineno))

    with torch.no_grad():
        cache = model(torch.arange(3, 20)[None], use_cache=True).past_key_values
        for id in range(4):  # the first ones make what the later ones find
            model(torch.tensor([[id]]), past_key_values=cache, use_cache=True)
        sys.setprofile(profile)
        try:
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        finally:
            sys.setprofile(None)
    return entered


def passed_through(listed: bool) -> None:
    from nemotron_h.ops import native

    native.library()  # built first where it has to be
    print(f"one token, with {native.reason()}")
    for title, pattern in MODELS.items():
        entered = token(pattern)
        print(f"{title}: {len({file for file, _, _ in entered})} files, {len(entered)} code objects")
        if listed:
            print("".join(f"  {file}:{line} {name}\n" for file, name, line in sorted(entered)), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[1], metavar="FOLDER")
    parser.add_argument("--token", action="store_true", help="count what a decoded token passes through instead")
    parser.add_argument("--list", action="store_true", help="with --token: name each code object")
    arguments = parser.parse_args()
    if arguments.token:
        passed_through(arguments.list)
    else:
        sizes(arguments.folder)


if __name__ == "__main__":
    main()
