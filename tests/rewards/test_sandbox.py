# SPDX-License-Identifier: Apache-2.0
"""Programs that attack: what they reach for is not there, they end, and nothing of them is left."""

import errno
import json
import os
import platform
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.rewards.sandbox import execute
from qwen2_jax.rewards.sandbox.execute import Limits, passes, run

ROOT = Path(__file__).parents[2]
QUICK, PATIENT = Limits(seconds=1.0), Limits(seconds=30.0)  # for programs without end, and for those that end


@pytest.fixture
def walls():
    """Skips where no sandbox can be made: what run() then does is tested below."""
    try:
        run("")
    except UserError as why:
        pytest.skip(str(why))


def processes_with(mark: str) -> list[str]:
    """Numbers of the processes whose command line has the text, of all namespaces."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline") as file:
                found += [number] if mark in file.read() else []
        except OSError:
            pass
    return found


def gone(mark: str) -> bool:
    end = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes_with(mark)


def test_a_program_runs(walls):
    ran = run("import sys\nprint(input()[::-1])\nprint('oh', file=sys.stderr)\nsys.exit(3)", "abc\n")
    assert ran == execute.Ran(3, "cba\n", "oh\n")


def test_packages_of_the_interpreter_are_there(walls):
    assert run("import numpy; print(numpy.arange(3).sum())").output == "3\n"


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_without_end(walls, program):
    start = time.monotonic()
    assert run(program, limits=QUICK).exit_code is None
    assert time.monotonic() - start < 6


def test_signals_do_not_prolong_it(walls):
    program = (
        "import signal, os\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nos.setsid()\nwhile True: pass"
    )
    assert run(program, limits=QUICK).exit_code is None


def test_processes_are_bounded_and_end_with_it(walls):
    """A fork bomb whose processes leave its session; they would sleep for five minutes."""
    mark = f"bomb{time.time_ns()}"
    program = f"""
import os, subprocess, sys
children = []
try:
    for n in range(200):
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)  # {mark}"],
                                         start_new_session=True))
except OSError as error:
    print(len(children), error.errno)
"""
    ran = run(program, limits=Limits(seconds=20.0, processes=8))
    count, error = map(int, ran.output.split())
    assert 1 <= count <= 10 and error == 11  # EAGAIN
    assert gone(mark)


def test_threads_count_as_processes(walls):
    program = "import threading, time\nfor n in range(50): threading.Thread(target=time.sleep, args=(1,)).start()"
    ran = run(program, limits=Limits(seconds=10.0, processes=8))
    assert "can't start new thread" in ran.errors


def test_memory(walls):
    ran = run("x = bytearray(2**20)\nwhile True: x = x + x", limits=Limits(memory=2**28))
    assert ran.exit_code == 1 and ran.errors.strip().endswith("MemoryError")


def test_a_large_file(walls):
    program = "with open('x', 'wb', buffering=0) as f:\n    while True: f.write(bytes(2**20))"
    ran = run(program, limits=Limits(disk=2**22))
    assert ran.exit_code == 1 and ("File too large" in ran.errors or "No space left" in ran.errors)


def test_many_files_together(walls):
    program = "for n in range(100):\n    with open(str(n), 'wb') as f: f.write(bytes(2**20))"
    ran = run(program, limits=Limits(disk=2**22))
    assert ran.exit_code == 1 and "No space left" in ran.errors


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_printing_without_end(walls, stream):
    ran = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)", limits=Limits(disk=2**20))
    assert ran.exit_code not in (0, None)
    assert len(ran.output) + len(ran.errors) <= 2**20 + 10000
    assert len(ran.output if stream == "stdout" else ran.errors) > 2**19


def test_no_network(walls):
    """A server of this machine that answers, and that the program cannot reach; nor a socket without address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        program = "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)\nprint('reached')"
        ran = run(program.format(port=port))
    assert ran.output == "" and "unreachable" in ran.errors
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0qwen2-jax-test")
        server.listen()
        ran = run("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0qwen2-jax-test')")
    assert "Connection refused" in ran.errors


