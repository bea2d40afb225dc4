"""Builds the C of this folder with the compiler of the machine, where it is first called.

So an installation needs no compiler, and a machine without one runs plain PyTorch. What was built
is kept in ``$GDN_CACHE_DIR``, by default ``~/.cache/gdn_ops``, by all that it was built from.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
# The first that compiles, links and loads. Nothing links OpenMP: its functions are those of the
# runtime that torch has loaded, whose threads then serve both. Where that has others, as clang's,
# there are no threads.
_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_SECONDS = 120


@functools.cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of ``<name>.c``, or in words why there is none."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return "there is no C compiler (cc, gcc, clang or $CC)"
    source = _FOLDER / f"{name}.c"
    try:
        folder = _cache_folder()
        path = folder and folder / f"{name}-{_digest(source, compiler)}.so"
        if path and path.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
        return _build(source, compiler, path)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{source.name} could not be built: {_last_line(error)}"


_FIELDS = {
    "void *": ctypes.c_void_p,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}


def structure(name: str, of: str) -> Any:
    """The structure ``of`` of ``<name>.h``, as it is declared there."""
    source = (_FOLDER / f"{name}.h").read_text()
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    bodies = re.findall(r"typedef struct \{([^}]*)\} (\w+);", source)
    body = next(body for body, declared in bodies if declared == of)
    fields = [
        (field.strip(" *\n"), _FIELDS[kind])
        for kind, fields in re.findall(r"(void \*|int64_t|int32_t|float)([^;]+);", body)
        for field in fields.split(",")
    ]
    return type(of, (ctypes.Structure,), {"_fields_": fields, "__doc__": f"{of} of {name}.h."})


def _cache_folder() -> Path | None:
    """Where libraries are kept; None where nothing can be written there."""
    root = os.environ.get("GDN_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) if root else Path(cache) / "gdn_ops"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _digest(source: Path, compiler: str) -> str:
    """Of all that the library depends on: a home folder may serve unlike machines."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        keys = ("model name", "flags", "Features", "CPU part")
        processor += "".join(sorted({line for line in lines if line.startswith(keys)}))
    real = Path(compiler).resolve()
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    text = (source.read_text(), headers, repr(_FLAGS))
    parts = (*text, str(real), real.stat().st_mtime, processor, torch.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _build(source: Path, compiler: str, path: Path | None) -> ctypes.CDLL:
    """Compile, link and load with the first flags that do; then keep the library as ``path``."""
    with tempfile.TemporaryDirectory(dir=path and path.parent) as folder:
        error: Exception = OSError("no flags")
        for flags in _FLAGS:
            made, library = f"{folder}/{source.stem}.o", f"{folder}/{len(os.listdir(folder))}.so"
            compile_ = [compiler, "-O3", "-fPIC", *flags, "-c", str(source), "-o", made]
            link = [compiler, "-shared", made, "-o", library, "-lm"]
            try:
                for command in (compile_, link):
                    subprocess.run(
                        command, check=True, capture_output=True, text=True, timeout=_SECONDS
                    )
                loaded = ctypes.CDLL(library)
            except (OSError, subprocess.SubprocessError) as failed:
                error = failed
                continue
            if path:
                os.replace(library, path)  # so that another process sees all of it or nothing
            return loaded
    raise error


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return str(text).strip().splitlines()[-1]
