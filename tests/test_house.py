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

# A file may import files of its own row and of the rows above. An entry is a file or a folder; the longest entry that a
# file's path begins with is the file's. docs/architecture.md draws the same table.
LAYERS = [
    ["errors", "lazy_exports", "missing_package", "files", "parallel/chips", "parallel/hosts"],
    ["validate", "console", "conversation", "tool_schema", "template_sandbox", "chat_template"],
    ["tokenizer_files", "tokenizer"],
    ["config"],
    ["parallel", "weights/params"],
    ["ops"],
    ["weights"],
    ["model"],
    ["checkpoint"],
    ["infer"],
    ["data", "rewards", "eval"],
    ["observe"],
    ["train"],
    ["plan", "speedrun"],
]
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
FORBIDDEN_IMPORTS = {"torch", "transformers", "pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
# What importing a module alone must leave out, checked in a process of its own.
LIGHT = {
    "qwen2_jax": {"jax", "flax", "numpy"},
    "qwen2_jax.config": {"jax", "flax", "numpy"},
    "qwen2_jax.data.tokens.store": {"jax", "flax", "qwen2_jax.model", "qwen2_jax.kernels", "qwen2_jax.checkpoint"},
    "qwen2_jax.infer.cli.main": {"jax", "flax", "qwen2_jax.kernels"},
    "qwen2_jax.parallel.hosts": {"jax", "numpy"},
    "qwen2_jax.rewards": {"jax", "flax"},
}


def sources(*folders: str) -> list[Path]:
    """Every Python file of the project below these top-level places, as paths relative to the root."""
    found = []
    for folder in folders:
        place = ROOT / folder
        found += [place] if place.is_file() else sorted(place.rglob("*.py"))
    return [path.relative_to(ROOT) for path in found]


ALL = sources("qwen2_jax", "kernels", "configs", "benchmarks", "tests", "infer.py", "train.py")
SHIPPED = sources("qwen2_jax", "kernels")
PACKAGE = sources("qwen2_jax")
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path)) for path in ALL}


def dotted(path: Path) -> str:
    """The module of a file of qwen2_jax/; a package's is its folder's name."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in PACKAGE}


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere, also inside functions; `from a import b` gives a and a.b."""
    package = list(path.with_suffix("").parts[:-1])
    if package[:1] == ["kernels"]:
        package = ["qwen2_jax", *package]
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def imported_files(path: Path) -> set[Path]:
    """Files of qwen2_jax/ that a file imports by name: a.b if there is such a file in `from a import b`, else a."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom):
            base = list(path.parts[: len(path.parts) - node.level]) if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            submodules = {f"{origin}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or ({origin} & FILES.keys())
    return {FILES[name] for name in found} - {path}


def entry(path: Path) -> str | None:
    """The entry of LAYERS that a file of qwen2_jax/ belongs to; None for a package's front door, and for the demo."""
    name = "/".join(path.with_suffix("").parts[1:])
    if path.name == "__init__.py" or name.startswith("demo/"):
        return None
    found = [one for one in LEVEL if name == one or name.startswith(f"{one}/")]
    return max(found, key=len, default="")


def top(name: str) -> str:
    return name.split(".")[0]


def test_every_file_has_its_layer():
    unknown = [str(path) for path in PACKAGE if entry(path) == ""]
    assert not unknown, f"{unknown}: give each a row in LAYERS and in docs/architecture.md"
    empty = [name for name in LEVEL if not any(entry(path) == name for path in PACKAGE)]
    assert not empty, f"LAYERS has entries that no file belongs to: {empty}"


def test_imports_run_one_way_without_circles():
    """By layer, and file by file: also where the circle is hidden in a function or under TYPE_CHECKING."""
    graph = {path: imported_files(path) for path in PACKAGE}
    upward = [
        f"{path} imports {other}"
        for path, others in graph.items()
        for other in sorted(others)
        if entry(path) and entry(other) and LEVEL[entry(other)] > LEVEL[entry(path)]
    ]
    assert not upward, "imports of a higher layer:\n" + "\n".join(upward)
    circles = []
    while True:  # one circle at a time: each is cut where it was found, to see the next
        try:
            graphlib.TopologicalSorter(graph).prepare()
            break
        except graphlib.CycleError as error:
            circle = error.args[1]
            circles.append(" <- ".join(map(str, circle)))
            graph[circle[1]] = graph[circle[1]] - {circle[0]}
    assert not circles, "circles of imports:\n" + "\n".join(circles)


def test_nobody_below_imports_the_root():
    """`import qwen2_jax` inside the package reaches everything, whatever the layers say."""
    found = [str(path) for path in PACKAGE if FILES["qwen2_jax"] in imported_files(path)]
    assert not found, f"{found}: import the file that has the name"


def test_light_modules_bring_in_little():
    """Each in a process of its own, since a package's front door may import what nobody asked for."""
    heavy = []
    for module, without in LIGHT.items():
        code = f"import sys, {module}\nprint(*sorted({without!r} & sys.modules.keys()))"
        run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        heavy += [f"{module} brings in {run.stdout.strip()}"] if run.stdout.strip() else []
    assert not heavy, "\n".join(heavy)


