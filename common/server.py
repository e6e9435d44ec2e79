"""vLLM for --serve."""

import atexit
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from common.endpoint import own_address
from common.memory import gpu_gib
from common.run_folder import fail, main_process


class Server:
    """vLLM for --serve: started when the first answer is needed, started again when it dies, gone when this process is.

    It has a process group of its own, so that a Ctrl-C ends first what asks and then what answers; it gets SIGTERM when
    this process goes without a word, and nothing of the group outlasts `stop`.
    """

    START, RESTARTS, STOP = 1800, 3, 30  # seconds to load, or download, the model; times; seconds to end by itself
    here: "Server | None" = None

    @classmethod
    def start(cls, args, log: Path) -> None:
        """Start it unless it runs, and return when it answers; other ranks of one training wait for the first's.

        Ends with one line, below the end of the log, where it cannot be started.
        """
        if not cls.here:
            cls.here = cls(args, log)

    def __init__(self, args, log: Path):
        self.port, self.log, self.child = args.serve, log, None
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if main_process():
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    fail(f"something answers on port {self.port} already: ask it with --base-url "
                         f"{own_address(self.port)} instead of --serve, or give --serve another port")  # fmt: skip
            gpu = gpu_gib()
            share = ["--gpu-memory-utilization", f"{args.judge_memory / gpu:.3f}"] if gpu else []
            # A model that may put as many blanks between JSON's tokens as it likes can do so until its answer is cut.
            schemas = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
            self.command = [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model,
                "--host", "127.0.0.1", "--port", str(self.port),
                "--max-model-len", "4096", "--structured-outputs-config", schemas,
                *(share or ["--enforce-eager", "--dtype", "bfloat16"]), *shlex.split(args.serve_flags),
            ]  # fmt: skip
            if setpriv := shutil.which("setpriv"):
                self.command = [setpriv, "--pdeathsig", "TERM", *self.command]
            ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            self.environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | {k: v for k, v in os.environ.items() if k not in ours}
            self.changing = threading.Lock()
            atexit.register(self.stop)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            tqdm.write(f"starting {args.model} on port {self.port}; its log is {log}", file=sys.stderr)
            self.begin()
        self.wait()
        if self.child:
            threading.Thread(target=self.keep_up, daemon=True).start()

    def begin(self) -> None:
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=self.environment,
            )  # fmt: skip

    def healthy(self) -> bool:
        try:
            return self.opener.open(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def wait(self) -> None:
        """Return when it is healthy."""
        until = time.monotonic() + self.START
        while not self.healthy():
            ended = self.child and self.child.poll() is not None
            if ended or time.monotonic() > until:
                with suppress(OSError):
                    last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                    tqdm.write("\n".join(last), file=sys.stderr)
                why = f"ended with code {self.child.returncode}" if ended else f"is not healthy after {self.START} s"
                fail(f"the server of --serve {why}; see the end of {self.log} above: less --judge-memory, other "
                     "--serve-flags, another --model, or a server elsewhere with --base-url")  # fmt: skip
            time.sleep(0.5)

    def keep_up(self) -> None:
        """Start it again when it dies, RESTARTS times at most. The clients wait meanwhile (--wait)."""
        for _ in range(self.RESTARTS):
            died = self.child.wait()
            with self.changing:
                if not self.child:
                    return
                tqdm.write(f"the server died (code {died}) and is started again; see {self.log}", file=sys.stderr)
                self.kill()
                self.begin()

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # what serves may outlast what answers, and hears no SIGTERM then
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def stop(self) -> None:
        with self.changing:
            if not self.child:
                return
            try:
                self.child.terminate()
                self.child.wait(self.STOP)
            except subprocess.TimeoutExpired:
                pass
            finally:
                self.kill()
                self.child = None
