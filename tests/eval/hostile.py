"""Hostile programs. Each is the body of a function that returns True if its attack succeeded, with the names CANARY
(a file outside that everybody may write), PORT (a TCP and UDP server of the host), SOCKET (its unix socket) and HOST
(process id of the evaluator). A program passes its test only if its attack returned True; see `program`."""

ATTACKS = {
    # Use up what there is.
    "endless loop": "while True: pass",
    "endless loop that catches everything": """
while True:
    try:
        while True: pass
    except BaseException: pass""",
    "endless sleep": "import time\ntime.sleep(10**6)\nreturn True",
    "ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nreturn True",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that catches everything": """
import os
while True:
    try: os.fork()
    except BaseException: pass""",
    "thread bomb": """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(99,), daemon=True) for _ in range(10**4)]
for thread in threads: thread.start()
return True""",
    "memory hog": "data = [bytearray(10**7)  for _ in range(10**4)]\nreturn True",
    "memory hog of many processes": """
import os, time
for _ in range(8):
    if os.fork() == 0:
        data = bytearray(b"x") * (300 << 20)
        time.sleep(99)
time.sleep(99)
return True""",
    "one huge number": "x = 9 ** 9 ** 9\nreturn True",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def down(n): return down(n + 1) + 1
down(0)
return True""",
    "deep nesting of a returned value": """
global f
def f(x):
    deep = []
    for _ in range(10**6): deep = [deep]
    return deep
return True""",
    "fills the disk": """
for i in range(10**4):
    open(f"file{i}", "wb").write(bytes(10**7))
return True""",
    "fills memory with unlinked files": """
import os
held = []
for i in range(10**4):
    file = open("x", "wb"); file.write(bytes(10**7)); os.unlink("x"); held.append(file)
return True""",
    "one huge file": """
with open("huge", "wb") as file:
    for _ in range(10**4): file.write(bytes(10**7))
return True""",
    "a million files": """
import os
for i in range(10**6): open(str(i), "w").close()
return True""",
    "zip bomb": """
import zlib
bomb = zlib.compress(bytes(10**8))
data = [zlib.decompress(bomb) for _ in range(200)]
return True""",
    "huge stdout": "while True: print('x' * 10**6)",
    "huge stderr": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "huge returned value": """
global f
def f(x): return "x" * (400 << 20)
return True""",
    "catastrophic pattern": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')\nreturn True",
    "more open files than allowed": "held = [open('/dev/null') for _ in range(10**4)]\nreturn True",
    "raises its own limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
return True""",
    # Reach out.
    "TCP to the host": """
import socket
socket.create_connection(("127.0.0.1", PORT), 1)
return True""",
    "TCP to the internet": """
import socket
socket.create_connection(("1.1.1.1", 53), 1)
return True""",
    "UDP": """
import socket
sent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT))
return False""",
    "DNS": "import socket\nsocket.getaddrinfo('example.com', 80)\nreturn True",
    "HTTP": "import urllib.request\nurllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=1)\nreturn True",
    "raw socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)\nreturn True",
    "packet socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nreturn True",
    "unix socket of the host": "import socket\nsocket.socket(socket.AF_UNIX).connect(SOCKET)\nreturn True",
    "abstract unix socket of the host": """
import socket
socket.socket(socket.AF_UNIX).connect(chr(0) + SOCKET)
return True""",
    # Read what is secret.
    "environment": "import os\nreturn 'SECRET_KEY' in os.environ",
    "environment of the evaluator": "return b'SECRET_KEY' in open(f'/proc/{HOST}/environ', 'rb').read()",
    "environment of any process": """
import glob
return any(b"SECRET_KEY" in open(path, "rb").read() for path in glob.glob("/proc/*/environ"))""",
    "home folder": "import os\nreturn bool(os.listdir(os.path.expanduser('~root')))",
    "password files": "return bool(open('/etc/passwd').read() or open('/etc/shadow').read())",
    "file of the host": "return open(CANARY).read() == 'canary'",
    "file of the host by a symbolic link": """
import os
os.symlink(CANARY, "link")
return open("link").read() == "canary" """,
    "file of the host by its file handles": """
import os
for number in range(3, 256):
    try: os.stat(CANARY, dir_fd=number); return True
    except OSError: pass
    try:
        if os.listdir(number): return True
    except OSError: pass
return False""",
    "problems file": """
import os
return any("HumanEval" in name for _, _, names in os.walk("/tmp") for name in names)""",
    # Change what is outside.
    "writes outside": "open(CANARY, 'w').write('gone')\nreturn True",
    "deletes outside": "import os\nos.unlink(CANARY)\nreturn True",
    "deletes all": """
