"""How large the package is, room by room: files, code lines, longest function.

Code lines are those without docstrings, comments and blank lines.

    python studies/rooms.py [folder of the package]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

LONG_FILE, LONG_FUNCTION = 500, 80
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", None) or () if not is_lambda(node) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                lines -= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return lines


def is_lambda(node: ast.AST) -> bool:
    """Whether the body of a node is an expression, not a list of statements."""
    return isinstance(node, (ast.Lambda, ast.IfExp))


def functions(source: str, code: set[int]) -> list[tuple[int, str]]:
    """Code lines and name of each function."""
    return [
        (len(code & set(range(node.lineno, (node.end_lineno or 0) + 1))), node.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def main() -> None:
    """Print the table, then what is longer than it should be."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "captum_robust")
    rooms: dict[str, list[tuple[int, int, str]]] = {}
    long: list[str] = []
    for file in sorted(root.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        code = code_lines(source)
        place = file.relative_to(root)
        room = place.parts[0] if len(place.parts) > 1 else "(top)"
        longest = max(functions(source, code), default=(0, ""))
        rooms.setdefault(room, []).append((len(code), longest[0], f"{place.name}:{longest[1]}"))
        if (n := len(source.splitlines())) > LONG_FILE:
            long.append(f"{place}: {n} lines")
        long += [
            f"{place}: {name} has {n} code lines"
            for n, name in functions(source, code)
            if n > LONG_FUNCTION
        ]
    print(f"{'room':<14}{'files':>6}{'code':>8}{'longest':>9}  function")
    for room, files in rooms.items():
        longest = max(files, key=lambda f: f[1])
        print(
            f"{room:<14}{len(files):>6}{sum(f[0] for f in files):>8}{longest[1]:>9}  {longest[2]}"
        )
    every = [f for files in rooms.values() for f in files]
    print(f"{'all':<14}{len(every):>6}{sum(f[0] for f in every):>8}")
    print(f"longer than {LONG_FILE} lines, or than {LONG_FUNCTION} code lines: {len(long)}")
    for line in long:
        print(f"  {line}")


if __name__ == "__main__":
    main()
