# SPDX-License-Identifier: Apache-2.0
"""Creates the sandbox and executes a program in it; execute.py runs this file as a script without packages.

Three processes: this one, which enforces the time limit; the init process of new namespaces, which builds the file
system and whose end kills everything inside; and the program. execute.py's docstring describes files and limits.

The report is a file of lines, of which the first one counts: "refused REASON" if anything failed before the program
ran, "ended CODE", or "over" at the time limit.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
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
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
KEYCTL_JOIN_SESSION_KEYRING, NO_KEYCTL = 1, 9999

# System calls that fail with EPERM in the program: x86-64's number, aarch64's (asm/unistd_64.h, asm-generic/unistd.h).
DENIED = {
    # keys, which no namespace hides
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # memory that the limit of a process's address space does not count, and that outlives the process
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # parts of the kernel that programs do not need and where faults are found
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "modify_ldt": (154, None), "vhangup": (153, 58),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # file systems and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "iopl": (172, None), "ioperm": (173, None), "sethostname": (170, 161),
    "setdomainname": (171, 162),
}  # fmt: skip
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = {"x86_64": 0, "aarch64": 1}  # column of DENIED
X32 = 0x40000000  # bit of the numbers of x86-64's third set of system calls
HOME = "/tmp"  # the program's working directory


class Refused(Exception):
    """No sandbox can be created; the message names what is missing."""


def main() -> NoReturn:
    with os.fdopen(int(sys.argv[1])) as file:
        job = json.load(file)
    job["user"] = 30000 + os.getpid() % 30000  # user id of the program under root: the process limit counts per user
    job["report"] = int(sys.argv[2])
    os.set_inheritable(job["report"], False)
    try:
        say(job, enclose(job))
    except (Refused, OSError) as why:
        say(job, f"refused {why}")
    os.killpg(0, signal.SIGKILL)  # processes left behind by an unsandboxed program, and this process
    raise AssertionError


def say(job: dict[str, Any], what: str) -> None:
    os.write(job["report"], f"{what}\n".encode())


def enclose(job: dict[str, Any]) -> str:
    """Runs the program in new namespaces. Returns "ended CODE", or "over" at the time limit."""
    if sys.platform == "linux":
        dies_with_parent()
    if not job["bare"]:
        unshare(job["user"])
    child = os.fork()
    if not child:
        try:
            if job["bare"]:
                execute(job, job["folder"])
            dies_with_parent()
            furnish(job)
            init(job)
        except (Refused, OSError) as why:
            say(job, f"refused {why}")
        os._exit(1)
    end = time.monotonic() + job["seconds"]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)  # as init of its namespace it takes every process inside with it
            return "over"
        time.sleep(0.005)
    return f"ended {exit_code(ended[1])}"


def unshare(new_user: int) -> None:
    """Moves this process into new namespaces, and its children into a new PID namespace.

    They include a user namespace, in which the program is not root, if this process is not root or is the only user of
    its user namespace (`unshare -r`, rootless containers).
    """
    user, group = os.geteuid(), os.getegid()
    inside = (user, group) if user else (new_user, new_user)
    try:
        nested = bool(user) or not users_can_change(new_user)
        os.unshare(NAMESPACES | (NEWUSER if nested else 0))
        if nested:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{inside[0]} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{inside[1]} {group} 1")
            with contextlib.suppress(OSError):  # read-only in some containers; the sandbox does not depend on it
                Path("/proc/sys/user/max_user_namespaces").write_text("0")  # forbids nested user namespaces
    except OSError as why:
        raise Refused(f"no new namespaces ({why.strerror})") from why


def users_can_change(user: int) -> bool:
    """Whether this user namespace has a user and a group of this number, and lets root leave its groups."""
    own = Path("/proc/self")
    if not all(any(known(line, user) for line in (own / f).read_text().splitlines()) for f in ("uid_map", "gid_map")):
        return False
    return (own / "setgroups").read_text().strip() == "allow"


def known(line: str, number: int) -> bool:
    """Whether a line of /proc/self/uid_map, "FIRST OUTSIDE COUNT", covers a number."""
    first, _, count = map(int, line.split())
    return first <= number < first + count


def furnish(job: dict[str, Any]) -> None:
    """Creates a tmpfs of at most `disk` bytes, bind-mounts the visible paths read-only, and makes it the root."""
    root = job["folder"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={job['disk']},nr_inodes=10000,mode=755")
    for path in sorted(job["seen"]):
        target = Path(root + path)
        if target.exists():  # inside a path that is mounted already
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(path):
            target.mkdir()
        else:
            target.touch()
        mount(path, str(target), None, MS_BIND | MS_REC)
        attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY_NOSUID, 0, 0, 0)
        syscall(f"read-only {path}", MOUNT_SETATTR, -100, str(target).encode(), AT_RECURSIVE, attributes, 32)
    for path in (HOME, "/dev/shm"):
        target = Path(root + path)
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(0o1777)
    if platform.machine() not in PIVOT_ROOT:
        raise Refused(f"Linux on {', '.join(PIVOT_ROOT)} (this is {platform.machine()})")
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
    """Sets limits, user and environment, and executes the program. Reports a refusal where any of it fails."""
    try:
        os.chdir(folder)
        Path("program.py").write_text(job["program"], encoding="utf-8", errors="replace")
        seconds = int(job["seconds"]) + 2
        limits = {"CPU": seconds, "AS": job["memory"], "FSIZE": job["disk"], "NOFILE": 64, "CORE": 0}
        if not job["bare"]:
            # Plus the two supervisors. Without a sandbox it would count all processes of the user.
            limits["NPROC"] = job["processes"] + 2
        if not job["bare"] and os.geteuid() == 0:
            user = job["user"]
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        for name, most in limits.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            allowed = resource.getrlimit(kind)[1]
            most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
            resource.setrlimit(kind, (most, most))
        if sys.platform == "linux":
            check("no_new_privs", LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if not job["bare"]:
            leave_session_keyring()
            filter_system_calls()
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        own = {"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "PYTHONUTF8": "1", **one}
        os.execve(job["python"], [job["python"], "-I", "program.py"], {**os.environ, **own})
    except (Refused, OSError, ValueError) as why:
        say(job, f"refused the program could not be started: {why}")
    os._exit(126)


def leave_session_keyring() -> None:
    """Gives this process an empty session keyring instead of the one that the training has."""
    number = DENIED["keyctl"][MACHINES[platform.machine()]]
    assert number is not None
    if LIBC.syscall(ctypes.c_long(number), KEYCTL_JOIN_SESSION_KEYRING, None) >= 0:
        return
    reason = ctypes.get_errno()
    # A container's filter answers EPERM to every keyctl, the program's included; the kernel to none that it lacks.
    LIBC.syscall(ctypes.c_long(number), NO_KEYCTL, None)
    if reason != errno.ENOSYS and not reason == ctypes.get_errno() == errno.EPERM:
        raise Refused(f"a session keyring of its own: {os.strerror(reason)}")


def filter_system_calls() -> None:
    """Lets the calls in DENIED, and a clone into new namespaces, fail with EPERM in this process and its children.

    A BPF program over struct seccomp_data: the number at byte 0, the machine at 4, the first argument at 16.
    """
    machine = platform.machine()
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, no_such_call, forbid = 0x7FFF0000, 0x80000000, 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EPERM
    numbers = [row[MACHINES[machine]] for row in DENIED.values()]
    denied = [number for number in numbers if number is not None]
    program = [  # (operation, skipped if so, skipped if not, operand)
        (load, 0, 0, 4),
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (answer, 0, 0, kill),  # another machine's calls have other numbers
        (load, 0, 0, 0),
        (equal, 0, 1, CLONE3),  # its flags lie behind a pointer; the C library then takes clone
        (answer, 0, 0, no_such_call),
        *[(equal, len(denied) + 4 - i, 0, number) for i, number in enumerate(denied)],
        (at_least, 4, 0, X32),
        (equal, 0, 2, CLONE[machine]),
        (load, 0, 0, 16),
        (any_bit, 1, 0, NAMESPACES | NEWUSER | 0x02000000 | 0x00000080),  # and NEWCGROUP, NEWTIME
        (answer, 0, 0, allow),
        (answer, 0, 0, forbid),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))  # native alignment, as in struct sock_fprog
    check("a filter of system calls", LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0))


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
