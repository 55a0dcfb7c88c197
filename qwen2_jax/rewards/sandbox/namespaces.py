# SPDX-License-Identifier: Apache-2.0
"""Creates the sandbox and executes a program in it; execute.py runs this file as a script without packages.

Three processes: this one, which enforces the time limit; the init process of new namespaces, which builds the file
system and whose end kills everything inside; and the program. execute.py's docstring describes files and limits.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET
NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_RECURSIVE, ATTR_RDONLY_NOSUID = 442, 0x8000, 3  # the call has one number on all machines
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
HOME = "/tmp"  # the program's working directory


class Refused(Exception):
    """No sandbox can be created; the message names what is missing."""


def main() -> NoReturn:
    with os.fdopen(int(sys.argv[1])) as file:
        job = json.load(file)
    job["user"] = 30000 + os.getpid() % 30000  # user id of the program under root: the process limit counts per user
    report = int(sys.argv[2])
    os.set_inheritable(report, False)
    try:
        said = enclose(job, report)
    except (Refused, OSError) as why:
        said = f"refused: {why}"
    os.write(report, said.encode())
    os.killpg(0, signal.SIGKILL)  # processes left behind by an unsandboxed program, and this process
    raise AssertionError


def enclose(job: dict[str, Any], report: int) -> str:
    """Runs the program in new namespaces. Returns "ended CODE", or "over" at the time limit."""
    if sys.platform == "linux":
        dies_with_parent()
    if not job["bare"]:
        unshare()
    child = os.fork()
    if not child:
        try:
            if job["bare"]:
                execute(job, job["folder"])
            dies_with_parent()
            furnish(job)
            init(job)
        except (Refused, OSError) as why:
            os.write(report, f"refused: {why}".encode())
        os._exit(1)
    end = time.monotonic() + job["seconds"]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)  # as init of its namespace it takes every process inside with it
            return "over"
        time.sleep(0.005)
    return f"ended {exit_code(ended[1])}"


def unshare() -> None:
    """Moves this process into new namespaces, and its children into a new PID namespace."""
    user, group = os.geteuid(), os.getegid()
    try:
        os.unshare(NAMESPACES | (NEWUSER if user else 0))
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
            with contextlib.suppress(OSError):  # read-only in some containers; the sandbox does not depend on it
                Path("/proc/sys/user/max_user_namespaces").write_text("0")  # forbids nested user namespaces
    except OSError as why:
        raise Refused(f"no new namespaces ({why.strerror})") from why


def furnish(job: dict[str, Any]) -> None:
    """Creates a tmpfs of at most `disk` bytes, bind-mounts the visible paths read-only, and makes it the root."""
    root = job["folder"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={job['disk']},nr_inodes=10000,mode=755")
    for path in sorted(job["seen"]):
        place = Path(root + path)
        if place.exists():  # inside a path that is mounted already
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(path):
            place.mkdir()
        else:
            place.touch()
        mount(path, str(place), None, MS_BIND | MS_REC)
        attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY_NOSUID, 0, 0, 0)
        syscall(f"read-only {path}", MOUNT_SETATTR, -100, str(place).encode(), AT_RECURSIVE, attributes, 32)
    for path in (HOME, "/dev/shm"):
        place = Path(root + path)
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o1777)
    if platform.machine() not in PIVOT_ROOT:
        raise Refused(f"a Linux machine of the kind {', '.join(PIVOT_ROOT)} ({platform.machine()} is not known)")
    os.chdir(root)
    syscall("pivot_root", PIVOT_ROOT[platform.machine()], b".", b".")
    check("umount2", LIBC.umount2(b".", MNT_DETACH))


def init(job: dict[str, Any]) -> NoReturn:
    """Runs the program as a child process, waits for it and exits with its exit code."""
    program = os.fork()
    if not program:
        execute(job, HOME)
    while True:
        child, status = os.wait()  # also reaps orphans
        if child == program:
            os._exit(exit_code(status))


def execute(job: dict[str, Any], folder: str) -> NoReturn:
    """Sets limits, user and environment, and executes the program."""
    try:
        os.chdir(folder)
        Path("program.py").write_text(job["program"], encoding="utf-8", errors="replace")
        seconds = int(job["seconds"]) + 2
        limits = {"CPU": seconds, "AS": job["memory"], "FSIZE": job["disk"], "NOFILE": 64, "CORE": 0}
        if not job["bare"]:
            limits["NPROC"] = (
                job["processes"] + 2
            )  # plus the two supervisors; without a sandbox it would count all processes of the user
        if not job["bare"] and os.geteuid() == 0:
            user = job["user"]
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        if sys.platform == "linux":
            check("no_new_privs", LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        own = {"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "PYTHONUTF8": "1", **one}
        os.execve(job["python"], [job["python"], "-I", "program.py"], {**os.environ, **own})
    except (Refused, OSError) as why:
        sys.stderr.write(f"the sandbox could not start the program: {why}\n")
        sys.stderr.flush()
    os._exit(126)


def dies_with_parent() -> None:
    check("PR_SET_PDEATHSIG", LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    check(f"mount {target}", LIBC.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()))


def syscall(what: str, number: int, *arguments: Any) -> None:
    check(what, LIBC.syscall(ctypes.c_long(number), *arguments))


def check(what: str, result: int) -> None:
    if result:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def exit_code(status: int) -> int:
    """The shell's exit code: 128 + N for a process killed by signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
