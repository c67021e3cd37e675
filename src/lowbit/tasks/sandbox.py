"""Runs code that a model wrote, apart: in a process of its own that has little to spend and little to reach.

    a new Python without site packages, environment or the caller's folder (-I -S), in an empty temporary folder
    limits   seconds of processor and of clock, bytes of memory, no bytes written to files, 16 open files, no processes
    refused  by an audit hook: files that are opened to be written, sockets, processes, ctypes, deleting, signals

What the code prints is no answer. All that stops accidents and what a model may write, not somebody who means to break
out: Python has no walls inside, files can be read, and the judge shares the process. Whoever evaluates models that he
does not trust runs lowbit in a container.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECONDS = 5.0
MEMORY = 512 << 20
_OUT_OF_TIME = (signal.SIGKILL, signal.SIGXCPU) if hasattr(signal, "SIGXCPU") else ()

# Runs in the other process: limits first, then the hook, then the code. Its answer is a line that begins with a number
# of this run, so that what the code prints is no answer.
_RUNNER = r"""
import json, sys
asked = json.loads(sys.stdin.readline())
try:
    import resource
    for what, limit in ((resource.RLIMIT_CPU, asked["seconds"]), (resource.RLIMIT_AS, asked["memory"]),
                        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, limit))
except ImportError:
    pass
_REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
            "os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.putenv", "shutil.", "ctypes.", "pty.", "signal.", "winreg.", "webbrowser.", "urllib.")
def _hook(event, arguments):
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and any(each in mode for each in "wax+")) or (isinstance(flags, int) and flags & 3):
            raise PermissionError("files are not written here")
    elif event.startswith(_REFUSED):
        raise PermissionError(event + " is not done here")
out = sys.stdout
sys.stdout = sys.stderr
sys.addaudithook(_hook)
def _judge():
    space = {"__name__": "answer"}
    try:
        exec(compile(asked["code"], "answer", "exec"), space)
        for expression, wanted in asked["cases"]:
            if eval(expression, space) != eval(wanted, {}):
                return "wrong: " + expression
    except BaseException as error:
        return type(error).__name__
    return "right"
said = _judge()
out.write("\n" + asked["nonce"] + " " + said + "\n")
out.flush()
"""


def run_cases(
    code: str, cases: Sequence[tuple[str, str]], seconds: float = SECONDS, memory: int = MEMORY
) -> tuple[bool, str]:
    """(every case holds, why not: "wrong: add(2, 3)", the name of an exception, "too long", "killed")."""
    nonce = secrets.token_hex(16)
    asked = {"code": code, "cases": list(cases), "seconds": max(1, int(seconds)), "memory": memory, "nonce": nonce}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _RUNNER], input=json.dumps(asked) + "\n", text=True, cwd=folder,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, timeout=seconds + 5, start_new_session=True,
                errors="replace", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False, "too long"
    for line in done.stdout.splitlines():
        if line.startswith(f"{nonce} "):
            said = line.removeprefix(f"{nonce} ")
            return said == "right", "" if said == "right" else said
    return False, "too long" if -done.returncode in _OUT_OF_TIME else "killed"
