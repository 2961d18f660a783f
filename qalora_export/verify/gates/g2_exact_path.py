"""Gate G2: the artifact through rounding-free kernels computes the reference's logits, at every position."""

from __future__ import annotations

from qalora_export.verify.gates.positions import RULE, described, figures_of, worst_places
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.metrics import EXACT
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.target import Target

NMSE = Limit(
    "nmse_scaled_max",
    EXACT,
    "largest NMSE",
    "float32 kernels of different libraries, measured (tests/benchmarks/rounding.py): at most 5.7e-11 through 4 random "
    "layers, 5.4e-11 through 14, 1.0e-10 through 30 (2.7e-10, 1.7e-9, 4.8e-9 before scaling) and 4.2e-10 through "
    "SmolLM2-135M's 30 (1.8e-7); one wrong code of a matrix shows 5.9e-8 and more there, and 4.7e-9 in SmolLM2",
    raw="nmse_max",
    rule=RULE,
)
TOP1 = Limit("disagreements", 0, "positions", "beyond a tie (1e-3 nats) rounding cannot change the first choice")
NO_BAD = Limit("bad_positions", 0, "positions with NaN or Inf", "a NaN compares false with everything: count it")

GATE = Gate(
    id="G2",
    title="exact path",
    what="logits of the artifact through rounding-free kernels against PyTorch float32",
    row="exact path, largest NMSE",
    limits=(NMSE, TOP1, NO_BAD),
)


@measures(GATE)
def exact_path(target: Target) -> Entry:
    measured = target.prefill("exact")
    figures = figures_of(measured)
    detail = described(measured)
    if replaced := target.replaced("prefill"):
        figures["replaced"] = dict(replaced)
        detail += (
            f"; activation function in float32 instead of the runtime's table, whose values have NMSE "
            f"{replaced['nmse']:.1e} ({replaced['kept']} of {replaced['values']} were other than the table's)"
        )
    return GATE.judge(
        target.name,
        figures,
        detail=detail,
        figures=figures,
        where=worst_places(target.session.probes, measured),
    )
