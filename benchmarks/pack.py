"""``python -m benchmarks pack DIR``: the peers in archives, for a GPU machine without network.

Wheels for Linux on x86-64 and one CPython are downloaded by pip and unpacked; what no row needs is
left out; the rest goes into ``DIR/1``, ``DIR/2`` and so on, each below the limit, so that each can
be carried alone. On the other machine ``python -m benchmarks unpack DIR/1 TARGET`` puts them into
one folder, for ``PYTHONPATH``. torch and triton are there already.
"""

import argparse
import fnmatch
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28)), "any")
SHIMS = Path(__file__).parent / "vllm_shim"


@dataclass(frozen=True)
class Package:
    """What pip calls it, and patterns of its files: kept (all where empty), and left out."""

    requirement: str
    keep: tuple[str, ...] = ()
    leave: tuple[tuple[str, str], ...] = ()  # pattern, reason

    @property
    def name(self) -> str:
        return self.requirement.split("==")[0]


# The CuTe DSL. Its own metapackages are empty; torch for CUDA 13 brings cuda-bindings.
CUTE = (
    Package("nvidia-cutlass-dsl==4.8.1"),
    Package("nvidia-cutlass-dsl-libs-core==4.8.1"),
    Package(
        "nvidia-cutlass-dsl-libs-base==4.8.1", leave=(("*/iket/*.so", "libraries of a profiler"),)
    ),
    Package("nvidia-cutlass-dsl-libs-cu13==4.8.1", leave=(("*/stubs/*", "for other processors"),)),
    Package("apache-tvm-ffi==0.1.12"),
)
VLLM_OPS = "vllm/third_party/flash_linear_attention/ops/"
VLLM_FILES = (
    *("chunk", "chunk_delta_h", "chunk_o", "chunk_scaled_dot_kkt", "cumsum", "index", "l2norm"),
    *("fused_gdn_prefill_post_conv", "fused_recurrent", "fused_sigmoid_gating", "op"),
    *("solve_tril", "utils", "wy_fast"),
)
PACKAGES = {
    "fla": (Package("fla-core==0.6.0"), Package("einops==0.8.2")),
    "flashinfer": (
        Package(
            "flashinfer-python==0.7.2.post1",
            leave=(
                ("flashinfer/data/*", "sources of CUDA kernels that no row compiles"),
                ("flashinfer/__init__.py", "imports what needs that data; an empty one instead"),
            ),
        ),
        *CUTE,
        *map(Package, ("requests", "urllib3", "idna", "certifi", "charset-normalizer")),
        *map(Package, ("tqdm", "tabulate", "einops==0.8.2", "click", "nvidia-ml-py")),
    ),
    "attention_gym": (Package("attn-gym==0.0.17"), *CUTE),
    "flash_qla": (
        Package("flash-qla==0.1.3"),
        Package("tilelang==0.1.15", leave=(("tilelang/3rdparty/*/test/*", "tests"),)),
        Package("z3-solver==4.15.4.0", leave=(("*/bin/*", "a program"),)),
        Package("apache-tvm-ffi==0.1.12"),
        *map(Package, ("torch-c-dlpack-ext", "cloudpickle", "ml-dtypes", "psutil", "tqdm")),
    ),
    "vllm": (
        Package(
            "vllm==0.33.0",
            keep=(
                *(f"{VLLM_OPS}{name}.py" for name in VLLM_FILES),
                "vllm/utils/math_utils.py",
                "vllm-*.dist-info/METADATA",
            ),
        ),
    ),
    # What its model code imports; typer, click and hf-xet, of its command line, are not.
    "hugging_face": (
        *map(Package, ("transformers==5.23.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3")),
        *map(Package, ("safetensors==0.8.0", "regex==2026.11.15", "PyYAML==6.0.3", "tqdm")),
        *map(Package, ("packaging==26.3", "filelock==4.2.12", "fsspec==2026.9.0", "idna")),
        *map(Package, ("httpx2==2.16.2", "httpcore2==2.16.2", "h11==0.16.0", "anyio==4.16.0")),
        *map(Package, ("truststore==0.10.5", "typing_extensions==4.16.0")),
    ),
}


def plan(peers: list[str]) -> list[Package]:
    """The packages of these peers, each once, in the order of the peers.

    Raises:
        ValueError: a name that is no peer to carry.
    """
    for peer in peers:
        if peer not in PACKAGES:
            raise ValueError(f"peers: {peer} must be one of {', '.join(PACKAGES)}")
    return list(dict.fromkeys(package for peer in peers for package in PACKAGES[peer]))


def left_out(package: Package, file: str) -> str | None:
    """Why a file of a wheel does not travel, or None where it does."""
    if package.keep and not any(fnmatch.fnmatch(file, pattern) for pattern in package.keep):
        return "not a file of its Triton kernels"
    for pattern, reason in package.leave:
        if fnmatch.fnmatch(file, pattern):
            return reason
    return None


