"""What a benchmark says of the machine it ran on, so that its figures can be read elsewhere.

No path of the machine is kept: the paths in the command are shortened to their last part.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

# Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets for SXM parts. Those
# for PCIe are slower, and are measured.
_GPU_PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100-SXM": 312e12}
_NUM_PRODUCTS = 10


def describe(threads: int) -> dict[str, Any]:
    """Hardware, versions, command and date, ready for JSON."""
    return {**hardware(), "threads": threads, "versions": versions(), **invocation()}


def in_words(about: dict[str, Any]) -> str:
    """One line of what `describe` returned."""
    flags = " ".join(name for name in ("avx512_bf16", "amx_bf16") if about[name])
    parts = [
        about["gpu"] or "no GPU",
        f"{about['cpu']} ({flags or 'no bf16 instructions'})",
        f"{about['cores']} cores, {about['threads']} threads, {about['ram_gib']} GiB",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    ]
    return "; ".join(parts)


def hardware() -> dict[str, Any]:
    """CPU, its bf16 instructions, the cores this process may use, memory, and the GPU's name."""
    import torch

    cpu = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpu, re.MULTILINE)
    names = flags[1].split() if flags else []
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "avx512_bf16": "avx512_bf16" in names,
        "amx_bf16": "amx_bf16" in names,
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(int(memory[1]) / 2**20) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that a training figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "deepspeed", "raywards"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def invocation() -> dict[str, str]:
    """The command as typed, with each path shortened to its last part, and the date."""
    command = ["python", f"bench/{Path(sys.argv[0]).name}", *map(_shorten, sys.argv[1:])]
    now = datetime.datetime.now(datetime.UTC)
    return {"command": " ".join(command), "date": now.isoformat(timespec="seconds")}


# ---------------------------------------------------------------- measured


def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s that this machine can do in `dtype` ("bfloat16", ...), and where that comes from."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for name, peak in _GPU_PEAKS.items():
        if name in gpu and dtype == "bfloat16":
            return peak, "data sheet, dense"
    size = 8192 if gpu else 3072
    return _multiply(size, dtype), f"measured, best of {_NUM_PRODUCTS} products of {size}^3"


def memory_now() -> int:
    """Bytes that this process holds; on CUDA, what torch has allocated there."""
    return _memory("memory_allocated", "VmRSS")


def memory_peak() -> int:
    """The most that it held so far."""
    # Not `ru_maxrss`: a child inherits that from the process that started it.
    return _memory("max_memory_allocated", "VmHWM")


class Others:
    """Measures what other processes take of the CPUs while this one waits for a child."""

    def __init__(self) -> None:
        self._start, self._busy, self._ours = time.monotonic(), _busy_s(), _children_s()

    def cores(self) -> float:
        """Mean number of cores that were busy with something else since this was made."""
        seconds = time.monotonic() - self._start
        return max(0.0, (_busy_s() - self._busy - _children_s() + self._ours) / seconds)


def _multiply(size: int, dtype: str) -> float:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(_NUM_PRODUCTS):
        wait()
        start = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _memory(on_cuda: str, field: str) -> int:
    import torch

    if torch.cuda.is_available():
        return int(getattr(torch.cuda, on_cuda)())
    return 1024 * int(_read("/proc/self/status").partition(f"{field}:")[2].split()[0])


def _busy_s() -> float:
    user, nice, system, _, _, irq, softirq = map(int, _read("/proc/stat").split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _shorten(argument: str) -> str:
    """`--out=/a/b.json` to `--out=b.json`. A hub id is no path here, and stays whole."""
    name, equals, value = argument.rpartition("=")
    if value.startswith(("/", "./", "../", "~")) or (os.sep in value and _may_be_path(value)):
        value = Path(value).name
    return f"{name}{equals}{value}"


def _may_be_path(text: str) -> bool:
    return Path(text).exists() or Path(text).parent.is_dir()


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return ""
