"""Gate G3: every layer's kernel does what it documents, in the artifact and the kernels that users run; and what the
shipped path costs the model, absolutely.

Proof and cost are two questions. The proof is local and sharp (verify/reference/local_proof.py): it does not care how
large activations are, and an outlier cannot fail it. The cost is what rounding activations to int8 does to this model:
no fault of the export, but a model that it ruins should not ship, so it has limits of its own, from the settings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qalora_export.errors import RuntimeUnavailableError
from qalora_export.progress import status
from qalora_export.verify.gates.g2_exact_path import NO_BAD
from qalora_export.verify.gates.positions import described, figures_of, worst_places
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.kernels.arithmetic import BACKWARD
from qalora_export.verify.metrics import PositionMetrics
from qalora_export.verify.reference.local_proof import BETWEEN, TIMES_HALF, LayerFinding, LocalProof
from qalora_export.verify.reference.local_run import LocalRun
from qalora_export.verify.rule import Check, Entry, Gate, Limit
from qalora_export.verify.target import Target

SHOWN = 12
PROOF = (
    Limit(
        "product_error",
        BACKWARD,
        "largest error of a product",
        "|Y − Ŷ| over |x̂||Ŵ|ᵀ: float32 sums leave at most 9e-7 of it, with outliers of × 64 too; a product wrong by "
        "1 in 1,000 shows 1e-5 and more",
    ),
    Limit("unproven_products", 0, "products", "a product that read another input than its layer's is another layer"),
    Limit(
        "between_scaled_max",
        BETWEEN,
        "largest NMSE of a layer's input",
        "float32 of two libraries differs by at most 2e-12 between two products; behind attention it is the mean over "
        "positions, and where the runtime computes in float16 it is scaled by 30 times what such rounding does",
        raw="between_nmse_max",
        rule=f"divided by what float16 rounding makes of it × {TIMES_HALF:g} over {BETWEEN:g}, where that is above 1",
    ),
    Limit("answer_nmse_max", BETWEEN, "largest NMSE of the answer behind lm_head", "as between two products"),
    Limit("unwatched_nmse_max", BETWEEN, "NMSE", "what is proven must be what answers when nobody looks inside"),
)
COST = (
    Limit("kl_mean", 0.1, "mean KL, nats", "max_kl of the settings: beyond it the runtime answers as another model"),
    Limit("other_choices", 0.2, "share of positions", "1 − min_top1 of the settings: as many first choices may change"),
)
GATE = Gate(
    id="G3",
    title="shipped path",
    what="every layer of the kernels that ship against their documented arithmetic; what they cost the model",
    row="shipped path, largest error of a product",
    limits=(*PROOF, NO_BAD, *COST),
)


@measures(GATE)
def shipped_path(target: Target) -> Entry:
    target.watch()
    measured = target.prefill("shipped")
    figures, limits = cost_figures(measured), [NO_BAD, *cost_limits(target)]
    try:
        local = target.local("prefill")
    except RuntimeUnavailableError as error:
        # Without a look inside only the cost can be judged: it can fail the gate, never pass it.
        detail = f"no layer was looked at: {error.reason}"
        entry = GATE.judge(target.name, figures, detail=detail, limits=limits, figures=figures)
        return entry if entry.status == "fail" else GATE.not_run(target.name, detail)
    proven = proof_figures(local)
    entry = GATE.judge(
        target.name,
        proven | figures,
        limits=[*PROOF, *limits],
        detail=f"{_described(local.proof)}; {described(measured)}; {simulated(target)}",
        figures=figures | proven | {"layers": layers_json(local.proof)},
        where=[*findings(local.proof), *worst_places(target.session.probes, measured)],
    )
    if within(entry.checks, COST):
        return entry
    return replace(entry, where=(*remedies(target, measured), *entry.where))


def cost_figures(measured: PositionMetrics) -> dict[str, Any]:
    """figures_of, and the share of positions whose first choice is another."""
    return figures_of(measured) | {"other_choices": 1.0 - measured.summary().top1}


def cost_limits(target: Target) -> list[Limit]:
    """COST with the bounds of this run's settings."""
    settings = target.session.settings
    bounds = {"kl_mean": settings.max_kl, "other_choices": 1.0 - settings.min_top1}
    return [replace(limit, bound=bounds[limit.figure]) for limit in COST]


