"""What recurrent states of 16 bit cost in log-probability.

    python benchmarks/state_dtype.py            the model of examples/, 2048 bytes of text

A text that the model was not trained on is read token by token, so that each state is rounded to
its dtype after every token: the worst case. The table compares the log-probability of every next
token with that of the same model with float32 states.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, Qwen3NextForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import byte_corpus

from gdn_ops.integrations.transformers import use_gdn_ops

MODEL_DIRECTORY = Path(__file__).parents[1] / "examples" / "model"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.inference_mode()
def read(model: Qwen3NextForCausalLM, ids: Tensor, state_dtype: torch.dtype) -> Tensor:
    """Log-probabilities after each token but the last, ``[T - 1, vocabulary]``, in float32."""
    cache = DynamicCache(config=model.config)
    found = []
    with use_gdn_ops(model, state_dtype=state_dtype):
        for t in track(range(ids.shape[1] - 1), f"{model.dtype} model, {state_dtype} states"):
            logits = model(ids[:, t : t + 1], past_key_values=cache).logits[0, 0]
            found.append(logits.float().log_softmax(-1))
    linear = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    held = {layer.recurrent_states[0].dtype for layer in linear}
    assert held == {state_dtype}
    return torch.stack(found)


def compare(model: Qwen3NextForCausalLM, ids: Tensor) -> list[tuple[str, ...]]:
    """A row for each dtype of the states."""
    rows, reference = [], None
    for dtype in DTYPES:
        all_of = read(model, ids, dtype)
        of_text = all_of.gather(1, ids[0, 1:, None])[:, 0]
        if reference is None:
            reference = all_of, of_text
        change = (of_text - reference[1]).abs()
        same = (all_of.argmax(1) == reference[0].argmax(1)).double().mean()
        rows.append(
            (
                *(str(x).removeprefix("torch.") for x in (model.dtype, dtype)),
                f"{of_text.mean():.5f}",
                f"{change.mean():.1e}",
                f"{change.max():.1e}",
                f"{100 * same:.2f} %",
            )
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(MODEL_DIRECTORY), help="a byte-level checkpoint")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A file of the standard library that training holds out.
    text = Path(json.decoder.__file__).read_text()
    ids = byte_corpus.encode(text)[None, : arguments.tokens]
    table = Table(
        "model",
        "states",
        "mean log-probability",
        "mean change",
        "largest change",
        "same first choice",
        title=f"{ids.shape[1]} tokens; torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = Qwen3NextForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        for row in compare(model, ids):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