def volumes(sizes: list[int], limit: int) -> list[int]:
    """The number of the volume, from 1, that each archive goes to: the first with room.

    An archive above the limit goes to 0, which does not travel.
    """
    used: list[int] = []
    numbers = []
    for size in sizes:
        fits = [i for i, total in enumerate(used) if total + size <= limit]
        if size > limit:
            numbers.append(0)
            continue
        if not fits:
            used.append(0)
            fits = [len(used) - 1]
        used[fits[0]] += size
        numbers.append(fits[0] + 1)
    return numbers


def download(package: Package, folder: Path, python: str) -> Path:
    """The wheel for a CPython such as ``3.12``, by pip."""
    number = python.replace(".", "")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += [flag for name in PLATFORMS for flag in ("--platform", name)]
    command += ["--python-version", number, "--implementation", "cp", "--only-binary", ":all:"]
    command += [flag for abi in (f"cp{number}", "abi3", "none") for flag in ("--abi", abi)]
    before = set(folder.iterdir())
    subprocess.run([*map(str, command), package.requirement], check=True)
    (wheel,) = set(folder.iterdir()) - before
    return wheel


def write_archives(package: Package, wheel: Path, folder: Path) -> tuple[list[Path], dict]:
    """The wheel's files as ``.tar.xz``, large libraries apart; bytes left out for each reason."""
    groups: dict[str, list[tuple[str, bytes]]] = {}
    without: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as content:
        for info in content.infolist():
            reason = left_out(package, info.filename)
            if reason is not None:
                without[reason] = without.get(reason, 0) + info.compress_size
            elif not info.is_dir():
                large = info.file_size > 1 << 26
                label = Path(info.filename).name.split(".")[0] if large else ""
                groups.setdefault(label, []).append((info.filename, content.read(info)))
    paths = []
    for label, files in groups.items():
        path = folder / ("-".join(filter(None, (package.name, label))) + ".tar.xz")
        write_archive(path, files)
        paths.append(path)
    return paths, without


def write_archive(path: Path, files: list[tuple[str, bytes]]) -> None:
    """Compressed as machine code compresses best; wheels are a third larger."""
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}
    filters = [{"id": lzma.FILTER_X86}, lzma2]
    with (
        lzma.open(path, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shims(peer: str) -> list[tuple[str, bytes]]:
    """Modules in place of what a peer imports and does not travel."""
    if peer == "flashinfer":
        return [("flashinfer/__init__.py", b"")]
    if peer != "vllm":
        return []
    return [(str(p.relative_to(SHIMS)), p.read_bytes()) for p in sorted(SHIMS.rglob("*.py"))]


def megabytes(text: str) -> int:
    """Bytes of ``50MB`` or ``50``."""
    return int(float(text.upper().removesuffix("MB")) * 1e6)


def pack(folder: Path, peers: list[str], limit: int, python: str) -> None:
    """Download, slim, compress, and sort into volumes; says what is left out, and why."""
    folder.mkdir(parents=True)
    archives: list[Path] = []
    with tempfile.TemporaryDirectory() as temporary:
        for package in plan(peers):
            wheel = download(package, Path(temporary), python)
            made, without = write_archives(package, wheel, folder)
            archives += made
            sizes = ", ".join(f"{path.stat().st_size / 1e6:.1f}" for path in made)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, packed {sizes}", flush=True)
            for reason, size in without.items():
                print(f"  left out: {reason}, {size / 1e6:.1f} MB")
            wheel.unlink()
    for peer in peers:
        if shims(peer):
            archives.append(folder / f"shims-{peer}.tar.xz")
            write_archive(archives[-1], shims(peer))
    for path, number in zip(
        archives, volumes([path.stat().st_size for path in archives], limit), strict=True
    ):
        if number:
            (folder / str(number)).mkdir(exist_ok=True)
            path.rename(folder / str(number) / path.name)
        else:
            print(f"left out: {path.name}, {path.stat().st_size / 1e6:.1f} MB, above the limit")
            path.unlink()
    for volume in sorted(folder.iterdir()):
        total = sum(path.stat().st_size for path in volume.iterdir())
        print(
            f"{volume}: {total / 1e6:.1f} MB: {', '.join(sorted(p.name for p in volume.iterdir()))}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pack", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--limit", type=megabytes, default="50MB", help="of each volume")
    parser.add_argument("--peers", default=",".join(PACKAGES), help="with commas between them")
    parser.add_argument("--python", default="3.12", help="the CPython that imports them")
    args = parser.parse_args(argv)
    try:
        plan(args.peers.split(","))
    except ValueError as error:
        raise SystemExit(f"benchmarks pack: {error}") from None
    if args.folder.exists():
        raise SystemExit(f"benchmarks pack: DIR must not exist, got {args.folder}")
    pack(args.folder, args.peers.split(","), args.limit, args.python)


if __name__ == "__main__":
    main()
