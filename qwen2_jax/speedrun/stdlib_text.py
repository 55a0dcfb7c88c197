# SPDX-License-Identifier: Apache-2.0
"""Text that every Python installation has: source code and docstrings of the standard library."""

import ast
import hashlib
import inspect
import sysconfig
from pathlib import Path

SKIPPED = {
    "test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3",
    "encodings", "ensurepip", "turtledemo", "__pycache__",
}  # fmt: skip
HELD_OUT_ONE_IN = 20


def is_held_out(key: str, one_in: int = 10) -> bool:
    """Whether an item belongs to the held-out split. A hash of the item decides: it depends on no seed or order."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % one_in == 0


def stdlib_documents(root: Path | None = None, *, min_characters: int = 400) -> dict[str, tuple[str, bool]]:
    """Name -> (text, is_prose): every source file once as code, and once as the prose of its docstrings.

    The language reference in pydoc_data/topics.py is split into its topics (prose). Test suites, IDLE and the codec
    tables are left out. Names are sorted paths, so the result depends only on the Python version.
    """
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    if not root.is_dir():
        raise FileNotFoundError(f"no standard library sources in {root}: give a folder of .py files")
    documents: dict[str, tuple[str, bool]] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files are deliberately odd
            continue
        if name.as_posix() == "pydoc_data/topics.py":
            pieces = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            for i, piece in enumerate(pieces):
                if len(str(piece.value)) >= min_characters:
                    documents[f"{name.as_posix()}#{i}"] = (str(piece.value), True)
            continue
        if len(source) >= min_characters:
            documents[name.as_posix()] = (source, False)
        prose = "\n\n".join(docstrings(tree))
        if len(prose) >= min_characters:
            documents[f"{name.as_posix()}#doc"] = (prose, True)
    return documents


def docstrings(tree: ast.Module) -> list[str]:
    """Docstrings of a parsed module, outermost first, indentation removed, one-liners left out."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [inspect.cleandoc(text) for text in found if text and len(text) > 80]


def split(documents: dict[str, tuple[str, bool]], *, held_out: bool) -> dict[str, tuple[str, bool]]:
    """The training or the held-out documents; a file's code and its docstrings are always in the same split."""
    return {n: d for n, d in documents.items() if is_held_out(n.removesuffix("#doc"), HELD_OUT_ONE_IN) == held_out}
