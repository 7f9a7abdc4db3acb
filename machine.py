"""What this machine has for a run, as the system tells it: cores, memory, limits, GPUs and packages."""

import contextlib
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 2**60  # bytes: what version 1 of cgroups tells where there is no limit is more
PATIENCE = 5.0  # seconds for a program, as a broken driver lets nvidia-smi hang
CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
BF16 = {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}  # as Linux and PyTorch name instructions of x86 and ARM


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, and how many its cgroup grants it (None: all of them); bytes of memory, what its
    cgroup grants, and what is free; bytes of /dev/shm; the open files that are allowed, and that may be asked for; what
    OMP_NUM_THREADS says. None is unknown.
    """

    cores: int
    core_limit: float | None
    memory: int | None
    memory_limit: int | None
    memory_free: int | None
    shared: int | None
    files: int
    files_most: int
    threads: str | None
    cpu: str
    has_bf16: bool | None


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, its bytes of memory and of free memory, and whether it computes in bfloat16."""

    name: str
    memory: int
    free: int
    has_bf16: bool


def gpus() -> list[Gpu]:
    """The GPUs that PyTorch sees. One that another process keeps for itself has no free memory."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        free, whole = 0, torch.cuda.get_device_properties(number).total_memory
        with contextlib.suppress(RuntimeError):
            free, whole = torch.cuda.mem_get_info(number)
        with torch.cuda.device(number):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append(Gpu(torch.cuda.get_device_name(number), whole, free, has_bf16))
    return found


def look() -> Machine:
    """What the system tells of this process and its machine."""
    files, files_most = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = Path("/proc/self/cgroup")
    core_limit, memory_limit = cgroup_limits(own.read_text(encoding="utf-8") if own.exists() else "", CGROUPS)
    memory, free = _memory()
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        core_limit=core_limit,
        memory=memory,
        memory_limit=memory_limit if memory_limit and (not memory or memory_limit < memory) else None,
        memory_free=free,
        shared=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.exists() else None,
        files=_finite(files),
        files_most=_finite(files_most),
        threads=os.environ.get("OMP_NUM_THREADS"),
        cpu=_field(Path("/proc/cpuinfo"), "model name") or "",
        has_bf16=cpu_has_bf16(),
    )


def _finite(limit: int) -> int:
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory: all, and what is free or can be made free."""
    told = Path("/proc/meminfo")
    total, free = (_field(told, name) for name in ("MemTotal", "MemAvailable"))
    if total and free:
        return int(total.split()[0]) * 1024, int(free.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None


def _field(path: Path, name: str) -> str | None:
    """The first value of a name in one of the system's tables."""
    if not path.exists():
        return None
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def cpu_has_bf16() -> bool | None:
    """Whether this CPU has instructions for bfloat16; without them it is emulated. None: nobody tells."""
    import torch

    told: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not tell
    flags = _field(Path("/proc/cpuinfo"), "flags") or _field(Path("/proc/cpuinfo"), "Features")
    if flags is None and not told:
        return None
    return not BF16.isdisjoint({*(flags or "").split(), *(name for name in told if told[name])})


def missing_for_compile(device: str) -> str | None:
    """What torch.compile lacks here for a type of device, and what mends it: a compiler, or Python's headers."""
    usual = ("clang++" if sys.platform == "darwin" else "g++",) if device == "cpu" else ("gcc", "clang")
    variable = "CXX" if device == "cpu" else "CC"
    named = os.environ.get(variable, "").split()[:1] or usual
    if not any(map(shutil.which, named)):
        return f"it needs {' or '.join(named)}, which is not on PATH: apt install g++, or name another in {variable}"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        return f"it needs Python's headers, and {headers} is missing: apt install python3-dev"
    return None


def cgroup_limits(told: str, root: Path) -> tuple[float | None, int | None]:
    """The cores and the bytes that cgroups grant, None without a limit; `told` is /proc/self/cgroup.

    A limit of a group holds for those in it, so that the smallest on the way to the root counts. Version 2 has
    cpu.max and memory.max, version 1 a folder for each controller. In a container its own group may be the root.
    """
    cores, memory = [], []
    for line in told.splitlines():
        _, controllers, path = line.split(":", 2)
        for base in [root / name for name in controllers.split(",")] if controllers else [root]:
            for folder in _upwards(base, path):
                quota, *period = _read(folder / "cpu.max").split() or ["max"]
                if quota != "max" and period:
                    cores.append(int(quota) / int(period[0]))
                quota, period = _read(folder / "cpu.cfs_quota_us"), [_read(folder / "cpu.cfs_period_us")]
                if quota and int(quota) > 0:
                    cores.append(int(quota) / int(period[0]))
                for name in ("memory.max", "memory.limit_in_bytes"):
                    limit = _read(folder / name)
                    memory += [int(limit)] if limit.isdecimal() and int(limit) < UNLIMITED else []
    return min(cores, default=None), min(memory, default=None)


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """The folder of a group, and those of the groups that it is in."""
    folder = base / path.strip("/")
    yield folder
    yield from (parent for parent in folder.parents if parent.is_relative_to(base))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def package_version(name: str) -> str | None:
    """The version of an installed package, None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def told_by(*command: str) -> str:
    """The first line that a program prints, nothing if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def program(name: str) -> list[str]:
    """How a program of this environment is called from where the user is.

    By uv if this process was and uv finds the project, which it does from below it; by its name if that leads here; or
    by its path: uv puts the environment on the PATH of what it runs, and not on the shell's.
    """
    own = Path(sys.executable) if name == "python" else Path(sys.executable).with_name(name)
    if "UV" in os.environ and "UV_RUN_RECURSION_DEPTH" in os.environ:
        below = Path.cwd().is_relative_to(Path(__file__).resolve().parent)
        return ["uv", "run", name] if below else [str(own)]
    found = shutil.which(name)
    return [name] if found and Path(found).parent == own.parent else [str(own)]