def test_no_environment(walls, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = run("import os, json\nprint(json.dumps(dict(os.environ)))").output
    assert "hf_secret" not in seen and set(json.loads(seen)) <= {
        *("PATH", "HOME", "LANG", "LC_CTYPE", "PYTHONUTF8"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    }


def test_no_files_of_the_user(walls, tmp_path):
    (tmp_path / "secret").write_text("sesame")
    for path in (tmp_path / "secret", os.path.abspath(__file__), "/etc/passwd", "/proc/1/environ"):
        ran = run(f"print(open({str(path)!r}).read())")
        assert ran.exit_code == 1 and "FileNotFoundError" in ran.errors, path


def test_nothing_can_be_written_but_its_folder(walls):
    program = """
import os, sys
for place in (os.path.dirname(os.__file__), sys.prefix, "/usr", "/usr/bin"):
    try:
        open(place + "/written", "w")
        print(place)
    except OSError:
        pass
open("/tmp/written", "w")
open("written", "w")
"""
    assert run(program) == execute.Ran(0, "", "")


def test_no_rights(walls):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.umount2(b"/usr", 2), libc.sethostname(b"x", 1))
print(libc.prctl(39, 0, 0, 0, 0), os.getpid() > 1)  # PR_GET_NO_NEW_PRIVS
try:
    os.kill(1, 9)
except PermissionError:
    pass
print("alive")
"""
    assert run(program).output == "-1 -1 -1\n1 True\nalive\n"


def test_system_calls_that_are_denied(walls):
    """Each fails with EPERM (1), also those that would fail with another error, and a clone into new namespaces."""
    table = runpy.run_path(str(execute.SCRIPT))
    numbers = {name: row[table["MACHINES"][platform.machine()]] for name, row in table["DENIED"].items()}
    calls = {name: number for name, number in numbers.items() if number is not None}
    program = f"""
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
def error(number, *arguments):
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *arguments) == -1 else 0
found = {{name: error(number, 0, 0, 0, 0, 0) for name, number in {calls}.items()}}
found["clone"] = error({table["CLONE"][platform.machine()]}, 0x10000000 | 17, 0, 0, 0, 0)
found["clone3"] = error({table["CLONE3"]}, 0, 0)
print(json.dumps(found))
"""
    ran = run(program)
    assert json.loads(ran.output) == dict.fromkeys([*calls, "clone"], errno.EPERM) | {"clone3": errno.ENOSYS}


def test_system_calls_of_the_machine():
    """The numbers are those of the kernel's headers, where these are installed."""
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"
    }  # fmt: skip
    table = runpy.run_path(str(execute.SCRIPT))
    if not all(map(os.path.exists, headers.values())):
        pytest.skip("no headers of the kernel")
    for machine, path in headers.items():
        with open(path) as file:
            known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", file.read()))
        column = table["MACHINES"][machine]
        numbers = {name: row[column] for name, row in table["DENIED"].items() if row[column] is not None}
        numbers |= {"clone": table["CLONE"][machine], "clone3": table["CLONE3"]}
        assert numbers == {name: int(known.get(name, number)) for name, number in numbers.items()}
        assert len(known.keys() & numbers.keys()) > 40


def test_no_keys_of_the_user(walls):
    """A secret in the session keyring of the process that asks, which no namespace hides."""
    table = runpy.run_path(str(execute.SCRIPT))
    column = table["MACHINES"][platform.machine()]
    add_key, keyctl = (table["DENIED"][name][column] for name in ("add_key", "keyctl"))
    asks = f"""
import ctypes
libc = ctypes.CDLL(None)
libc.syscall({keyctl}, 1, None)
print("key", libc.syscall({add_key}, b"user", b"qwen2-jax-test", b"sesame", 6, -3) > 0)
from qwen2_jax.rewards.sandbox import namespaces, run
look = "import ctypes\\nprint(ctypes.CDLL(None).syscall({keyctl}, 10, -3, b'user', b'qwen2-jax-test', 0))"
print(run(look).output)
namespaces.leave_session_keyring()  # what keeps the key out where a program finds another way to ask
print(libc.syscall({keyctl}, 10, -3, b"user", b"qwen2-jax-test", 0))
"""
    found = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, cwd=ROOT)
    if "key False" in found.stdout:
        pytest.skip("no session keyring here")
    assert found.stdout.split() == ["key", "True", "-1", "-1"], found.stderr


