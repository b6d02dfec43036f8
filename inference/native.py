"""The C routines, compiled by the machine's own compiler when first used (Triton needs one too).

The result is kept in the user's cache; there is nothing to build at installation. Calls do not hold the interpreter's
lock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("cpu_lane.c", "packed.c", "packed.h", "policies.c", "ring.c")
)
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_SIGNATURES = {
    "lane_open": (_POINTER, [_INT, _INT, _INT, _LONG, _INT, _LONG]),
    "lane_submit": (_INT, [_POINTER, _INT, _INT, *[_POINTER] * 3, _INT, *[_POINTER] * 3]),
    "lane_count": (None, [_POINTER, _POINTER]),
    "lane_wait": (_INT, [_POINTER]),
    "lane_close": (None, [_POINTER]),
    "packed_pack": (_LONG, [_POINTER, _LONG, _POINTER]),
    "packed_unpack": (None, [_POINTER, *[_LONG] * 5, _POINTER]),
    "packed_is_quick": (_INT, []),
    "map_match": (_INT, [_POINTER, _INT, _POINTER, _INT, _INT, _POINTER]),
    "reuse_note": (None, [_POINTER, *[_POINTER] * 4, _INT, _POINTER, _INT, _POINTER]),
    "ring_bring": (_INT, [_POINTER, _INT, _POINTER, _POINTER, _LONG]),
}


class NativeError(RuntimeError):
    """The C routines cannot run here, and why."""


def library() -> ctypes.CDLL:
    """The compiled routines. Raises NativeError without a compiler, or if it fails."""
    found = opened()
    if isinstance(found, str):
        raise NativeError(found)
    return found


@functools.cache
def opened() -> ctypes.CDLL | str:
    """The routines, or why there are none: compiled once in a process, also in vain."""
    try:
        return _compiled()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # the first, too, where nobody has a home
        return str(error)


def _compiled() -> ctypes.CDLL:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeError("no C compiler (cc, gcc or clang) on the PATH")
    texts = b"".join(source.read_bytes() for source in _SOURCES)
    key = hashlib.sha256(texts + repr((compiler, _FLAGS, _processor())).encode()).hexdigest()[:16]
    target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planaria" / f"native-{key}.so"
    if not _whole(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            units = [str(source) for source in _SOURCES if source.suffix == ".c"]
            command = [compiler, *_FLAGS, *units, "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise NativeError(f"{compiler} could not compile {' and '.join(units)}: {done.stderr.strip()[-500:]}")
            library = made.read_bytes()
            made.write_bytes(library + hashlib.sha256(library).digest())  # the loader looks at no byte behind the last
            made.replace(target)
    try:
        compiled = ctypes.CDLL(str(target))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(compiled, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        target.unlink(missing_ok=True)
        raise NativeError(f"what {compiler} made cannot be loaded: {error}") from error
    return compiled


def _whole(target: Path) -> bool:
    """Whether it is there as it was made: loading a file that lacks its end kills the process."""
    if not target.exists():
        return False
    content = target.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
