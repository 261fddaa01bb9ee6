"""Programs that attack: none gets out of the sandbox, none earns a reward, and others are scored meanwhile.

Each attack is scored by tests that only its success would pass: it prints what it must not know, or says that it has done
what it must not be able to do.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from reward_svc.environments.code import Code
from reward_svc.sandbox.launch import Sandbox
from surogate.errors import FailedPreconditionError
from tests.helpers.reward.rewards import group, outcomes, reward_stub


def no_sandbox() -> str:
    try:
        Sandbox.find(allow_unsafe=False)
    except FailedPreconditionError as error:
        return error.message
    return ""


pytestmark = pytest.mark.skipif(bool(no_sandbox()), reason=no_sandbox() or "there is a sandbox")

# Done and not refused: prints the word that the test expects.
DID = "print('DONE')"
TRY = "try:\n{body}\nexcept BaseException:\n    pass\nelse:\n    " + DID


def attempt(body: str) -> str:
    return TRY.format(body="\n".join("    " + line for line in body.splitlines()))


PRINTING = {
    "read the service's secret file": "print('DONE' if 'SECRET' in open('{secret}').read() else '')",
    "read it through the root of process 1": attempt("open('/proc/1/root{secret}').read()"),
    "read the service's environment": "import os\n" + attempt("assert 'SECRET_OF_THE_SERVICE' in os.environ"),
    "read the environment of process 1": attempt("assert b'SECRET_OF' in open('/proc/1/environ','rb').read()"),
    "read the parent's environment": "import os\n" + attempt("open(f'/proc/{{os.getppid()}}/environ').read()[0]"),
    "read the password file": attempt("open('/etc/passwd').read()"),
    "read the service's code": attempt("import reward_svc"),
    "read installed packages": attempt("import pydantic"),
    "list the home of root": "import os\n" + attempt("os.listdir('/root')[0]"),
    "see the service's process": attempt("open('/proc/{pid}/cmdline').read()"),
    "kill the service": "import os\n" + attempt("os.kill({pid}, 9)"),
    "kill process 1": "import os, time\nos.kill(1, 9)\ntime.sleep(0.2)\n" + DID,
    "kill everything": "import os, time\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\nprint('alive')",
    "kill the parent": "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.2)\n" + DID,
    "trace the parent": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: " + DID,
    "connect to the service": "import socket\n" + attempt("socket.create_connection(('127.0.0.1', {port}), 1)"),
    "connect to the internet": "import socket\n" + attempt("socket.create_connection(('1.1.1.1', 53), 1)"),
    "resolve a name": "import socket\n" + attempt("socket.getaddrinfo('example.org', 80)"),
    "hold memory in files of memory": "import os\n" + attempt("os.memfd_create('x')"),
    "hold memory in segments": "import ctypes\nif ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0: " + DID,
    "hold memory in many processes": (
        "import os, time\nfor _ in range(6):\n    if not os.fork():\n        a = bytearray(b'x') * (60 << 20)\n"
        "        time.sleep(60)\ntime.sleep(3)\n" + DID
    ),
    "listen on a port": "import socket\n" + attempt("socket.socket().bind(('0.0.0.0', 0))"),
    "talk to the hypervisor": "import socket\n" + attempt("socket.socket(40, socket.SOCK_STREAM)"),
    "open a unix socket": "import socket\n" + attempt("socket.socket(socket.AF_UNIX)"),
    "write to the file system": attempt("open('/escaped', 'w').write('x')"),
    "write to /usr": attempt("open('/usr/lib/escaped', 'w').write('x')"),
    "write to the standard library": "import os\n" + attempt("open(os.__file__, 'a').write('x')"),
    "write where the secret is": attempt("open('{secret}.new', 'w').write('x')"),
    "follow a symlink out": "import os\nos.symlink('{secret}', '/tmp/link')\n" + attempt("open('/tmp/link').read()"),
    "climb out with dots": attempt("open('/tmp/../../../../..{secret}').read()"),
    "open a device": attempt("open('/dev/mem', 'rb')"),
    "make a device": "import os, stat\n" + attempt("os.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(8, 0))"),
    "become root": "import os\n" + attempt("os.setuid(0)"),
    "be root already": "import os\nif 0 in (os.getuid(), os.geteuid(), os.getgid()): " + DID,
    "keep a capability": attempt(
        "s = open('/proc/self/status').read()\nassert int(s.split('CapEff:')[1].split()[0], 16)"
    ),
    "make a user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: " + DID,
    "clone into a user namespace": "import ctypes\nif ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0) >= 0: "
    + DID,
    "mount something": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: " + DID,
    "change the root": "import os\n" + attempt("os.chroot('/tmp')"),
    "raise its limits": "import resource\n" + attempt("resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
    "trigger the kernel": attempt("open('/proc/sysrq-trigger', 'w').write('b')"),
    "change the kernel's settings": attempt("open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/sh')"),
    "start a shell": "import subprocess\n" + attempt("subprocess.run(['/bin/sh', '-c', 'true'], check=True)"),
    "use memory without end": "x = []\nwhile True: x.append(bytearray(10**7))",
    "fill the disk": attempt("f = open('/tmp/f', 'wb')\nfor _ in range(2000): f.write(bytes(10**6))\nf.flush()"),
    "fill it with many files": attempt("for i in range(200): open(f'/tmp/{{i}}', 'wb').write(bytes(10**6))"),
    "fork without end": "import os\nwhile True: os.fork()",
    "start threads without end": "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(9,)).start()\n"
    + DID,
    "use up file descriptors": attempt("held = [open('/dev/null') for _ in range(5000)]"),
    "compute for ever": "while True: pass",
    "sleep for ever": "import time\ntime.sleep(3600)",
    "sleep without signals": "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(3600)",
    "print without end": "while True: print('DONE' * 10000)",
    "leave a child behind": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(3600)\nprint('x')",
    "end at once with 0": "import os\nos._exit(0)",
    "print a result line": "print('1 passed'); print('{\"ok\": true}')",
    "crash the interpreter": "import ctypes\nctypes.string_at(0)",
    "dump core": "import os\nos.abort()",
    "trace a process of its own": (
        "import ctypes, os, time\npid = os.fork()\nif not pid: time.sleep(9)\n"
        "if ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0: " + DID
    ),
    "take a descriptor of the parent": (
        "import ctypes, os\nl = ctypes.CDLL(None)\nif l.syscall(438, l.syscall(434, os.getppid(), 0), 0, 0) >= 0: "
        + DID
    ),
    "make an io_uring": "import ctypes\nif ctypes.CDLL(None).syscall(425, 8, bytes(120)) >= 0: " + DID,
    "handle its own page faults": "import ctypes\nif ctypes.CDLL(None).syscall(323, 1) >= 0: " + DID,
    "mount in the new way": "import ctypes\nif ctypes.CDLL(None).syscall(430, b'tmpfs', 0) >= 0: " + DID,
    "open a file by its handle": "import ctypes\nif ctypes.CDLL(None).syscall(304, -100, bytes(64), 0) >= 0: " + DID,
    "join the namespaces of process 1": (
        "import ctypes, os\n" + attempt("assert ctypes.CDLL(None).setns(os.open('/proc/1/ns/mnt', 0), 0) == 0")
    ),
    "read the kernel's log": (
        "import ctypes\nif ctypes.CDLL(None).klogctl(3, ctypes.create_string_buffer(4096), 4096) >= 0: " + DID
    ),
    "read the kernel's memory": attempt("open('/proc/kcore', 'rb').read(1)"),
    "reach an abstract socket through a pair": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        + attempt("a.connect('\\0{abstract}')\na.send(b'x')")
    ),
    "signal its process group": (
        "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(0, signal.SIGTERM)\n"
        "print('still here')"
    ),
    "run before others": "import os\n" + attempt("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    "hold memory in semaphores": "import ctypes\nif ctypes.CDLL(None).semget(0, 32000, 0o600) >= 0: " + DID,
    "hold memory in empty files": (
        "import os, time\nfor i in range(11000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))\ntime.sleep(3)\n" + DID
    ),
    "hold memory in pipes": (
        "import fcntl, os\nheld = []\ntry:\n    while True:\n        held.append(os.pipe())\n"
        "        fcntl.fcntl(held[-1][1], 1031, 1 << 20)\nexcept OSError: pass\nif len(held) > 64: " + DID
    ),
    "flood inotify": (
        "import ctypes\nl = ctypes.CDLL(None)\nn = 0\nwhile n < 1000 and l.inotify_init() >= 0: n += 1\n"
        "if n > 64: " + DID
    ),
    "print what is no UTF-8": "import os\nos.write(1, b'\\xffDONE')",
    "print zeros": "import os\nos.write(1, b'DONE\\0')",
    "print a line without end": "import os\nos.write(1, b'DONE')\nwhile True: os.write(1, b' ' * 65536)",
    "look for the answer in its objects": (
        "import gc, sys\nfor o in gc.get_objects():\n    if isinstance(o, dict) and ('out' + 'put') in o: print(o['out' + 'put'])\n"
        "f = sys._getframe()\nwhile f:\n    for k, v in {**f.f_globals, **f.f_locals}.items():\n"
        "        if k in ('exp' + 'ected', 'te' + 'sts'): print(v)\n    f = f.f_back"
    ),
    "look for the answer in its files": (
        "import glob, os, sys\nword = b'DO' + b'NE'\nfor p in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + glob.glob('/tmp/**'):\n"
        "    try:\n        if word in open(p, 'rb').read(): print(word.decode())\n    except OSError: pass\n"
        "for fd in range(64):\n    try:\n        os.lseek(fd, 0, 0)\n    except OSError: pass\n"
        "    try:\n        if fd not in (1, 2) and word in os.read(fd, 1 << 20): print(word.decode())\n    except OSError: pass"
    ),
    "change what it was given": "import os\n" + attempt("os.write(0, b'x')"),
    "make what it was given larger": "import os\n" + attempt("os.posix_fallocate(0, 0, 1 << 20)"),
    "enter the kernel as 32 bits": (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))\n"
        "if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() > 0: " + DID
    ),
    "enter the kernel as x32": "import ctypes\nif ctypes.CDLL(None).syscall(0x40000000 + 39) >= 0: " + DID,
    "lift the filter": "import ctypes\nif ctypes.CDLL(None).syscall(317, 1, 0, bytes(16)) >= 0: " + DID,
    "be adopted by the kernel's rules of old": "import ctypes\nif ctypes.CDLL(None).personality(0x0440000) >= 0: "
    + DID,
    "write segments of its own": (
        "import ctypes\nl = ctypes.CDLL(None)\nif l.syscall(154, 1, bytes(16), 16) == 0 or l.syscall(154, 0, bytes(16), 16) == 0: "
        + DID
    ),
    "give pages to a pipe": (
        "import ctypes, os\nr, w = os.pipe()\nif ctypes.CDLL(None).syscall(278, w, 0, 0, 0) >= 0: " + DID
    ),
    "watch all files": "import ctypes\nif ctypes.CDLL(None).syscall(300, 0x200, 0) >= 0: " + DID,
    "hold memory in message queues": (
        "import ctypes\nif ctypes.CDLL(None).syscall(240, b'x', 0o102, 0o600, 0) >= 0: " + DID
    ),
    "copy a mount": "import ctypes\nif ctypes.CDLL(None).syscall(428, -100, b'/', 1) >= 0: " + DID,
    "compare with process 1": "import ctypes, os\nif ctypes.CDLL(None).syscall(312, os.getpid(), 1, 0, 1, 1) >= 0: "
    + DID,
    "kill process 1 by its descriptor": (
        "import os, signal\n" + attempt("signal.pidfd_send_signal(os.pidfd_open(1), signal.SIGKILL)")
    ),
    "stop process 1": "import os, signal\n" + attempt("os.kill(1, signal.SIGSTOP)\nassert False"),
    "stop its process group": "import os, signal\nos.kill(0, signal.SIGSTOP)\n" + DID,
    "map itself to root": "import os\n" + attempt("os.write(os.open('/proc/self/uid_map', os.O_WRONLY), b'0 0 1')"),
    "spare itself when memory is short": "import os\n"
    + attempt("os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000')"),
    "write the memory of process 1": attempt("open('/proc/1/mem', 'r+b', 0)"),
    "list the descriptors of process 1": "import os\n" + attempt("os.listdir('/proc/1/fd')[0]"),
    "see where the machine's files are": ("text = open('/proc/self/mountinfo').read()\nif '{folder}' in text: " + DID),
    "see sockets of the machine": "if len(open('/proc/net/unix').read().splitlines()) > 1: " + DID,
    "pair sockets of other families": (
        "import socket\nfor family in range(2, 46):\n    for kind in (1, 2, 3, 5):\n        try: socket.socketpair(family, kind)\n"
        "        except OSError: continue\n        " + DID
    ),
    "send to an abstract socket": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        + attempt("a.sendto(b'x', '\\0{abstract}')")
    ),
    "ask the message bus": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        + attempt("a.connect('/run/dbus/system_bus_socket')")
    ),
    "hide descriptors in flight": (
        "import os, socket\na, b = socket.socketpair()\na.setblocking(False)\nn = 0\ntry:\n    while n < 500:\n"
        "        r, w = os.pipe()\n        socket.send_fds(a, [b'x'], [r, w])\n        os.close(r)\n        os.close(w)\n        n += 1\n"
        "except OSError: pass\nif n >= 500: " + DID
    ),
    "hold memory in huge pages": "import mmap\n" + attempt("m = mmap.mmap(-1, 64 << 20, flags=0x40022)\nm[0] = 1"),
    "hold memory in deleted files": (
        "import os\nheld = []\ntry:\n    for _ in range(8):\n        held.append(open('/tmp/x', 'wb'))\n        os.unlink('/tmp/x')\n"
        "        held[-1].write(bytes(15 << 20))\n        held[-1].flush()\nexcept OSError: pass\nelse: " + DID
    ),
    "hold memory in attributes of files": (
        "import os, time\nopen('/tmp/f', 'w').close()\nfor i in range(2000): os.setxattr('/tmp/f', f'user.{i}', bytes(60000))\n"
        "time.sleep(1)\n" + DID
    ),
    "hold memory in nested folders": (
        "import os, time\nfor _ in range(11000):\n    os.mkdir('d')\n    os.chdir('d')\ntime.sleep(1)\n" + DID
    ),
    "hold timers of the kernel": (
        "import ctypes\nl, t, n = ctypes.CDLL(None), ctypes.c_int(), 0\n"
        "while n < 5000 and l.syscall(222, 0, 0, ctypes.byref(t)) == 0: n += 1\nif n >= 5000: " + DID
    ),
    "keep zombies": (
        "import os\nn = 0\ntry:\n    while n < 50:\n        if not os.fork(): os._exit(0)\n        n += 1\nexcept OSError: pass\n"
        "if n >= 50: " + DID
    ),
    "start a daemon that answers later": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(0.5)\n"
        "        os.write(1, b'DONE')\n        time.sleep(60)\n    os._exit(0)"
    ),
    "escape its time by forking on": (
        "import os, time\nbegun = time.time()\nwhile time.time() - begun < 60:\n"
        "    if time.process_time() > 0.3 and os.fork(): os._exit(0)\n" + DID
    ),
    "ignore the end of its time": (
        "import resource, signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    ),
    "run a copy of Python that is root's": (
        "import os, shutil\nshutil.copy('/python/bin/python3', '/tmp/p')\nos.chmod('/tmp/p', 0o6755)\n"
        "os.execv('/tmp/p', ['p', '-c', 'import os; print(\"DONE\" if os.geteuid() == 0 else 0)'])"
    ),
    "get its rights back by a new Python": (
        "import os\nos.execv('/python/bin/python3', ['p', '-c', 'import socket; socket.socket(); print(\"DONE\")'])"
    ),
    "load a library before the others": (
        "import os\nopen('/tmp/e.so', 'w').close()\nos.execve('/python/bin/python3', ['p', '-c', 'open(\"{secret}\"); print(\"DONE\")'],"
        " {'LD_PRELOAD': '/tmp/e.so', 'LD_LIBRARY_PATH': '/python/lib'})"
    ),
    "link what belongs to others": "import os\n" + attempt("os.link('/python/bin/python3', '/tmp/p')"),
    "send what would be unpickled": (
        "import os, pickle, sys\nclass Attack:\n    def __reduce__(self): return os.system, ('touch {secret}.new',)\n"
        "sys.stdout.buffer.write(pickle.dumps(Attack()))"
    ),
    "return to the start of the line": "print('x\\rDONE')",
    "be compiled without end": "(1 << 19**8,) * 4**7",
    "be folded into a large number": "x = 9**9**9\n" + DID,
    "be nested too deeply": "(" * 40_000 + ")" * 40_000,
    "end with a zero byte": DID + "\0",
    "leave by the fault handler": (
        "import faulthandler, time\nfaulthandler.dump_traceback_later(0.05, exit=True)\ntime.sleep(1)\n" + DID
    ),
    "answer as it ends": "import atexit, os\natexit.register(lambda: os.write(1, b'{\"ok\": true}\\n'))",
    "say it right and then fail": DID + "\nraise SystemExit(3)",
}

LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __contains__(self, item): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __hash__(self): return 0
"""
RAW = """
import json, os, struct
def raw(message):
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack('>I', len(message)) + message)
            return
        except OSError: pass
"""


