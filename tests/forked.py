"""A process that has imported the library and nothing more: each line it reads is a verification, run in a child of its own."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn


class Verifications:
    """Stands for the module `subprocess` in `hf_compact.verify`: a fork for each process, which saves the imports' seconds."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None

    def run(self, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-P", "-m", "hf_compact.verify"]
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._server = subprocess.Popen([sys.executable, "-m", __name__], text=True, cwd=Path(__file__).parents[1], **pipes)
        written = [f"{command[6]}.{kind}" for kind in ("stdout", "stderr")]
        self._server.stdin.write(json.dumps([str(Path.cwd()), *written, command[4:]]) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(Path(path).read_text() for path in written))

    def end(self) -> None:
        """The process ends with its input."""
        if self._server is not None:
            with self._server:
                self._server.stdin.close()


def run(place: str, out: str, errors: str, arguments: list[str]) -> NoReturn:
    """What the child does."""
    os.chdir(place)
    for number, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    code = 0
    try:
        verify.main(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    from hf_compact import verify

    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(*json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
