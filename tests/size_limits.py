"""Fails when a file or function outgrows the project's limits. Run by `make lint`."""

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES, LOOP_LINES, FUNCTION_LINES = 400, 250, 60


def problems(path: Path) -> list[str]:
    text = path.read_text()
    lines = text.count("\n")
    limit = LOOP_LINES if path.as_posix() == "trainer/loop.py" else FILE_LINES
    found = [f"{path}: {lines} lines, the limit is {limit}; split it"] if lines > limit else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, the limit is {FUNCTION_LINES}")
    return found


if __name__ == "__main__":
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True, timeout=30)
    found = [line for name in listed.stdout.split() if Path(name).exists() for line in problems(Path(name))]
    print("\n".join(found) or "sizes: all files and functions within their limits")
    sys.exit(bool(found))
