"""Gate G3: the kernels that users run add no more noise than rounding activations must, at every position."""

from __future__ import annotations

from qalora_export.errors import RuntimeUnavailableError
from qalora_export.verify.gates.g2_exact_path import NO_BAD
from qalora_export.verify.gates.positions import described, figures_of, worst_places
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.session import Target

# √2 · 3 standard errors: measured figure and floor scatter alike, and a right model must not fail by chance.
SCATTER = 4.0
NOISE = (
    Limit(
        "kl_mean", 1.25, "mean KL, nats", "a few positions carry much of the mean: hence its scatter", "floor", SCATTER
    ),
    Limit("nmse_mean", 1.25, "mean NMSE", "the steadiest figure, within 10 % of the floor", "floor", SCATTER),
    Limit("kl_p99", 1.25, "99th percentile of KL, nats", "the tail that users notice", "floor", SCATTER),
    Limit("kl_max", 10.0, "largest KL, nats", "a single draw: 0.4 to 6 times the floor in right models", "floor"),
    Limit("disagreements", 1.25, "other first choices", "near-ties flip under any rounding", "floor", SCATTER),
    Limit("perplexity_shift", 1.25, "nats per token", "noise must not bias the model", "floor", SCATTER),
)
NOISE_GAIN = Limit(
    "noise_gain",
    2.0,
    "times simulated int8 noise",
    "kernels were 0.91 to 1.16 times as noisy as int8 rounding in PyTorch; a broken base would raise its own bound",
)

GATE = Gate(
    id="G3",
    title="shipped path",
    what="logits of the kernels that ship, against the noise floor of the unadapted base",
    row="shipped path, mean KL in nats",
    limits=(*NOISE, NO_BAD, NOISE_GAIN),
)


@measures(GATE)
def shipped_path(target: Target) -> Entry:
    measured = target.prefill("shipped")
    figures, where = figures_of(measured), worst_places(target.session.probes, measured)
    try:
        floor = target.floor
    except RuntimeUnavailableError as error:
        # Without a floor only the absolute limit can be judged: it can fail the gate, never pass it.
        detail = f"no noise floor: {error.reason}"
        entry = GATE.judge(target.name, figures, detail=detail, limits=[NO_BAD], figures=figures, where=where)
        return entry if entry.status == "fail" else GATE.not_run(target.name, detail)
    return GATE.judge(
        target.name,
        figures | {NOISE_GAIN.figure: floor.gain},
        floor=floor.bound,
        limits=[limit for limit in GATE.limits if limit is not NOISE_GAIN or floor.gain_measured],
        where=where,
        detail=f"{described(measured)}; noise floor: {floor.source}",
        figures=figures | {"floor": floor.as_json()},
    )
