"""Rows, spread and claims: what is judged is what was measured, and what is missing is not judged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qalora_export.comparison.cells import Cell, Measured, Speed, read, write
from qalora_export.comparison.claims import CLAIMS, judged
from qalora_export.comparison.plot import plot_rows
from qalora_export.comparison.table import Row, best_rate, confirmed, markdown, row_of, spread
from qalora_export.errors import UnsafeInputError


def measured(
    method: str, bits: int | None, loss: float | None, *, seed: int = 0, trainable: int = 100, rate: float = 3e-3
) -> Measured:
    cell = Cell(method, bits, seed, rate)
    return Measured(cell, loss, loss, 3, 4, float(bits or 16), trainable, 1.0, "GGUF and ONNX, exact", "21/21")


def rows(**losses: float) -> list[Row]:
    """qa_lora_4=… -> a row of one seed; _plus for + and _and_ inside a name."""
    found = []
    for name, loss in losses.items():
        method, _, bits = name.rpartition("_")
        method = method.replace("_and_", "+").replace("_plus", "+").replace("_", "-")
        trainable = 25 if "coarse" in method else 50 if "qa" in method else 100
        cells = [measured(method, int(bits) if bits != "16" else None, loss, trainable=trainable)]
        found.append(row_of(method, cells))
    return found


def test_mean_and_spread_over_seeds() -> None:
    row = row_of("QA-LoRA", [measured("qa-lora", 4, 1.0), measured("qa-lora", 4, 2.0, seed=1)])
    assert row.mean_loss == 1.5 and spread(row.loss, ".2f") == "1.50 ± 0.71"
    assert "| QA-LoRA | 4.00 | – | 1.5000 ± 0.7071 | 75.0% ± 0.0% | – | – |" in markdown([row])
    texts = [replace(measured("qa-lora", 4, 1.0), text_loss=loss) for loss in (3.0, 4.0)]
    row = row_of("QA-LoRA", texts)
    assert row.mean_loss == 3.5 and "| QA-LoRA | 4.00 | 3.5000 ± 0.7071 | 1.0000 ± 0.0000 |" in markdown([row])
    timed = replace(measured("qa-lora", 4, 1.0), speed=Speed(100.0, 1.25, 5.0), answered=2)
    assert "| 75.0% | 50.0% | 1.25× | 5.00 |" in markdown([row_of("QA-LoRA", [timed])])
    assert spread((), ".2f") == "diverged" and spread((1.0,), ".2f") == "1.00"


def tried(losses: dict[float, float | None]) -> tuple[float | None, list[float]]:
    """The chosen rate of validation losses by rate, and the rates in the order that they were trained."""
    trained: list[float] = []

    def train(rate: float) -> Measured:
        trained.append(rate)
        return measured("lora", None, losses[rate], rate=rate)

    return best_rate(losses, train).cell.rate, trained


def test_a_diverged_rate_is_never_the_best() -> None:
    assert tried({1e-3: 1.0, 3e-3: None}) == (1e-3, [3e-3, 1e-3])
    assert tried({1e-3: None, 3e-3: None, 1e-2: None}) == (1e-3, [3e-3, 1e-2, 1e-3])


def test_rates_are_climbed_and_what_lies_behind_a_worse_one_is_not_trained() -> None:
    assert tried({1e-3: 4.0, 3e-3: 3.0, 1e-2: 2.0, 3e-2: 1.0, 1e-1: 5.0}) == (3e-2, [1e-2, 3e-2, 1e-1])
    assert tried({1e-3: 4.0, 3e-3: 1.0, 1e-2: 2.0, 3e-2: None}) == (3e-3, [1e-2, 3e-2, 3e-3, 1e-3])
    assert tried({3e-2: 4.0, 1e-3: 3.0, 1e-2: 2.0, 3e-3: 2.5}) == (1e-2, [1e-2, 3e-2, 3e-3])
    assert tried({1e-3: 4.0}) == (1e-3, [1e-3])


def chosen(
    first: dict[float, float | None], others: dict[float, list[float | None]]
) -> tuple[float | None, list[float]]:
    """The rate of all seeds, given the first seed's best, and the rates that the other seeds were trained at."""
    trained: list[float] = []

    def train(rate: float) -> list[Measured]:
        trained.append(rate)
        return [measured("lora", None, loss, seed=seed, rate=rate) for seed, loss in enumerate(others[rate], 1)]

    tried = {rate: measured("lora", None, loss, rate=rate) for rate, loss in first.items()}
    best = min(first, key=lambda rate: first[rate] or 99)
    cells = confirmed(best, tried, train)
    assert [cell.cell.seed for cell in cells] == list(range(len(cells)))
    assert {cell.cell.rate for cell in cells} == {cells[0].cell.rate}
    return cells[0].cell.rate, trained


