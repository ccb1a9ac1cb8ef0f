"""What searching scales is worth: one model in int4 by every `search`, judged against its float32 self.

    python -m compress.benchmarks.int4_search MODEL_FOLDER --calibrate TEXT --judge TEXT [TEXT …]

Texts are specs as under `data:` in a pipeline file; of the one to calibrate on, a share is held out, and judged where
`--judge` names it too. Prints a table in Markdown: ratio of perplexity to the source's, KL to it (nats a token) with
its standard error, top-1 agreement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.benchmarks.judging import compare
from compress.data.config import DataConfig
from compress.data.text import TextData
from compress.models.load import load_model, load_tokenizer
from compress.models.parts import Parts
from compress.quant.apply import Search, calibrate_model, round_model
from compress.quant.modules import set_weight, weight_of
from compress.quant.schemes import W4_BLOCK32, quantize
from compress.quant.targets import all_targets

SEARCHES: tuple[Search, ...] = ("none", "output", "gptq")


def quantised(folder: Path, how: str, calibration_BT: Tensor) -> nn.Module:
    """The model in `folder` with every weight in int4 by `how`: a search, or `asymmetric` rounding to nearest."""
    model = load_model(folder)
    parts = Parts(model)
    if how == "asymmetric":
        for target in all_targets(parts, W4_BLOCK32):
            set_weight(target.module, quantize(weight_of(target.module), W4_BLOCK32, symmetric=False).dequantize())
    elif how == "none":
        round_model(parts, W4_BLOCK32)
    else:
        calibrate_model(parts, W4_BLOCK32, cast(Search, how), calibration_BT)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a save_pretrained folder of a causal decoder")
    parser.add_argument("--calibrate", required=True, help="text that output and gptq are fitted on")
    parser.add_argument("--judge", nargs="+", required=True, help="other texts, each judged on its own")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to fit on (8192)")
    parser.add_argument("--judge-tokens", type=int, default=16384, help="tokens of each text to judge on (16384)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a block (256)")
    given = parser.parse_args(arguments)
    tokenizer = load_tokenizer(given.model)

    def blocks(train: str, evaluate: str, split: Any, max_tokens: int) -> Tensor:
        text = TextData(DataConfig(train=(train,), eval=None if evaluate == train else (evaluate,)))
        return torch.from_numpy(text.blocks(split, tokenizer, given.sequence_length, max_tokens))

    fitted_BT = blocks(given.calibrate, given.calibrate, "train", given.tokens)
    texts = {text: blocks(given.calibrate, text, "eval", given.judge_tokens) for text in given.judge}
    source = load_model(given.model)
    print("| search | text | perplexity | KL to the source | agreement | seconds to quantise |")
    print("|---|---|---|---|---|---|")
    for how in ("asymmetric", *SEARCHES):
        started = time.monotonic()
        model = quantised(given.model, how, fitted_BT)
        seconds = time.monotonic() - started
        for name, blocks_NT in texts.items():
            found = compare(model, source, blocks_NT.numpy()).result()
            quality = f"×{found['perplexity_ratio']:.3f} | {found['kl']:.4f} ± {found['kl_se']:.4f} | "
            print(f"| {how} | {name} | {quality}{found['top1_agreement']:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
