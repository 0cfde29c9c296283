"""Kernels for many notebooks in a row, forked from a server that has imported the libraries.

Such a kernel is as fresh as any other, but spares a processor the six seconds of importing torch and what builds on it.
Jupyter's client starts them where JUPYTER_DEFAULT_PROVISIONER_NAME says PROVISIONER.
"""

import os
import signal
import sys
from multiprocessing import current_process, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from threading import Thread

from jupyter_client.provisioning import LocalProvisioner

PROVISIONER = "whalelib-forked"
# To be set for them. On a Mac a process that has loaded such libraries can't be forked safely.
FORKED = {"JUPYTER_DEFAULT_PROVISIONER_NAME": PROVISIONER} if sys.platform == "linux" else {}
# Libraries are imported once, and no thread of ours is copied.
PROCESSES = get_context("forkserver")
LIBRARIES = (
    "ipykernel.kernelapp",
    "torchvision",
    "whalelib.augment",
    "segmentation_models_pytorch",
    "sklearn",
    "seaborn",
)
PROCESSES.set_forkserver_preload(["whalelib.course.execute", *(LIBRARIES if FORKED else ())])

_ready: list[tuple[BaseProcess, Connection]] = []


def get_ready() -> None:
    """Fork the next kernel of this process from itself, while it has no threads.

    One of PROCESSES is forked from the server, but cannot ask it for processes: it would start another server.
    """
    if FORKED:
        _ready.append(_waiting(get_context("fork")))


def _waiting(context: BaseContext) -> tuple[BaseProcess, Connection]:
    """Return a process that waits to be told what kernel to be, and the connection to tell it."""
    theirs, ours = context.Pipe(duplex=False)
    process = context.Process(target=_be_kernel, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


class ForkedProvisioner(LocalProvisioner):
    """Starts Python's kernels as forked processes, and others as its parent class does."""

    async def launch_kernel(self, cmd: list[str], **options: object) -> dict:
        """Start the kernel that the words of ``cmd`` say, and return how to reach it."""
        if "ipykernel_launcher" not in cmd:
            return await super().launch_kernel(cmd, **options)
        words = cmd[cmd.index("ipykernel_launcher") :]
        arguments = (words, options.get("env") or dict(os.environ), options.get("cwd") or os.getcwd())
        process, link = _ready.pop() if _ready else _waiting(PROCESSES)
        link.send(arguments)
        self.process, self.pid, self.pgid, self.cwd = _Popen(process), process.pid, process.pid, arguments[2]
        return self.connection_info


class _Popen:
    """A process of multiprocessing as a provisioner sees one of `subprocess`."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self.process = process
        self.pid, self.kill, self.terminate = process.pid, process.kill, process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _be_kernel(link: Connection) -> None:
    import matplotlib as mpl  # noqa: PLC0415
    from ipykernel.kernelapp import launch_new_instance  # noqa: PLC0415
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    os.setsid()
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    words, variables, folder = link.recv()
    current_process().daemon = False  # a notebook may have processes of its own
    os.environ.clear()
    os.environ.update(variables, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(folder)
    if threads := variables.get("OMP_NUM_THREADS"):
        threadpool_limits(int(threads))  # libraries read it when they are loaded, which is done
    for name in [name for name in sys.modules if name.split(".")[0] == "tqdm"]:
        del sys.modules[name]  # it asks when it is imported whether it runs in a notebook
    # This one was asked for when it was imported.
    mpl.rcParams["backend"] = variables.get("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    sys.argv = words
    launch_new_instance()


def _end_with(process: BaseProcess) -> None:
    wait([process.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