def test_a_namespace_with_one_user(walls):
    """Root of a user namespace with no other user: the user stays the same, and the program still has no rights."""
    asks = """
from qwen2_jax.rewards.sandbox import passes, run
print(passes("x = 1", "assert x == 1"))
print(run("import os, ctypes\\nprint(os.getuid() >= 30000, ctypes.CDLL(None).sethostname(b'x', 1))").output)
"""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", asks]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("no program unshare")
    if "unshare: " in found.stderr:
        pytest.skip(found.stderr)
    assert found.stdout.split() == ["True", "True", "-1"], found.stderr


@pytest.mark.parametrize("unsandboxed", [False, True])
def test_what_fails_before_the_program_is_a_refusal(request, tmp_path, monkeypatch, unsandboxed):
    """Not the program's exit code: the reward would call every right answer wrong."""
    if not unsandboxed:
        request.getfixturevalue("walls")
    text = execute.SCRIPT.read_text()
    assert text.count("os.execve(") == 1
    (tmp_path / "namespaces.py").write_text(text.replace("os.execve(", "os.execve('/nowhere' + "))
    monkeypatch.setattr(execute, "SCRIPT", tmp_path / "namespaces.py")
    with pytest.raises(UserError, match=r"could not be started: \[Errno 2\] No such file[^\n]*unsandboxed"):
        passes("x = 1", "assert x == 1", unsandboxed=unsandboxed)


def test_limits_above_those_of_the_machine(walls):
    """A lower hard limit stays: it is no reason to refuse."""
    asks = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
    asks += "from qwen2_jax.rewards.sandbox import run\n"
    asks += "print(run('import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))').output)"
    found = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "(40, 40)", found.stderr


def test_nothing_is_left(walls, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("open('x', 'w').write('x')")
    run("open('x', 'w').write('x')", unsandboxed=True)
    assert list(tmp_path.iterdir()) == []


def test_it_refuses_where_namespaces_are_forbidden(tmp_path, monkeypatch):
    """The sandbox as it is, but for a kernel that denies namespaces."""
    text = execute.SCRIPT.read_text()
    assert "os.unshare(NAMESPACES" in text
    no = "(_ for _ in ()).throw(PermissionError(1, 'Operation not permitted'))  # "
    (tmp_path / "namespaces.py").write_text(text.replace("os.unshare(NAMESPACES", no + "os.unshare(NAMESPACES"))
    monkeypatch.setattr(execute, "SCRIPT", tmp_path / "namespaces.py")
    with pytest.raises(UserError, match=r"no new namespaces \(Operation not permitted\).*unsandboxed"):
        run("print(1)")
    assert run("print(1)", unsandboxed=True) == execute.Ran(0, "1\n", "")


def test_it_refuses_on_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="it needs Linux"):
        run("print(1)")


def test_limits_without_a_sandbox():
    mark = f"left{time.time_ns()}"
    assert run("while True: pass", limits=QUICK, unsandboxed=True).exit_code is None
    ran = run("x = bytearray(2**30)", limits=Limits(memory=2**28), unsandboxed=True)
    assert "MemoryError" in ran.errors
    program = "import subprocess, sys\n"
    program += f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)  # {mark}'])"
    assert run(program, unsandboxed=True).exit_code == 0
    assert gone(mark)


@pytest.mark.parametrize(
    ("program", "tests", "passed"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", True),
        ("def f(x): return x", "assert f(1) == 2", False),
        ("def f(x): return", "f(", False),  # tests that are no program
        ("def f(x)", "assert True", False),
        ("import sys; sys.exit(0)", "assert False", False),
        ("import os; os._exit(0)", "assert False", False),
        ("import sys; sys.stdout.write = lambda text: None", "assert False", False),
        ("import sys; sys.stdout = None\ndef f(x): return x + 1", "assert f(1) == 2", True),
        ("print('noise', end='')\ndef f(x): return x + 1", "assert f(1) == 2", True),
        ("import atexit, os\natexit.register(lambda: os._exit(0))", "assert False", False),
    ],
)
def test_tests_of_a_program(walls, program, tests, passed):
    assert passes(program, tests, PATIENT) is passed
