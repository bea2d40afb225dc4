"""``python -m benchmarks unpack VOLUME ... TARGET``: archives of ``pack`` into one folder."""

import argparse
import tarfile
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks unpack", description=__doc__)
    parser.add_argument("volumes", type=Path, nargs="+", metavar="VOLUME")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the folder for PYTHONPATH")
    args = parser.parse_args(argv)
    args.target.mkdir(parents=True, exist_ok=True)
    for volume in args.volumes:
        archives = sorted(volume.glob("*.tar.xz"))
        if not archives:
            raise SystemExit(f"benchmarks unpack: VOLUME must have archives, got {volume}")
        for path in archives:
            with tarfile.open(path) as archive:
                archive.extractall(args.target, filter="data")
            print(f"{path.name} -> {args.target}")


if __name__ == "__main__":
    main()