def test_a_rate_that_one_seed_was_lucky_with_is_held_against_the_next() -> None:
    assert chosen({1e-3: 2.0, 3e-3: 1.0}, {3e-3: [1.1]}) == (3e-3, [3e-3])
    assert chosen({1e-3: 1.1, 3e-3: 1.0}, {3e-3: [1.8], 1e-3: [1.2]}) == (1e-3, [3e-3, 1e-3])
    assert chosen({1e-3: 1.1, 3e-3: 1.0}, {3e-3: [1.8], 1e-3: [1.9]}) == (3e-3, [3e-3, 1e-3])
    assert chosen({1e-3: 1.1, 3e-3: 1.0}, {3e-3: [None], 1e-3: [None]}) == (3e-3, [3e-3, 1e-3])
    assert chosen({1e-3: 1.1, 3e-3: 1.0, 1e-2: None}, {3e-3: [None], 1e-3: [1.2]}) == (1e-3, [3e-3, 1e-3])
    assert chosen({1e-3: 1.1, 3e-3: 1.0}, {3e-3: []}) == (3e-3, [3e-3])  # one seed


def test_claims_follow_the_numbers() -> None:
    good = rows(qa_lora_4=1.0, qlora_16=1.1, qlora_and_gptq_4=1.2, qlora_and_gptq_3=1.5, qlora_and_gptq_2=2.5)
    good += rows(qa_lora_3=1.2, qa_lora_2=1.5, lq_lora_2=1.9, lora_16=0.9, qa_lora_plus_4=0.905)
    good += rows(qa_lora_plus_3=1.0, qa_lora_plus_2=1.1)
    good += rows(qlora_and_k_quants_4=1.15, lq_lora_mixed_3=1.1, lq_lora_mixed_2=1.8, lq_lora_fisher_3=1.1)
    good += rows(lq_lora_fisher_2=1.85, qa_lora_mixed_4=1.0, qa_lora_mixed_3=1.1)
    good += rows(qa_lora_coarse_4=1.05, qa_lora_coarse_2=1.6)
    good += rows(qa_lora_refit_3=1.2, qa_lora_refit_2=1.6, qa_lora_plain_3=1.25, qa_lora_plain_2=1.7)
    assert [claim.verdict for claim in judged(good)] == ["held"] * len(CLAIMS)
    worse = [row for row in good if (row.method, row.bits) != ("qa-lora", 4)] + rows(qa_lora_4=1.3)
    verdicts = [claim.verdict for claim in judged(worse)]
    assert verdicts[:2] == ["not held"] * 2 and verdicts.count("not held") == 4  # and: larger groups, what people ship
    same = [row for row in good if row.method != "qa-lora-refit"] + rows(qa_lora_refit_3=1.25, qa_lora_refit_2=1.6)
    assert [claim.text for claim in judged(same) if claim.verdict != "held"] == [
        "ours: offsets refitted in closed form are a better start than zero at 3 and 2 bits"
    ]
    assert {claim.verdict for claim in judged([])} == {"not measured"}


def seeded(method: str, bits: int | None, *losses: float) -> Row:
    return row_of(method, [measured(method, bits, loss, seed=seed) for seed, loss in enumerate(losses)])


def verdict(start: str, *found: Row) -> str:
    """Of the claim whose text begins so."""
    (claim,) = [claim for claim in judged(found) if claim.text.startswith(start)]
    return claim.verdict