def within(checks: tuple[Check, ...], limits: tuple[Limit, ...]) -> bool:
    names = {limit.figure for limit in limits}
    return all(check.passed for check in checks if check.figure in names)


def proof_figures(local: LocalRun) -> dict[str, float]:
    """Figures of PROOF, and beside the scaled NMSE the largest that was measured."""
    layers = local.proof.layers
    return {
        "product_error": max((layer.worst.backward for layer in layers), default=float("inf")),
        "product_relative_max": max((d.relative for layer in layers for d in layer.deviations), default=float("inf")),
        "products": sum(len(layer.deviations) for layer in layers),
        "unproven_products": sum(len(layer.misread) for layer in layers),
        "between_nmse_max": max((layer.between for layer in layers), default=float("inf")),
        "between_scaled_max": BETWEEN * max((layer.excess for layer in layers), default=float("inf")),
        "answer_nmse_max": max(local.proof.logits.values(), default=float("inf")),
        "unwatched_nmse_max": local.unwatched,
    }


def findings(proof: LocalProof) -> list[str]:
    """Every layer that is not what it should be, by name."""
    wrong = list[str]()
    for layer in proof.layers:
        worst = layer.worst
        if not worst.backward <= BACKWARD:
            wrong.append(
                f"{layer.module} ({layer.mode}): its product is off by {worst.backward:.1e} at row {worst.row} of "
                f"{worst.weight}, nearest to {worst.way}"
            )
        wrong += [f"{layer.module} ({layer.mode}): {weight} reads another input" for weight in layer.misread]
        if not layer.excess <= 1:
            wrong.append(
                f"{layer.module} ({layer.mode}): what enters it has NMSE {layer.between:.1e}, "
                f"{layer.allowed:.1e} is allowed"
            )
    return wrong[:SHOWN]


def remedies(target: Target, measured: PositionMetrics) -> list[str]:
    """What to do about a cost beyond the limits, and the modules that it comes from, by trying."""
    with status(f"{target.name}: which layers cost most"):
        found = target.session.costliest(measured.kl)
    rules = " ".join(f"--rule '{module}=skip'" for module, _ in found.modules)
    return [
        f"{found.describe()}: keep these in 16 bits (quantize {rules}), export with --accuracy-level 1 (ONNX) or "
        "--layout split (GGUF), or allow it (--max-kl, --min-top1)"
    ]


def simulated(target: Target) -> str:
    """The same cost as PyTorch predicts it, for comparison; no bound."""
    summary = target.session.simulation.summary()
    return f"int8 activations simulated in PyTorch, blocks of 32: KL mean {summary.kl_mean:.2e}"


def _described(proof: LocalProof) -> str:
    ways: dict[str, int] = {}
    for layer in proof.layers:
        for one in layer.deviations:
            ways[one.way] = ways.get(one.way, 0) + 1
    counted = ", ".join(f"{count} × {way}" for way, count in sorted(ways.items(), key=lambda item: -item[1]))
    return f"{sum(ways.values())} products of {len(proof.layers)} layers: {counted}"


def layers_json(proof: LocalProof) -> list[dict[str, Any]]:
    """For report.json: what was measured of every layer."""
    return [_layer_json(layer) for layer in proof.layers]


def _layer_json(layer: LayerFinding) -> dict[str, Any]:
    worst = layer.worst
    return {
        "module": layer.module,
        "mode": layer.mode,
        "way": worst.way,
        "product_error": worst.backward,
        "relative": worst.relative,
        "rounding": worst.rounding,
        "input_nmse": layer.between,
        "input_nmse_allowed": layer.allowed,
    }
