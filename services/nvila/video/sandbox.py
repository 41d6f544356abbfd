"""What a decode worker gives up before it opens a file from outside: memory, processor time, files, network, programs.

Decoders are large C libraries fed by strangers (CVE-2026-22778 was a JPEG2000 decoder reached by a video's URL). What
an exploit finds here is a process that cannot open a socket, start a program, write or remove a file, or look into
another process. Linux only, like the rest of the service.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_OPEN_FILES = 64

# <linux/prctl.h>, <linux/seccomp.h>, <linux/audit.h>, <asm/unistd.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_EPERM = 1
_ENOSYS = 38
_CLONE_THREAD = 0x00010000
_OPEN_FOR_WRITING = 0x1 | 0x2 | 0x40 | 0x200
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC; the same bits on both architectures."""


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """Numbers of the system calls on one architecture."""

    arch: int
    seccomp: int
    clone: int
    open: int | None
    openat: int
    denied: dict[str, int]


_X86_64 = _Machine(
    arch=0xC000003E,
    seccomp=317,
    clone=56,
    open=2,
    openat=257,
    denied={
        "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
        "bind": 49, "listen": 50, "socketpair": 53, "accept4": 288, "recvmmsg": 299, "sendmmsg": 307,
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234,
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272,
        "bpf": 321, "perf_event_open": 298, "init_module": 175, "finit_module": 313, "delete_module": 176,
        "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "userfaultfd": 323, "memfd_create": 319,
        "truncate": 76, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88,
        "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "mknod": 133, "setxattr": 188,
        "mkdirat": 258, "mknodat": 259, "fchownat": 260, "unlinkat": 263, "renameat": 264, "linkat": 265,
        "symlinkat": 266, "fchmodat": 268, "open_by_handle_at": 304, "renameat2": 316,
    },
)  # fmt: skip
_AARCH64 = _Machine(
    arch=0xC00000B7,
    seccomp=277,
    clone=220,
    open=None,
    openat=56,
    denied={
        "socket": 198, "socketpair": 199, "bind": 200, "listen": 201, "accept": 202, "connect": 203, "sendto": 206,
        "recvfrom": 207, "sendmsg": 211, "recvmsg": 212, "accept4": 242, "recvmmsg": 243, "sendmmsg": 269,
        "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "setns": 268, "unshare": 97,
        "bpf": 280, "perf_event_open": 241, "init_module": 105, "finit_module": 273, "delete_module": 106,
        "kexec_load": 104, "add_key": 217, "request_key": 218, "keyctl": 219, "userfaultfd": 282, "memfd_create": 279,
        "truncate": 45, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "setxattr": 5,
        "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38,
        "open_by_handle_at": 265, "renameat2": 276,
    },
)  # fmt: skip
_DENIED_EVERYWHERE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "pidfd_open": 434, "openat2": 437, "pidfd_getfd": 438, "process_madvise": 440, "fchmodat2": 452,
}  # fmt: skip
_CLONE3 = 435
"""Its flags lie in memory, where a filter cannot look; told that it does not exist, the C library uses clone."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(0)


def limit_resources(memory_bytes: int) -> None:
    """Let this process grow by at most memory_bytes of address space, write no file, and dump no core."""
    in_use_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    ceiling = in_use_bytes + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # shared memory is mapped, which this does not touch
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(task_s: float) -> None:
    """Let the kernel end this process when it has used task_s more seconds of processor time than until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + task_s) + 1, hard))


def deny_system_calls() -> bool:
    """Install the filter on every thread. Where the kernel refuses (some container runtimes), warn and go on: the other
    limits still hold. Returns whether it is in place.
    """
    machine = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine())
    if machine is None:
        log.warning("no system-call filter for processor %s; decoding without one", platform.machine())
        return False
    instructions = _filter(machine)
    code = ctypes.create_string_buffer(b"".join(instructions), 8 * len(instructions))
    program = _Program(len(instructions), ctypes.cast(code, ctypes.c_void_p))
    libc = _libc()
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    failed = libc.syscall(machine.seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(program))
    if failed:
        log.warning("the kernel refused the system-call filter (errno %d); decoding without it", ctypes.get_errno())
    return not failed


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _filter(machine: _Machine) -> list[bytes]:
    """Classic BPF over struct seccomp_data (number at byte 0, architecture at 4, arguments from 16, 8 bytes each).

    A jump counts the instructions it passes over.
    """
    numbers = sorted({*machine.denied.values(), *_DENIED_EVERYWHERE.values()})
    assert len(numbers) < 240, "jumps are 8 bits wide"
    body = [_load(4), _jump_equal(machine.arch, 1, 0), _refuse(_EPERM), _load(0)]
    body += [_jump_above(0x40000000, 0, 1), _refuse(_EPERM)]  # the x32 calls of x86-64
    body += [_jump_equal(number, len(numbers) - at, 0) for at, number in enumerate(numbers)]  # to the refusal below
    body += [_jump_always(1), _refuse(_EPERM)]
    body += [_jump_equal(_CLONE3, 0, 1), _refuse(_ENOSYS)]
    body += [_jump_equal(machine.clone, 0, 4), _load(16), _jump_any_bit(_CLONE_THREAD, 1, 0)]
    body += [_refuse(_EPERM), _allow()]
    for number, flags_at in ((machine.open, 24), (machine.openat, 32)):
        if number is not None:
            body += [_jump_equal(number, 0, 4), _load(flags_at), _jump_any_bit(_OPEN_FOR_WRITING, 0, 1)]
            body += [_refuse(_EPERM), _allow()]
    return [*body, _allow()]


def _instruction(code: int, if_true: int, if_false: int, operand: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _load(offset: int) -> bytes:
    return _instruction(0x20, 0, 0, offset)  # BPF_LD | BPF_W | BPF_ABS


def _jump_equal(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x15, if_true, if_false, value)  # BPF_JMP | BPF_JEQ | BPF_K


def _jump_above(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x35, if_true, if_false, value)  # BPF_JMP | BPF_JGE | BPF_K


def _jump_any_bit(bits: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x45, if_true, if_false, bits)  # BPF_JMP | BPF_JSET | BPF_K


def _jump_always(over: int) -> bytes:
    return _instruction(0x05, 0, 0, over)  # BPF_JMP | BPF_JA


def _refuse(errno: int) -> bytes:
    return _instruction(0x06, 0, 0, _ERRNO | errno)  # BPF_RET | BPF_K


def _allow() -> bytes:
    return _instruction(0x06, 0, 0, _ALLOW)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
