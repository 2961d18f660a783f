"""The sample's score over several seeds: untuned base against tuned and merged model, exact match on the test split.

    python samples/devices/seeds.py                 # three seeds, about five minutes on 2 CPU cores
    python samples/devices/seeds.py --seeds 5 --out build/seeds

Uses the recipe of the demo; only train.seed changes. Writes seeds.json beside the artifacts and prints a table.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from qalora_export import evaluate, merge, quantize, train
from qalora_export.recipe_file import load_recipe

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/seeds"))
    args = parser.parse_args()
    recipe = load_recipe(HERE / "recipe.toml")
    assert recipe.evaluate is not None
    base = args.out / "base.qalora"
    if not base.exists():
        quantize(Path(recipe.model), base, recipe.quantize)
    untuned = evaluate(base, recipe.evaluate)
    rows = []
    for seed in range(args.seeds):
        adapter, merged = args.out / f"adapter-{seed}", args.out / f"merged-{seed}.qalora"
        train(base, adapter, recipe.train.model_copy(update={"seed": seed}), force=True)
        merge(base, adapter, merged, force=True)
        score = evaluate(merged, recipe.evaluate)
        rows.append({"seed": seed, "exact": score.exact, "total": score.total, "accuracy": score.accuracy})
    values = [float(row["accuracy"]) for row in rows]
    result = {
        "base": {"exact": untuned.exact, "total": untuned.total, "accuracy": untuned.accuracy},
        "tuned": rows,
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
    (args.out / "seeds.json").write_text(json.dumps(result, indent=2) + "\n")
    table = Table("model", "exact match", title="samples/devices, test split")
    table.add_row("base, quantized, untuned", f"{untuned.exact}/{untuned.total}")
    for row in rows:
        table.add_row(f"tuned, seed {row['seed']}", f"{row['exact']}/{row['total']}")
    Console().print(table)


if __name__ == "__main__":
    main()