def test_a_difference_within_the_error_of_the_means_settles_nothing() -> None:
    """Standard errors of 0.1 / √2 each: of their difference 0.1."""
    text, theirs = "QA-LoRA at 4 bits is no worse", seeded("qlora", None, 1.0, 1.2)
    assert verdict(text, theirs, seeded("qa-lora", 4, 1.05, 1.25)) == "not settled"
    assert verdict(text, theirs, seeded("qa-lora", 4, 0.95, 1.15)) == "not settled"
    assert verdict(text, theirs, seeded("qa-lora", 4, 0.8, 1.0)) == "held"
    assert verdict(text, theirs, seeded("qa-lora", 4, 1.2, 1.4)) == "not held"
    assert verdict(text, theirs, seeded("qa-lora", 4, 1.0, 1.2)) == "not settled"  # equal means are no proof either
    plus = "ours: QA-LoRA+ at 4 bits is within"
    assert verdict(plus, seeded("lora", None, 1.0, 1.0), seeded("qa-lora+", 4, 1.0, 1.03)) == "not settled"
    assert verdict(plus, seeded("lora", None, 1.0, 1.0), seeded("qa-lora+", 4, 1.0, 1.002)) == "held"
    half = "ours: QA-LoRA+ closes half"
    others = [seeded("lora", None, 1.0, 1.0), *(seeded("qa-lora", bits, 2.0, 2.0) for bits in (3, 2))]
    three = seeded("qa-lora+", 3, 1.3, 1.4)
    assert verdict(half, *others, three, seeded("qa-lora+", 2, 1.5, 1.5)) == "held"
    assert verdict(half, *others, three, seeded("qa-lora+", 2, 1.4, 1.61)) == "not settled"
    assert verdict(half, *others, seeded("qa-lora+", 3, 1.6, 1.6), seeded("qa-lora+", 2, 1.4, 1.61)) == "not held"


def test_a_row_of_one_seed_deviates_as_the_others_do() -> None:
    text, mixed = "ours: nor are they", [seeded("qa-lora-mixed", 4, 1.0), seeded("qa-lora-mixed", 3, 0.5)]
    plain = [seeded("qa-lora", 4, 1.05), seeded("qa-lora", 3, 1.0)]
    assert verdict(text, *mixed, *plain) == "held"  # nothing known
    assert verdict(text, *mixed, *plain, seeded("lora", None, 1.0, 1.2)) == "not settled"  # 0.05 against 0.14 · √2
    assert verdict(text, *mixed, *plain, seeded("lora", None, 1.0, 1.02)) == "held"


def test_a_cell_is_kept_only_for_what_it_was_made_of(tmp_path: Path) -> None:
    path, cell = tmp_path / "cell.json", measured("qa-lora", 4, 1.25)
    assert read(path, "a") is None
    write(path, cell, "a")
    assert read(path, "a") == cell and read(path, "b") is None
    write(path, timed := replace(cell, speed=Speed(100.0, 1.25, 5.0), answered=2), "a")
    assert read(path, "a") == timed
    old = json.loads(path.read_text())
    del old["speed"], old["answered"]  # a cell of before there were any
    path.write_text(json.dumps(old))
    assert read(path, "a") == cell
    path.write_text('{"format": "qalora-comparison-cell/1", "made_of": "a", "cell": 3}')
    with pytest.raises(UnsafeInputError, match="not a cell"):
        read(path, "a")


def test_the_plot_takes_every_row(tmp_path: Path) -> None:
    untrained = row_of("base", [measured("base", None, 9.0, trainable=0)])
    diverged = row_of("LoRA", [measured("lora", None, None)])
    plot_rows(tmp_path / "plot.png", [*rows(qa_lora_4=1.0, qa_lora_2=1.4, lora_16=0.9), untrained, diverged])
    narrow = _width(tmp_path / "plot.png")
    timed = row_of("QA-LoRA", [replace(measured("qa-lora", 4, 1.0), speed=Speed(100.0, 1.25, 5.0))])
    plot_rows(tmp_path / "plot.png", [*rows(qa_lora_2=1.4), timed])
    assert _width(tmp_path / "plot.png") == 2 * narrow  # the same over tokens per second


def _width(png: Path) -> int:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big")
