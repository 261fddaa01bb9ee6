"""Runs first within the sandbox: gives up every right before it runs anything that is not ours.

The files `inside_*.py` are one program's text, put together by `sandbox.launch`; they import nothing of this package,
which is not there.
"""

import ctypes
import marshal
import os
import resource
import struct
import sys

# fmt: off
_DENIED = {  # calls that a program has no use for, each a door to more of the kernel than it needs
    "x86_64": (
        0xC000003E,
        56,
        (29, 41, 64, 68, 101, 103, 135, 154, 155, 165, 166, 175, 240, 246, 248, 249, 250, 272, 278, 298, 300, 303, 304,
         308, 310, 311, 312, 319, 321, 323, 425, 426, 427, 428, 430, 438, 440, 442, 447),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (194, 198, 190, 186, 117, 116, 92, 41, 40, 39, 105, 180, 104, 217, 218, 219, 97, 75, 241, 262, 264, 265, 268,
         270, 271, 272, 279, 280, 282, 425, 426, 427, 428, 430, 438, 440, 442, 447),
    ),
}
# fmt: on
# shmget, socket, semget, msgget, ptrace, syslog, personality, modify_ldt (of x86-64), pivot_root, mount, umount2,
# init_module, mq_open, kexec_load, add_key, request_key, keyctl, unshare, vmsplice, perf_event_open, fanotify_init,
# name_to_handle_at, open_by_handle_at, setns, process_vm_readv, process_vm_writev, kcmp, memfd_create, bpf,
# userfaultfd, io_uring_setup, io_uring_enter, io_uring_register, open_tree, fsopen, pidfd_getfd, process_madvise,
# mount_setattr, memfd_secret. Memory that no process maps (shmget, semget, msgget, mq_open, vmsplice, memfd_create)
# would be in no account.
_CLONE3 = 435
_NEW_USER_NAMESPACE = 0x10000000


def confine(config):
    """Lowers the limits and drops to the user of `config`."""
    _set("/proc/self/oom_score_adj", "1000")  # the first to go when memory is short
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "no_new_privs")
    _filter_calls(libc)
    for name, value in config["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.umask(0o077)


def _set(path, value):
    try:
        with open(path, "w") as file:
            file.write(value)
    except OSError:
        return  # the service may not raise it: then it stays as it is


def _filter_calls(libc):
    """Denies calls by seccomp with EPERM; clone3 with ENOSYS: the C library then takes clone, whose flags are seen."""
    arch, clone, denied = _DENIED.get(os.uname().machine, (None, None, None))
    if arch is None:
        return
    rules = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000)]  # another architecture's call: kill
    rules += [(0x20, 0, 0, 0), (0x15, 0, 1, _CLONE3), (0x06, 0, 0, 0x00050000 | 38)]
    for number in denied:
        rules += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1)]
    if arch == 0xC000003E:
        rules += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x00050000 | 38)]  # x32 calls
    rules += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 0, 1, _NEW_USER_NAMESPACE), (0x06, 0, 0, 0x00050000 | 1)]
    rules += [(0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    program = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxQ" if struct.calcsize("P") == 8 else "HxxI", len(rules), ctypes.addressof(program))
    if libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


def read_payload(fd):
    """How to confine it, and what to run, from the file that was handed over.

    Neither json nor platform is imported: both need re, which takes as long as all the rest of starting Python.
    """
    with os.fdopen(fd, "rb") as file:
        return marshal.loads(file.read())  # noqa: S302 - the service wrote it: texts and numbers, sealed


def quiet(fd):
    """Sends a file descriptor to nowhere."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    os.dup2(nowhere, fd)
    os.close(nowhere)


sys.dont_write_bytecode = True
CONFIG, PAYLOAD = read_payload(int(sys.argv[1]))
sys.argv = ["solution.py"]
confine(CONFIG)
