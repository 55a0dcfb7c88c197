# SPDX-License-Identifier: Apache-2.0
"""What the documentation says, done: commands in ```bash blocks and programs in ```python blocks are executed.

A ```text block holds what needs the network, special hardware or much time; it is not executed.
Each document's commands run in order, in a scratch folder that looks like the clone.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
# Their commands train, convert and count for minutes. .ci/run executes README's two first lines, tests/checkpoint the
# commands of docs/checkpoints.md, tests/infer those of docs/inference.md, test_bench.py those of docs/kernels.md.
SLOW = ["README.md", "benchmarks/README.md"]
SLOW += [f"docs/{name}.md" for name in ("checkpoints", "inference", "kernels", "post-training", "training")]
SLOW_PROGRAMS = [f"docs/{name}.md" for name in ("chat", "inference", "kernels", "lora")]  # README's have their calls
SECONDS = 300  # for one command, on a busy machine with two cores


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    """One entry per command line of the bash blocks; a trailing backslash joins lines, and <<'END' those up to END."""
    text = "".join(blocks(document, "bash")).replace("\\\n", " ")
    lines = re.findall(r"^.*<<'END'$(?:\n.*)*?\nEND$|^.+$", text, re.MULTILINE)
    return [line for line in lines if not line.startswith("#")]


def installing(command: str) -> bool:
    """README's two first lines; .ci/run executes them, and a test does not install into itself."""
    return "-m venv .venv" in command


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where infer.py keeps compiled programs: not in the user's home, but shared by the commands here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def clone(tmp_path, cache, monkeypatch):
    """A folder in which paths of the repository work and what a command writes does not reach the repository."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "build", "dist"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return tmp_path


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(d, id=name(d), marks=pytest.mark.slow if name(d) in SLOW else ())
        for d in DOCUMENTS
        if blocks(d, "bash")
    ],
)
def test_commands_run(document, clone, monkeypatch):
    """README's with the compiled programs that a reader gets; the others' are compiled as in all tests."""
    if name(document) == "README.md":
        monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    for command in commands(document):
        if installing(command):
            continue
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=clone, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert run.returncode == 0, f"$ {command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        assert run.stdout + run.stderr or not command.startswith("python"), f"$ {command}\nprinted nothing"


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(d, id=name(d), marks=pytest.mark.slow if name(d) in SLOW_PROGRAMS else ())
        for d in DOCUMENTS
        if blocks(d, "python")
    ],
)
def test_programs_run(document, clone, capsys):
    """The blocks of one document share their names, as a reader would paste them into one session."""
    names: dict[str, object] = {}
    for number, text in enumerate(blocks(document, "python")):
        exec(compile(text, f"{document.name}, python block {number}", "exec"), names)
    assert capsys.readouterr().out


def test_first_screen():
    """Two lines that are enough on a fresh machine stand within a screenful, and .ci/run executes exactly them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [command for command in commands(ROOT / "README.md") if installing(command)]
    assert len(lines) == 2
    assert all(line in text.splitlines()[:40] for line in lines)
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^(?:RUN|TEST)='(.*)'$", script, re.MULTILINE) == lines
    assert lines[0].endswith('infer.py "Once upon"')
    assert lines[1].endswith("-m pytest -q")


def test_nothing_is_left_to_fill_in():
    for document in DOCUMENTS:
        assert not re.findall(r"[A-Z]+-NUMBERS|TODO|TBD", document.read_text(encoding="utf-8")), document


def links() -> list[tuple[Path, str]]:
    """Every relative link of the Markdown files, with the file that it stands in."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    found = [(f, target) for f in files for target in re.findall(r"\]\(([^)\s]+)\)", f.read_text(encoding="utf-8"))]
    return [(f, target) for f, target in found if "://" not in target]


def slug(heading: str) -> str:
    """The anchor that Git hosts make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere():
    for document, target in links():
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{document.name}: {target}"


def test_flags_of_infer_in_the_documentation_exist(clone):
    """Also those of text blocks, which are not executed."""
    run = subprocess.run([sys.executable, "infer.py", "--help"], capture_output=True, text=True, check=True)
    for document in DOCUMENTS:
        for line in "".join([*blocks(document, "bash"), *blocks(document, "text")]).splitlines():
            if "infer.py" in line:
                flags = {word.split("=")[0] for word in shlex.split(line, comments=True) if word.startswith("--")}
                assert not {flag for flag in flags if flag not in run.stdout}, f"{document.name}: {line}"
