"""What quantization costs the sample base: held-out perplexity and KL to the fp16 model, RTN against GPTQ.

    python samples/base/quality.py                       # bits 2, 3, 4, 8 at g = 32 and 128, some minutes on 2 cores
    python samples/base/quality.py --groups 32 --windows 40

Perplexity is over windows of 512 tokens that begin with BOS; KL(fp16 ‖ quantized) is the mean over the same positions,
in nats. "± nats" is the paired standard error, over windows, of the difference in loss between GPTQ and RTN: a smaller
difference than that says nothing.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings

MODEL = Path(__file__).parent / "model"
WINDOW = 512


def windows_of(limit: int) -> torch.Tensor:
    """(windows, 512) token ids of the held-out text, each beginning with BOS."""
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer((MODEL / "held_out.txt").read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    rows = [[tokenizer.bos_token_id, *ids[at : at + WINDOW - 1]] for at in range(0, len(ids) - WINDOW, WINDOW - 1)]
    return torch.tensor(rows[:limit])


@torch.no_grad()
def logprobs(folder: Path, windows: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities (511, vocabulary) of the next token at every position of a window."""
    model = load_model(folder)
    return [torch.log_softmax(model(row[None]).logits[0, :-1], -1) for row in windows]


def losses(found: list[torch.Tensor], windows: torch.Tensor) -> np.ndarray:
    """Mean cross-entropy of each window in nats."""
    rows = [-lp.gather(1, row[1:, None]).mean() for lp, row in zip(found, windows, strict=True)]
    return torch.stack(rows).double().numpy()


def divergence(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean KL(reference ‖ found) over all positions, summed in float64."""
    parts = [(r.double().exp() * (r.double() - f.double())).sum(-1) for r, f in zip(reference, found, strict=True)]
    return float(torch.cat(parts).mean())


def measure(
    windows: torch.Tensor,
    bits: int,
    group: int,
    reference: list[torch.Tensor],
    *,
    calibration_samples: int = 64,
    **more: Any,
) -> dict[str, Any]:
    """One row of the table. more: other settings of quantize."""
    row: dict[str, Any] = {"bits": bits, "group_size": group}
    loss = {}
    for method in ("rtn", "gptq"):
        settings = QuantizeSettings(
            method=method,
            bits=bits,
            group_size=group,
            sequence_length=256,
            calibration_samples=calibration_samples,
            calibration=str(MODEL / "calibration.txt"),
            **more,
        )
        with tempfile.TemporaryDirectory() as folder:
            quantize(MODEL, Path(folder) / "q", settings)
            found = logprobs(Path(folder) / "q", windows)
        loss[method] = losses(found, windows)
        row[f"{method}_perplexity"] = float(np.exp(loss[method].mean()))
        row[f"{method}_kl"] = divergence(reference, found)
    gap = loss["gptq"] - loss["rtn"]
    row["difference_nats"], row["standard_error"] = float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/quality.json"))
    args = parser.parse_args()
    windows = windows_of(args.windows)
    reference = logprobs(MODEL, windows)
    base = float(np.exp(losses(reference, windows).mean()))
    rows = [measure(windows, bits, group, reference) for group in args.groups for bits in args.bits]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "fp16_perplexity": base,
        "windows": len(windows),
        "rows": rows,
        "torch": torch.__version__,
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    columns = ("bits", "g", "RTN perplexity", "GPTQ perplexity", "GPTQ − RTN, nats", "RTN KL", "GPTQ KL")
    table = Table(*columns, title=f"sample base, held-out text; fp16 perplexity {base:.4f}")
    for row in rows:
        table.add_row(
            str(row["bits"]),
            str(row["group_size"]),
            f"{row['rtn_perplexity']:.4f}",
            f"{row['gptq_perplexity']:.4f}",
            f"{row['difference_nats']:+.5f} ± {row['standard_error']:.5f}",
            f"{row['rtn_kl']:.2e}",
            f"{row['gptq_kl']:.2e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
