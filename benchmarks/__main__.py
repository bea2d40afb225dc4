"""The command line of the benchmarks.

    python -m benchmarks [cpu] ...       the operators on a CPU, against transformers' functions
    python -m benchmarks gpu ...         every row on one GPU, side by side with its peers
    python -m benchmarks table           the measured tables of the pages
    python -m benchmarks merge ...       the rows of several runs on a GPU in one file
    python -m benchmarks plot FILE       a roofline and the peers' ratios, from a run on a GPU
    python -m benchmarks pack DIR        the peers, to carry to a GPU machine without network
    python -m benchmarks unpack ...      there: a folder for PYTHONPATH
    python -m benchmarks compiled-cpu    a compiled decode step on a CPU
    python -m benchmarks training-cpu    a training step on a CPU
    python -m benchmarks state-dtype     what states in fewer bits do to a model's text

Each says more with --help; benchmarks/README.md says what is measured, and how.
"""

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "cpu": "cpu",
    "gpu": "suite",
    "table": "table",
    "merge": "merge",
    "plot": "plot",
    "pack": "pack",
    "unpack": "unpack",
    "compiled-cpu": "compiled_cpu",
    "training-cpu": "training_cpu",
    "state-dtype": "state_dtype",
}


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "cpu"
    if command not in COMMANDS:
        raise SystemExit(f"benchmarks: command must be one of {', '.join(COMMANDS)}, got {command}")
    # Files that run as scripts too import their neighbours as a script does.
    sys.path.append(str(Path(__file__).parent))
    module = importlib.import_module(f"benchmarks.{COMMANDS[command]}")
    # Each file parses the arguments of its own command.
    sys.argv = [f"python -m benchmarks {command}", *argv]
    module.main()


if __name__ == "__main__":
    main()