import shutil
shutil.rmtree("/", ignore_errors=True)
return False""",
    "deletes the interpreter": "import os, sys\nos.unlink(sys.executable)\nreturn True",
    "writes into the packages": "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'x.py'), 'w')\nreturn True",
    "writes through a symbolic link": "import os\nos.symlink(CANARY, 'x')\nopen('x', 'w').write('gone')\nreturn True",
    "hard link to the outside": "import os\nos.link('/usr/bin/env', 'x')\nreturn True",
    "swaps its scratch folder": "import os\nos.rmdir('/tmp')\nos.symlink('/', '/tmp')\nreturn True",
    "writes beside its scratch folder": "open('/tmp/../x', 'w')\nreturn True",
    "mount": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
return libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0""",
    "mounts proc": """
import ctypes, os
os.mkdir("p")
return ctypes.CDLL(None).mount(b"proc", b"/tmp/p", b"proc", 0, None) == 0""",
    "makes the system writable": """
import ctypes
return ctypes.CDLL(None).mount(None, b"/usr", None, 32 | 4096, None) == 0""",
    "new user namespace": """
import ctypes
return ctypes.CDLL(None).unshare(0x10000000) == 0""",
    "new user namespace by a new process": """
import ctypes
return ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0) > 0""",
    "chroot escape": """
import os
os.mkdir("jail"); os.chroot("jail")
for _ in range(64): os.chdir("..")
os.chroot(".")
return True""",
    "raw device": """
import os
os.mknod("disk", 0o60600, os.makedev(254, 0))
return bool(open("disk", "rb").read(512))""",
    "kernel memory": "return bool(open('/dev/mem', 'rb').read(1) or open('/dev/kmsg').read(1))",
    "becomes root": """
import os
os.setuid(0); os.setgid(0)
return os.getuid() == 0 and bool(open("/etc/shadow").read())""",
    "set-uid programs": """
import subprocess
done = subprocess.run(["su", "-c", "id -u"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
return done.stdout.strip() == "0" """,
    "set-uid file of its own": """
import os, shutil, subprocess
shutil.copy("/usr/bin/id", "id"); os.chown("id", 0, 0); os.chmod("id", 0o4755)
return subprocess.run(["./id", "-u"], capture_output=True, text=True).stdout.strip() == "0" """,
    "changes the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nreturn True",
    "changes the host's name": "import socket\nsocket.sethostname('gone')\nreturn True",
    "takes priority": "import os\nos.nice(-10)\nreturn True",
    "takes all processors in real time": """
import os
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
return True""",
    "restarts the machine": """
import ctypes
return ctypes.CDLL(None).reboot(0x1234567) == 0""",
    "loads a kernel module": "import ctypes\nreturn ctypes.CDLL(None).syscall(175, b'', 0, b'') == 0",
    # Other processes.
    "kills the evaluator": "import os\nos.kill(HOST, 9)\nreturn True",
    "kills its parents": "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(0.2)\nreturn True",
    "kills all": "import os\nos.kill(-1, 9)\nreturn True",
    "sees the evaluator": "import os\nos.kill(HOST, 0)\nreturn True",
    "traces the evaluator": "import ctypes\nreturn ctypes.CDLL(None).ptrace(16, HOST, 0, 0) == 0",
    "traces its parent": "import ctypes, os\nreturn ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "daemon that stays": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(256):
            try: os.close(number)
            except OSError: pass
        time.sleep(10**6)
    os._exit(0)
return False""",
    "daemon that keeps the output open": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(10**6)
os._exit(0)""",
    # Forge the verdict.
    "prints passed": "print('passed'); print('{\"value\": 42}'); raise ValueError",
    "exits with 0": "import sys\nsys.exit(0)",
    "exits with 0 at once": "import os\nos._exit(0)",
    "exits when asked": "global f\ndef f(x):\n    import os\n    os._exit(0)\nreturn True",
    "replaces assert's error": "import builtins\nbuiltins.AssertionError = ZeroDivisionError\nreturn False",
    "replaces built-ins": """
import builtins
for name in ("abs", "all", "isinstance", "len", "type"): setattr(builtins, name, lambda *a: True)
return False""",
    "equal to everything": """
global f
class Equal:
    def __eq__(self, other): return True
    __hash__ = None
def f(x): return Equal()
return True""",
    "a number equal to everything": """
global f
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = None
def f(x): return Equal(7)
return True""",
    "looks for what is expected": """
global f
def f(x):
    import gc, sys
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if value == 42: return value
        frame = frame.f_back
    return next(o for o in gc.get_objects() if isinstance(o, dict) and o.get("expected"))["expected"]
return True""",
    "writes replies of its own": """
import os
for number in range(3, 64):
    try: os.write(number, b'{"value": null}\\n{"value": "passed"}\\n' * 3)
    except OSError: pass
return False""",
    "writes half a reply and stays": """
import os, time
for number in range(3, 64):
    try: os.write(number, b'{"value": ')
    except OSError: pass
time.sleep(99)""",
    "writes nonsense": """
import os
for number in range(3, 64):
    try: os.write(number, b'\\xff\\x00{"int": "zz"}\\n')
    except OSError: pass
os._exit(0)""",
    "replies with a value that is none": """
import os
for number in range(3, 64):
    try: os.write(number, b'{"value": {"set": [[1]]}}\\n')
    except OSError: pass
os._exit(0)""",
    "closes all": """
import os
os.closerange(0, 256)
return True""",
    "replaces the harness": """
import sys
main = sys.modules["__main__"]
main.encode = lambda value: "passed"
main.json.dumps = lambda *a, **k: '{"verdict": "passed", "value": "passed"}'
return True""",
    "replaces the unit-test module": """
import unittest, sys
sys.modules["unittest"] = sys.modules["pytest"] = None
unittest.TestCase.assertEqual = lambda *a: None
return False""",
}


def program(attack: str, **names: object) -> str:
    """The attack as a program whose f doubles a number if, and only if, the attack succeeded."""
    body = "\n".join("    " + line for line in attack.strip("\n").splitlines())
    known = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return (
        f"{known}def f(x):\n    assert succeeded\n    return 2 * x\n\n"
        f"def attack():\n{body}\n\nsucceeded = attack() is True\n"
    )