def raw(message: str) -> str:
    """A solution that answers a call by bytes of its own."""
    return RAW + f"def f(x):\n    raw({message})\n    return 0"


VERDICT = '{"begin": true}\\n{"ok": true}\\n'
ASSERTING = {
    "an object equal to everything": LIAR + "def f(x): return Liar()",
    "an int equal to everything": "class I(int):\n    def __eq__(self, other): return True\ndef f(x): return I(7)",
    "a list of liars": LIAR + "def f(x): return [Liar()]",
    "end at once with 0": "import os\ndef f(x): os._exit(0)",
    "end at import": "import os\nos._exit(0)",
    "raise SystemExit": "def f(x): raise SystemExit(0)",
    "patch the comparison": "import builtins\nbuiltins.__build_class__ = None\nimport operator\noperator.eq = lambda a, b: True\ndef f(x): return 0",
    "patch AssertionError": "import builtins\nclass A(Exception): pass\nbuiltins.AssertionError = A\ndef f(x): return 0",
    "shadow a built-in": "def sum(x): return 100\ndef f(x): return 0",
    "shadow a module": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0",
    "print a verdict": f"def f(x):\n    print('{VERDICT}')\n    return 0",
    "write a verdict to every descriptor": (
        f"import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b'{VERDICT}')\n"
        "        except OSError: pass\n    os._exit(0)"
    ),
    "answer before it is asked": (
        "import os, struct\nfor fd in range(3, 64):\n    try:\n        for _ in range(9):\n"
        "            m = b'{\"v\": true}'\n            os.write(fd, struct.pack('>I', len(m)) + m)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "answer with too much": (
        "import os, struct\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, struct.pack('>I', 2**32 - 1))\n"
        "        except OSError: pass\n    return 0"
    ),
    "answer with deep nesting": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "look for the tests in memory": (
        "import gc, sys\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'tests' in o: return o['tests']\n    return None"
    ),
    "read the caller's frame": "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    return frame.f_locals.get('expected')",
    "answer with too long a number": raw("b'{\"v\":{\"i\":\"0x' + b'f' * 1_000_000 + b'\"}}'"),
    "answer with too large a decimal": raw('b\'{"v":{"D":"1E+999999999999999999"}}\''),
    "answer with a range without end": raw('b\'{"v":{"r":["0x0","0x7fffffffffffff","0x1"]}}\''),
    "answer with a named tuple that is equal to all": raw('b\'{"v":{"n":[["__eq__"],[4]]}}\''),
    "answer with a named tuple that is code": raw('b\'{"v":{"n":[["a=print(1)"],[4]]}}\''),
    "answer with what is no JSON": raw("b'{\"v\": NaN}'"),
    "answer with two kinds at once": raw('b\'{"v":{"i":"0x4","l":[]}}\''),
    "answer with the handle of a class": raw('b\'{"v":{"h":"__class__"}}\''),
    "answer with too long a time": raw("b'{\"v\":{\"T\":[1' + b'0' * 30 + b',0,0]}}'"),
    "answer by brackets alone": raw("b'[' * 200_000"),
    "answer with memory": raw("b'{\"v\":{\"l\":[' + b','.join([b'{\"l\":[]}'] * 1_000_000) + b']}}'"),
    "answer many times before it is asked": RAW
    + "raw(b'{\"ready\": true}')\nfor _ in range(50): raw(b'{\"v\": true}')\n",
    "close the channel": "import os\nos.closerange(3, 64)\ndef f(x): return 0",
    "send descriptors over the channel": (
        "import os, socket\nfor fd in range(3, 64):\n    try: socket.send_fds(socket.socket(fileno=os.dup(fd)), [b'x'], [0, 0])\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "end the channel's other side": (
        "import os, socket\nfor fd in range(3, 64):\n    try: socket.socket(fileno=os.dup(fd)).shutdown(2)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "answer twice, by a child": "import os\ndef f(x):\n    os.fork()\n    return 0",
    "be a class that counts": (
        "class M(type):\n    __len__ = lambda s: 1\n    __iter__ = lambda s: iter([4])\n    __getitem__ = lambda s, i: 4\n"
        "class f(metaclass=M):\n    def __init__(self, x): pass"
    ),
    "be an index and a float": (
        "class f:\n    def __init__(self, x): pass\n    __index__ = __int__ = __len__ = lambda s: 4\n    __float__ = lambda s: 4.0\n"
        "    __bool__ = lambda s: True"
    ),
    "refuse all that is audited": "import sys\ndef hook(*a): raise RuntimeError\nsys.addaudithook(hook)\ndef f(x): return 0",
    "replace the built-ins": (
        "import builtins\nfor n in ('isinstance', 'type', 'len', 'getattr', 'repr'): setattr(builtins, n, lambda *a: True)\n"
        "def f(x): return 0"
    ),
    "hang": "def f(x):\n    while True: pass",
    "be no distance from what is expected": "class L:\n    def __sub__(self, o): return 0\n    __truediv__ = lambda self, o: 1\ndef f(x): return L()",
    "be a distance that is small": (
        "class L:\n    def __sub__(self, o): return self\n    def __pow__(self, o): return 0\n    def __mul__(self, o): return 0\n"
        "    def __len__(self): return 0\ndef f(x): return L()"
    ),
    "say yes to every question": "class L:\n    def __getattr__(self, name): return lambda *a: True\ndef f(x): return L()",
    "end the test's own iteration": "def f(x): raise StopIteration",
    "have a length and no items": "class L:\n    def __len__(self): return 1\n    def __iter__(self): return iter(())\ndef f(x): return L()",
    "trace whatever is called next": (
        "import sys\ndef tracer(frame, event, arg):\n    for k in list(frame.f_locals):\n        if k == 'answer': frame.f_locals[k] = {'v': True}\n"
        "    return tracer\nsys.settrace(tracer)\ndef f(x): return 0"
    ),
    "patch what answers": (
        "import __main__, json\nfor n in dir(__main__):\n    v = getattr(__main__, n)\n    if callable(v) and n in ('encode', '_text'):\n"
        "        setattr(__main__, n, lambda *a: True)\njson.dumps = lambda *a, **k: '{\"v\": true}'\ndef f(x): return 0"
    ),
    "write a verdict as it ends": f"import atexit, os\natexit.register(lambda: os.write(1, b'{VERDICT}'))\ndef f(x): raise SystemExit",
    "claim to be a class that it is not": "class int(int):\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return int(0)",
    "hash like what is expected": "class L:\n    def __hash__(self): return hash(4)\n    def __eq__(self, o): return True\ndef f(x): return {L(): 4}",
    "an exception that is a BaseException": "class E(BaseException): pass\ndef f(x): raise E()",
    "an exception whose text hangs": "class E(Exception):\n    def __str__(self): raise E()\ndef f(x): raise E()",
}
TESTS = [
    "assert f(3) == 4",
    "import math\nassert math.isclose(f(3), 4)",
    "assert f(3) in (4,)",
    "assert sum([f(3), 1]) == 5",
    "assert abs(f(3) - 4) < 1e-6",
    "assert f(3) / 4 == 1",
    "assert (f(3) - 4) ** 2 < 1e-6",
    "assert all(map(lambda case: f(case[0]) == case[1], [(3, 4)]))",
    "for got in map(f, [3]):\n    assert got == 4",
]
POSING = (
    "an object equal to everything",
    "be a distance that is small",
    "say yes to every question",
    "have a length and no items",
)
OTHERS = {  # attacks on tests that expect something other than a number
    "def f(x): return '4'": "assert f(3).startswith('4')",
    "def f(x): return {4}": "assert f(3).issubset({4})",
    "def f(x): return [4]": "r = f(3)\nassert len(r) == 1 and all(a == b for a, b in zip(r, [4]))",
    "def f(x): return frozenset({4})": "assert len(f(3) - {4}) == 0",
}
ARGS = {"timeout": 1, "memory_mb": 128}


async def test_programs_that_attack_earn_nothing_and_others_are_scored(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SERVICE", "SECRET")
    secret = tmp_path / "secret"
    secret.write_text("SECRET")
    tests = [{"input": "", "output": "DONE"}]
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract,
    ):
        abstract.bind(f"\0surogate-{os.getpid()}")
        known = {
            "{secret}": str(secret),
            "{pid}": str(os.getpid()),
            "{port}": str(listening.getsockname()[1]),
            "{abstract}": f"surogate-{os.getpid()}",
            "{folder}": str(tmp_path),
        }
        programs = [_filled(program, known) for program in PRINTING.values()]
        async with reward_stub(Code(3), item_timeout=120) as stub:
            attacks = asyncio.ensure_future(
                stub.ScoreRollouts(group("code", *programs, args=ARGS, fields={"tests": tests}), timeout=280)
            )
            honest = group(
                "code", "print('DONE')", "print('done')", args=ARGS | {"timeout": 20}, fields={"tests": tests}
            )
            meanwhile = [outcomes(await stub.ScoreRollouts(honest, timeout=250)) for _ in range(3)]
            found = dict(zip(PRINTING, outcomes(await attacks), strict=True))
    assert meanwhile == [[1.0, 0.0]] * 3
    assert {name: reward for name, reward in found.items() if reward != 0.0} == {}
    assert sorted(await asyncio.to_thread(os.listdir, tmp_path)) == ["secret"]


async def test_a_service_that_is_not_root_is_as_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_svc.sandbox.launch.os.geteuid", lambda: 1000)  # then all processes are of one user
    about = ("process 1", "root", "namespace", "memory is short")
    harmless = ("kill", "stop")  # process 1 does not hear it
    names = [name for name in PRINTING if any(word in name for word in about) and not name.startswith(harmless)]
    programs = [_filled(PRINTING[name], {"{secret}": "/nowhere"}) for name in names]
    tests = [{"input": "", "output": "DONE"}]
    async with reward_stub(Code(3), item_timeout=120) as stub:
        request = group("code", *programs, args=ARGS, fields={"tests": tests})
        found = outcomes(await stub.ScoreRollouts(request, timeout=280))
        honest = group("code", "print('DONE')", args=ARGS | {"timeout": 20}, fields={"tests": tests})
        assert outcomes(await stub.ScoreRollouts(honest)) == [1.0]
    assert len(names) > 10
    assert {name: reward for name, reward in zip(names, found, strict=True) if reward != 0.0} == {}


async def test_solutions_that_attack_their_tests_earn_nothing() -> None:
    async with reward_stub(Code(3), item_timeout=200) as stub:
        request = group("code", *ASSERTING.values(), args=ARGS, fields={"tests": TESTS})
        found = dict(zip(ASSERTING, outcomes(await stub.ScoreRollouts(request, timeout=280)), strict=True))
        assert {name: reward for name, reward in found.items() if reward != 0.0} == {}
        honest = group("code", "def f(x): return x + 1", args=ARGS | {"timeout": 20}, fields={"tests": TESTS})
        assert outcomes(await stub.ScoreRollouts(honest)) == [1.0]


async def test_objects_that_pose_as_plain_data_earn_nothing() -> None:
    posing = [ASSERTING[name] for name in POSING]
    async with reward_stub(Code(3), item_timeout=200) as stub:
        for honest, test in OTHERS.items():
            request = group("code", honest, *posing, args=ARGS | {"timeout": 20}, fields={"tests": [test]})
            assert outcomes(await stub.ScoreRollouts(request, timeout=280)) == [1.0, *[0.0] * len(posing)], test


def test_there_are_enough_attacks() -> None:
    assert len(PRINTING) + len(ASSERTING) >= 160


def _filled(program: str, known: dict[str, str]) -> str:
    for name, value in known.items():
        program = program.replace(name, value)
    return program.replace("{{", "{").replace("}}", "}")
