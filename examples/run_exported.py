"""Generate from the packages that ``export.py`` wrote: with torch and gdn_ops, no transformers.

    echo '[[1, 2, 3, 4, 5]]' | python examples/run_exported.py FOLDER --tokens 20

Prompts come as JSON, rows of equal length; the tokens that follow go out the same way.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

# Prefill calls torch.ops.gdn, which must be there before it is loaded; decode calls only torch.
import gdn_ops  # noqa: F401


def generate(folder: Path, prompt: Tensor, count: int) -> Tensor:
    """The next ``count`` most likely tokens after ``prompt [B, T]``: ``[B, count]``."""
    facts = json.loads((folder / "states.json").read_text())
    prefill, decode = (
        torch._inductor.aoti_load_package(str(folder / f"{name}.pt2"))  # noqa: TID251 as documented
        for name in ("prefill", "decode")
    )
    length = torch.tensor(0)
    states = [
        tuple(
            torch.zeros(len(prompt), *shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(*pair, strict=True)
        )
        for pair in zip(facts["states"], facts["dtypes"], strict=True)
    ]
    if prompt.shape[1] + count > facts["context"]:
        raise ValueError(
            f"run_exported: prompt and tokens must fit the context of {facts['context']}, got"
            f" {prompt.shape[1]} + {count}"
        )
    # A few tokens are decoded one by one: to a state of zeros that is the same.
    long = prompt.shape[1] >= facts["shortest_prefill"]
    for piece in [prompt] if long else prompt.split(1, 1):
        logits = (prefill if long else decode)(piece.contiguous(), length, states)
    tokens = [logits.argmax(-1, keepdim=True)]
    for _ in range(count - 1):
        tokens.append(decode(tokens[-1], length, states).argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=20, help="tokens to generate")
    arguments = parser.parse_args(argv)
    prompt = torch.tensor(json.load(sys.stdin))
    with torch.inference_mode():
        tokens = generate(arguments.folder, prompt, arguments.tokens)
    print(json.dumps(tokens.tolist()))


if __name__ == "__main__":
    main()
