"""Gate G2: the artifact through rounding-free kernels computes the reference's logits, at every position."""

from __future__ import annotations

from qalora_export.verify.gates.positions import RULE, described, figures_of, worst_places
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.metrics import EXACT
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.session import Target

NMSE = Limit(
    "nmse_scaled_max",
    EXACT,
    "largest NMSE",
    "float32 kernels of different libraries: at most 8e-11 through 2 layers and 3e-10 through the 30 of SmolLM2-135M "
    "(1.2e-8 before scaling); one wrong code, offset or epsilon in a real model moves a position by more than 1e-8",
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
