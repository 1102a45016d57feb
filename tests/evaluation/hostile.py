"""Programs that mean harm, and `ATTEMPT`, which reports what they could do.

Names in braces are filled in by the tests: addresses, paths, the pid of the trainer.
"""

ATTEMPT = """
import ctypes, mmap, os, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, act):
    try:
        result = act()
    except (Exception, MemoryError):
        return
    if not (isinstance(result, int) and result == -1):
        print("escaped", name, result, flush=True)
"""

FORKS = """
def bomb():
    for _ in range(300):
        if os.fork() == 0:
            time.sleep(60)
    return "forked"
attempt("fork", bomb)
"""
DAEMON = """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 65):
                try: signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError): pass
            for fd in range(64):
                try: os.close(fd)
                except OSError: pass
            while True: time.sleep(60)
        os._exit(0)
    os.wait()
    return "forked"
attempt("daemon", daemon)
"""
ZOMBIES = """
def zombies():
    for _ in range(30):
        if os.fork() == 0: os._exit(0)
    return "forked"
attempt("zombies", zombies)
"""
EXECUTE = """
import subprocess
attempt("execv", lambda: os.execv("/bin/sh", ["sh", "-c", "echo escaped"]))
attempt("subprocess", lambda: subprocess.run([sys.executable or "python3", "-c", "pass"]))
attempt("system", lambda: "ran" if os.system("true") == 0 else -1)
attempt("posix_spawn", lambda: os.posix_spawn("/bin/sh", ["sh", "-c", "true"], {}))
"""
SLEEP = "import time\ntime.sleep(1000)"
DEAF = """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
"""
BUSY = """
import signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True: pass
"""
STOPPED = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
SLOW_EXIT = "import atexit, time\natexit.register(lambda: time.sleep(1000))"
SPINNING_THREADS = """
import threading
def spin():
    while True: pass
for _ in range(8): threading.Thread(target=spin).start()
"""
MEMORY = """
attempt("mmap", lambda: mmap.mmap(-1, 4 << 30))
attempt("bytes", lambda: len([bytearray(1 << 24) for _ in range(60)]))
def memfds():
    for _ in range(1000):
        fd = os.memfd_create("x")
        for _ in range(64): os.write(fd, bytes(1 << 16))
    return "filled"
attempt("memfd", memfds)
attempt("shmget", lambda: libc.shmget(0, ctypes.c_size_t(1 << 30), 0o1600))
def threads():
    for _ in range(2000): threading.Thread(target=time.sleep, args=(0.2,)).start()
    return "started"
attempt("threads", threads)
"""
DISK = """
def one_file():
    with open("big", "wb") as file:
        for _ in range(1000): file.write(bytes(1 << 16))
    return "filled"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
attempt("one file", one_file)
def many_files():
    for number in range(9):
        with open(f"middle{number}", "wb") as file: file.write(bytes(1 << 20))
    return "filled"
attempt("many files", many_files)
def many_folders():
    for number in range(5000): os.mkdir(f"folder{number}")
    return "filled"
attempt("many folders", many_folders)
"""
ROUGH_FILES = """
def rough():
    os.symlink(".", "loop"); os.symlink("/", "root"); os.symlink("nowhere", "dangling")
    os.makedirs("a/b/c"); os.chmod("a/b", 0); os.mkfifo("pipe") if hasattr(os, "mkfifo") else None
try: rough()
except OSError: pass
def deep():
    for _ in range(500):
        os.mkdir("d" * 200); os.chdir("d" * 200)
try: deep()
except OSError: pass
try: open("n" * 255, "w").close()
except OSError: pass
try: os.chmod("/program", 0)
except OSError: pass
"""
OUTPUT = "while True: print('x' * 1000)"
ERRORS = "import sys\nwhile True: print('x' * 1000, file=sys.stderr)"
SOCKETS = """
def connect(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(0.2); client.connect(address); client.send(b"escaped")
    return "connected"
def send(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as client: client.sendto(b"escaped", address)
    return "sent"
attempt("tcp", lambda: connect(socket.AF_INET, ("127.0.0.1", {tcp})))
try: send(socket.AF_INET, ("127.0.0.1", {udp}))
except OSError: pass
attempt("unix", lambda: connect(socket.AF_UNIX, {unix!r}))
attempt("abstract", lambda: connect(socket.AF_UNIX, {abstract!r}))
def pair():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.sendto(b"escaped", {datagrams!r})
    return "sent"
attempt("sendto", pair)
def message():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.sendmsg([b"escaped"], [], 0, {datagrams!r})
    return "sent"
attempt("sendmsg", message)
"""
SIGNALS = """
import fcntl
parent, launcher = {parent}, os.getppid()
for target in (parent, launcher, 0, -1, 1, -os.getpgid(0) or -1):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        if target in (0, -1) and number != signal.SIGUSR1: continue
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try: os.kill(target, number)
        except OSError: pass
for number in (signal.SIGUSR1, signal.SIGKILL):
    libc.syscall(234, parent, parent, int(number)); libc.syscall(200, parent, int(number))
    try: signal.pidfd_send_signal(os.pidfd_open(parent), number)
    except OSError: pass
    try:
        read, write = os.pipe()
        fcntl.fcntl(read, fcntl.F_SETOWN, parent); fcntl.fcntl(read, 10, int(number))
        fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK); os.write(write, b"x")
    except OSError: pass
attempt("limits of others", lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1, 1)))
attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, parent, 19))
"""
SECRETS = """
attempt("environment", lambda: os.environ["FIREOPD_SECRET"])
for path in ("/proc/{parent}/environ", "/proc/{parent}/mem", "/proc/1/environ", "/proc/{parent}/fd",
             "/proc/self/root/etc/shadow", "/etc/passwd", {secret!r}, os.path.dirname({secret!r})):
    attempt(path, lambda: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(99)
            if os.path.basename(path) != "environ" or b"HIDDEN" in open(path, "rb").read() else -1)
def memory():
    local = ctypes.create_string_buffer(8)
    class Part(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
    here, there = Part(ctypes.addressof(local), 8), Part({address}, 8)
    return libc.process_vm_readv({parent}, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
attempt("memory of the parent", memory)
attempt("ptrace", lambda: libc.ptrace(0x4206, {parent}, 0, 0))
"""
OUTSIDE = """
for folder in {folders!r}:
    attempt(folder, lambda: open(os.path.join(folder, {name!r}), "w").write("x"))
    attempt("mkdir in " + folder, lambda: os.mkdir(os.path.join(folder, {name!r})) or "made")
attempt("truncate", lambda: os.truncate({secret!r}, 0) or "truncated")
attempt("chmod", lambda: os.chmod({secret!r}, 0) or "changed")
attempt("unlink", lambda: os.unlink({secret!r}) or "removed")
attempt("open to write", lambda: os.open({secret!r}, os.O_RDONLY | os.O_TRUNC) and "opened")
attempt("standard library", lambda: open(os.__file__, "a").write("#"))
"""
RIGHTS = """
attempt("mount", lambda: libc.mount(b"none", b"/program", b"tmpfs", 0, None))
attempt("umount", lambda: libc.umount2(b"/program", 2))
attempt("unshare", lambda: libc.unshare(0x20000))
attempt("chroot", lambda: os.chroot("/") or "changed")
attempt("setuid", lambda: os.setuid(0) or "changed" if os.getuid() else -1)
attempt("sethostname", lambda: socket.sethostname("mine") or "changed")
attempt("more memory", lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)) or "raised")
attempt("bpf", lambda: libc.syscall(321, 5, 0, 0))
attempt("dev", lambda: open("/dev/mem", "rb"))
"""
NEW_RIGHTS = """
attempt("new users", lambda: libc.unshare(0x10000000))
attempt("io_uring", lambda: libc.syscall(425, 8, ctypes.create_string_buffer(120)))
attempt("keyring", lambda: libc.syscall(250, 0, -3, 1))
"""
PACKAGES = """
attempt("jax", lambda: __import__("jax"))
for folder in {site!r}:
    sys.path.append(folder)
attempt("jax by path", lambda: __import__("jaxlib"))
attempt("GPU", lambda: [name for name in os.listdir("/dev") if "nvidia" in name] or -1)
"""
CRASHES = {
    "segfault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    "exit 3": "raise SystemExit(3)",
    "_exit 4": "import os\nos._exit(4)",
    "no standard streams": "import os\nos.closerange(0, 64)",
    "no text": "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')\nsys.stdout.flush()\n1/0",
}  # fmt: skip