def test_what_must_not_be_imported():
    found = []
    for path in ALL:
        names = imports(path)
        if path.parts[0] == "kernels":  # a leaf: `import kernels` from a clone and `qwen2_jax.kernels` both work
            absolute = {alias.name for n in ast.walk(TREES[path]) if isinstance(n, ast.Import) for alias in n.names}
            absolute |= {n.module or "" for n in ast.walk(TREES[path]) if isinstance(n, ast.ImportFrom) and not n.level}
            outside = {name for name in names if top(name) == "qwen2_jax" and not name.startswith("qwen2_jax.kernels")}
            named = {name for name in absolute if top(name) in ("qwen2_jax", "kernels")}
            found += [f"{path}: {name}; kernels/ names neither itself nor us" for name in sorted(outside | named)]
        elif path.parts[0] not in ("tests", "benchmarks") and path.parent != Path("qwen2_jax/ops"):
            kernels = {name for name in names if name.startswith(("qwen2_jax.kernels", "kernels"))}
            if path == Path("qwen2_jax/parallel/chips.py"):  # the table of peak rates, which is data
                kernels = {name for name in kernels if not name.startswith("qwen2_jax.kernels.peaks")}
            found += [f"{path}: {name}; ops/ is the only door to the kernels" for name in sorted(kernels)]
        if path.parts[0] not in ("tests", "benchmarks"):
            found += [f"{path}: {name}, never at run time" for name in sorted({*map(top, names)} & FORBIDDEN_IMPORTS)]
        if path.is_relative_to("qwen2_jax/data"):
            model = [str(other) for other in imported_files(path) if entry(other) and entry(other) in ("model", "ops")]
            found += [f"{path}: {other}; data knows no model" for other in model]
    assert not found, "\n".join(found)


def test_source_files_have_the_form():
    found = []
    for path in ALL:
        text = (ROOT / path).read_bytes()
        tests = path.parts[0] == "tests"
        foreign = [number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
        if foreign and not tests:  # tests of text may spell their text
            found.append(f"{path}: not ASCII in lines {foreign}")
        lines = text.decode().splitlines()
        if not lines or lines[0] != "# SPDX-License-Identifier: Apache-2.0":
            found.append(f"{path}: the first line is the SPDX line")
        if not ast.get_docstring(TREES[path]):
            found.append(f"{path}: the file says in a docstring what it is")
        if len(lines) > (600 if path.parts[0] == "kernels" or tests else 400):
            found.append(f"{path}: {len(lines)} lines; split it by idea")
        if set(path.with_suffix("").parts) & FORBIDDEN_NAMES:
            found.append(f"{path}: name the idea")
    assert not found, "\n".join(found)


def test_public_classes_have_distinct_names():
    """`Source` alone has two meanings, of data and of a checkpoint; outside of checkpoint/ it is checkpoint.Source."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE:
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path))
    shared = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert shared == {"Source": ["qwen2_jax/checkpoint/sources.py", "qwen2_jax/data/spec.py"]}


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


@pytest.mark.parametrize("command", [["infer.py", "Once upon"], ["train.py", "--help"], ["-m", "qwen2_jax.checkpoint"]])
def test_an_older_python_gets_one_sentence(command):
    """From qwen2_jax/__init__.py, which everything imports first; what is read before it parses under Python 3.6."""
    for name in ("qwen2_jax/__init__.py", "infer.py", "train.py"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), name, feature_version=(3, 6))
    older = "import sys, runpy; sys.version_info = (3, 11, 7, 'final', 0); sys.argv = sys.argv[1:]; "
    run = "runpy.run_module(sys.argv[1])" if command[0] == "-m" else "runpy.run_path(sys.argv[0])"
    run = subprocess.run(
        [sys.executable, "-c", older + run, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: qwen2-jax needs Python 3.12 or newer, and ")
    assert " is Python 3.11.7: install a newer one" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["infer.py", "Once upon"], ["train.py", "configs/lora.py"], ["-m", "qwen2_jax.checkpoint"]]
)
def test_a_python_without_the_dependencies_gets_one_sentence(command):
    run = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    package = re.fullmatch(r"error: \S+ has no package (\w+), which qwen2-jax needs: .*\.venv/bin/.*\n", run.stderr)[1]
    from qwen2_jax.missing_package import PACKAGES

    assert {re.split("[-<>=]", text)[0] for text in PYPROJECT["project"]["dependencies"]} | {"jaxlib"} == {*PACKAGES}
    assert package in PACKAGES


def test_the_map_in_the_documentation_is_this_one():
    text = (ROOT / "docs/architecture.md").read_text()
    rows = [line.split("  ")[0].split(", ") for line in text.split("```text\n", 1)[1].split("```", 1)[0].splitlines()]
    assert rows == LAYERS
