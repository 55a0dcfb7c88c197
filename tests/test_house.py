# SPDX-License-Identifier: Apache-2.0
"""The house rules that a reader may rely on: who imports whom, what a wheel holds, how a source file looks."""

import ast
import fnmatch
import graphlib
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

# A module may import from its own row and from the rows above it. docs/architecture.md draws the same table.
LAYERS = [
    ["errors", "check", "presets", "stacks", "architectures", "config", "flops", "chips", "hosts"],
    ["params", "rope", "sharding", "exchange", "ops", "tables", "linear", "heads", "logprob"],
    ["attention", "moe", "cache"],
    ["model", "lora", "score"],
    ["checkpoint", "tokenizer"],
    ["infer"],
    ["data", "rewards"],
    ["observe"],
    ["train"],
    ["eval", "plan"],
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
FORBIDDEN_IMPORTS = {"torch", "transformers", "pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources(*folders: str) -> list[Path]:
    """Every Python file of the project below these top-level places, as paths relative to the root."""
    found = []
    for folder in folders:
        place = ROOT / folder
        found += [place] if place.is_file() else sorted(place.rglob("*.py"))
    return [path.relative_to(ROOT) for path in found]


ALL = sources("qwen2_jax", "kernels", "configs", "benchmarks", "tests", "infer.py", "train.py")
SHIPPED = sources("qwen2_jax", "kernels")


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere, also inside functions; `from a import b` gives a and a.b."""
    parts = list(path.with_suffix("").parts)
    package = parts[:-1]
    if package[:1] == ["kernels"]:
        package = ["qwen2_jax", *package]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def unit(dotted: str) -> str | None:
    """The name in LAYERS that `qwen2_jax.NAME...` belongs to; None for the package itself and for the outside."""
    parts = dotted.split(".")
    known = len(parts) > 1 and parts[0] == "qwen2_jax" and parts[1] != "kernels"
    place = ROOT / "qwen2_jax" / parts[1] if known else None
    return parts[1] if place and (place.is_dir() or place.with_suffix(".py").is_file()) else None


def owner(path: Path) -> str | None:
    """The name in LAYERS of a file of qwen2_jax; None for its __init__.py, which only re-exports, and the demo data."""
    name = path.parts[1].removesuffix(".py")
    return None if name in ("__init__", "demo") else name


def test_every_module_has_its_place():
    unknown = {str(path) for path in sources("qwen2_jax") if owner(path) and owner(path) not in LEVEL}
    assert not unknown, f"{sorted(unknown)}: give the new module a row in LAYERS and in docs/architecture.md"


@pytest.mark.parametrize("path", [p for p in sources("qwen2_jax") if owner(p)], ids=str)
def test_imports_run_one_way(path):
    here = owner(path)
    upward = {name for name in map(unit, imports(path)) if name in LEVEL and LEVEL[name] > LEVEL.get(here, 0)}
    assert not upward, f"{path} imports {sorted(upward)}, which stand above {here}"


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    for path in sources("qwen2_jax"):
        if here := owner(path):
            graph.setdefault(here, set()).update(name for name in map(unit, imports(path)) if name and name != here)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_data_knows_no_model():
    for path in sources("qwen2_jax/data"):
        assert not {"model", "attention", "moe", "cache", "rope", "ops"} & set(map(unit, imports(path))), path


@pytest.mark.parametrize("path", sources("kernels"), ids=str)
def test_kernels_are_a_leaf(path):
    """`import kernels` from a clone and `qwen2_jax.kernels` both work, because no file names either."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    absolute = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    absolute |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert not {name for name in absolute if name.split(".")[0] in ("qwen2_jax", "kernels")}
    inside = {name for name in imports(path) if name.split(".")[0] == "qwen2_jax"}
    assert not {name for name in inside if not name.startswith("qwen2_jax.kernels")}, (
        "a relative import leaves kernels/"
    )


@pytest.mark.parametrize("path", [p for p in ALL if p.parts[0] not in ("kernels", "tests", "benchmarks")], ids=str)
def test_ops_is_the_only_door_to_the_kernels(path):
    if path.parent != Path("qwen2_jax/ops"):
        assert not {name for name in imports(path) if name.startswith(("qwen2_jax.kernels", "kernels"))}


@pytest.mark.parametrize("path", [*SHIPPED, *sources("configs", "infer.py", "train.py")], ids=str)
def test_never_imported_at_run_time(path):
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN_IMPORTS


@pytest.mark.parametrize("path", ALL, ids=str)
def test_source_file_form(path):
    text = (ROOT / path).read_bytes()
    foreign = [number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    tests = path.parts[0] == "tests"
    assert not foreign or tests, f"not ASCII in lines {foreign}"  # tests of text may spell their text
    lines = text.decode().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert ast.get_docstring(ast.parse(text)), "the file says in a docstring what it is"
    longest = 600 if path.parts[0] == "kernels" or tests else 400
    assert len(lines) <= longest, f"{len(lines)} lines: split it by idea"
    assert not set(path.with_suffix("").parts) & FORBIDDEN_NAMES, "name the idea"


def test_packages_are_the_folders_on_disk():
    """An editable install hides a forgotten subpackage; a wheel does not."""
    found = {".".join(path.parent.parts) for path in SHIPPED if path.name == "__init__.py"}
    assert {re.sub("^kernels", "qwen2_jax.kernels", name) for name in found} == set(SETUPTOOLS["packages"])
    assert {path.parent for path in SHIPPED} == {path.parent for path in SHIPPED if path.name == "__init__.py"}


def packaged(path: Path) -> bool:
    """Whether pyproject.toml puts this data file of qwen2_jax/ into the wheel."""
    patterns = SETUPTOOLS["package-data"].get(".".join(path.parent.parts), [])
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


def data_files() -> list[Path]:
    """Everything in qwen2_jax/ that is not a source file."""
    files = [path.relative_to(ROOT) for path in (ROOT / "qwen2_jax").rglob("*") if path.is_file()]
    return sorted(path for path in files if path.suffix != ".py" and "__pycache__" not in path.parts)


def test_data_files_are_packaged():
    assert not [str(path) for path in data_files() if not packaged(path)]
    demo = {path.name: (ROOT / path).stat().st_size for path in data_files() if "demo" in path.parts}
    assert demo.keys() >= {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert sum(demo.values()) < 10e6


def test_wheel_imports_from_an_empty_directory(tmp_path):
    """Built from a copy, so that no build folder is left behind; imported without the editable install's finder."""
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    for path in [*SHIPPED, *data_files(), *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("qwen2_jax-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"qwen2_jax"}
    assert {path.relative_to(site) for path in (site / "qwen2_jax").rglob("*") if path.is_file()} >= set(data_files())
    names = sorted(SETUPTOOLS["packages"])
    program = f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    program += "import importlib\n"
    program += f"for name in {names}: print(importlib.import_module(name).__file__)"
    run = subprocess.run([sys.executable, "-S", "-c", program], cwd=empty, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(line.startswith(str(site)) for line in run.stdout.split()), run.stdout


def test_constraints_pin_every_requirement_without_urls():
    packaging = pytest.importorskip("packaging.requirements")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pins = {re.sub("[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    extras = PYPROJECT["project"]["optional-dependencies"]
    for text in [*PYPROJECT["project"]["dependencies"], *extras["dev"], *extras["data"]]:
        requirement = packaging.Requirement(text)
        assert pins[re.sub("[-_.]+", "-", requirement.name).lower()] in requirement.specifier, text


def test_one_version_number_and_one_python():
    version = PYPROJECT["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / ".python-version").read_text().strip() == "3.12"
    assert PYPROJECT["project"]["requires-python"] == ">=3.12"


def test_the_map_in_the_documentation_is_this_one():
    text = (ROOT / "docs/architecture.md").read_text()
    rows = [line.split("  ")[0].split(", ") for line in text.split("```text\n", 1)[1].split("```", 1)[0].splitlines()]
    assert rows == LAYERS
