"""Files, lines and functions of each package, as a Markdown table.

python benchmarks/sizes.py              # dnr_recbole
python benchmarks/sizes.py tests        # any other folder
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from statistics import median
from typing import Dict, List, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Size(NamedTuple):
    """One file: its lines, and how many each of its functions (inner ones included) has."""

    path: Path
    lines: int
    functions: List[int]


def size_of(path: Path) -> Size:
    """A file of Python, measured."""
    text = path.read_text(encoding="utf-8")
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return Size(path, len(text.splitlines()), [(node.end_lineno or node.lineno) - node.lineno + 1 for node in found])


def row(name: str, sizes: List[Size]) -> List[str]:
    """Cells of one package."""
    lines, functions = [size.lines for size in sizes], [n for size in sizes for n in size.functions] or [0]
    longest = max(sizes, key=lambda size: size.lines)
    return [
        name, str(len(sizes)), f"{sum(lines):,}", f"{median(lines):g}", f"{longest.lines} ({longest.path.name})",
        f"{len(functions):,}", f"{median(functions):g}", str(max(functions)),
    ]  # fmt: skip


def table(folder: Path) -> str:
    """A line for each package, sorted, and one for all together."""
    packages: Dict[str, List[Size]] = {}
    for path in sorted(folder.rglob("*.py")):
        packages.setdefault(path.parent.relative_to(folder.parent).as_posix(), []).append(size_of(path))
    rows = [["package", "files", "lines", "median", "longest", "functions", "median", "longest"], ["---"] * 8]
    rows += [row(name, sizes) for name, sizes in sorted(packages.items())]
    rows.append(row("all", [size for sizes in packages.values() for size in sizes]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="dnr_recbole", help="below the root (default: dnr_recbole)")
    print(table(ROOT / parser.parse_args().folder))
