"""The system calls that a program may make, as a seccomp filter: a classic BPF program for the kernel.

Nothing that makes a process, a thread, a socket or a signal, or that reaches another process: `man 2 seccomp`. No
threads, because no limit on their number holds for root.
"""

import errno
import platform
import struct
from collections.abc import Iterator

from codeparrot_ds.errors import ConfigError

# Name, number on x86_64, number on aarch64 ("-" if it has none), from asm/unistd_64.h and asm-generic/unistd.h.
_NUMBERS = """
access 21 -, alarm 37 -, arch_prctl 158 -, brk 12 214, chdir 80 49, chmod 90 -, clock_getres 229 114,
clock_gettime 228 113, clock_nanosleep 230 115, clone3 435 435, close 3 57, close_range 436 436,
copy_file_range 326 285, creat 85 -, dup 32 23, dup2 33 -, dup3 292 24, epoll_create1 291 20, epoll_ctl 233 21,
epoll_pwait 281 22, epoll_wait 232 -, eventfd2 290 19, exit 60 93, exit_group 231 94, faccessat 269 48,
faccessat2 439 439, fadvise64 221 223, fallocate 285 47, fchdir 81 50, fchmod 91 52, fchmodat 268 53, fcntl 72 25,
fdatasync 75 83, flock 73 32, fstat 5 80, fstatfs 138 44, fsync 74 82, ftruncate 77 46, futex 202 98,
getcpu 309 168, getcwd 79 17, getdents64 217 61, getegid 108 177, geteuid 107 175, getgid 104 176,
getgroups 115 158, getitimer 36 102, getpgid 121 155, getpgrp 111 -, getpid 39 172, getppid 110 173,
getrandom 318 278, getrlimit 97 163, getrusage 98 165, getsid 124 156, gettid 186 178, gettimeofday 96 169,
getuid 102 174, ioctl 16 29, link 86 -, linkat 265 37, lseek 8 62, lstat 6 -, madvise 28 233, membarrier 324 283,
mkdir 83 -, mkdirat 258 34, mmap 9 222, mprotect 10 226, mremap 25 216, munmap 11 215, nanosleep 35 101,
newfstatat 262 79, open 2 -, openat 257 56, pause 34 -, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73,
pread64 17 67, prlimit64 302 261, pselect6 270 72, pwrite64 18 68, read 0 63, readlink 89 -, readlinkat 267 78,
readv 19 65, rename 82 -, renameat 264 38, renameat2 316 276, restart_syscall 219 128, rmdir 84 -, rseq 334 293,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sched_getaffinity 204 123, sched_yield 24 124,
select 23 -, sendfile 40 71, set_robust_list 273 99, set_tid_address 218 96, setitimer 38 103, setrlimit 160 164,
sigaltstack 131 132, socketpair 53 199, stat 4 -, statfs 137 43, statx 332 291, symlink 88 -, symlinkat 266 36,
sysinfo 99 179, time 201 -, times 100 153, truncate 76 45, umask 95 166, uname 63 160, unlink 87 -,
unlinkat 263 35, utimensat 280 88, write 1 64, writev 20 66
"""
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # linux/audit.h; column of the table

# Calls that are allowed for some values of one argument: (its place, the values); all are 32 bits long
_CONDITIONS = {
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "prlimit64": (0, (0,)),  # its own limits
    "socketpair": (0, (1,)),  # AF_UNIX; asyncio needs one
}
_NOT_IMPLEMENTED = ("clone3",)  # the C library falls back to clone, and reports why that fails

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # linux/seccomp.h
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16  # struct seccomp_data


_Code = list[tuple[int, int, int, int]]  # operation, jump if true, jump if false, operand: struct sock_filter
_DENY: _Code = [(_RETURN, 0, 0, _ERROR | errno.EPERM)]


def seccomp_filter(machine: str = platform.machine()) -> bytes:
    """The filter as an array of struct sock_filter (8 bytes each). Calls that it does not know fail with EPERM.

    It searches in a tree: when a process installs a filter, the kernel runs it for every system call there is.

    Raises ConfigError for a processor whose system calls are not listed here.
    """
    if machine not in _ARCHITECTURES:
        raise ConfigError(
            f"The sandbox runs on {' and '.join(_ARCHITECTURES)}; this machine is {machine}. Score on another one."
        )
    architecture, column = _ARCHITECTURES[machine]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_EQUAL, 1, 0, architecture),  # otherwise the numbers below mean other calls
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        *_search(_ranges({number: _decide(name) for name, number in _system_calls(column)})),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _system_calls(column: int) -> Iterator[tuple[str, int]]:
    for entry in _NUMBERS.split(","):
        name, *numbers = entry.split()
        if numbers[column] != "-":
            yield name, int(numbers[column])


def _decide(name: str) -> _Code:
    """Decide on a call with this name; ends in a return."""
    if name in _NOT_IMPLEMENTED:
        return [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    if name not in _CONDITIONS:
        return [(_RETURN, 0, 0, _ALLOW)]
    place, values = _CONDITIONS[name]
    code = [(_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * place)]
    for value in values:
        code += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return code + _DENY


def _ranges(decisions: dict[int, _Code]) -> list[tuple[int, _Code]]:
    """(first number, decision) of ranges of numbers, in ascending order from 0; what is not listed is denied."""
    ranges = [(0, _DENY)]
    for number in sorted(decisions):
        for first, code in ((number, decisions[number]), (number + 1, _DENY)):
            if ranges and ranges[-1][0] == first:
                ranges.pop()
            if not ranges or ranges[-1][1] != code:
                ranges.append((first, code))
    return ranges


def _search(ranges: list[tuple[int, _Code]]) -> _Code:
    """Find the range of the number in the accumulator, by halves."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    assert len(below) < 256, "a jump is that long at most"
    return [(_JUMP_GREATER_OR_EQUAL, len(below), 0, ranges[middle][0]), *below, *above]
