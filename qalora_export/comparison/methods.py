"""The methods, one function each: what is trained, what is deployed.

A method that is not in METHODS does not exist for the recipe, the command line or the table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qalora_export.comparison import with_lora, with_qalora
from qalora_export.comparison.bench import Bench, plain
from qalora_export.comparison.cells import Cell
from qalora_export.comparison.method import ALL, SIXTEEN, UNTRAINED, Made, Maker, Method, Widths, bits_of, canonical
from qalora_export.comparison.needs import BITSANDBYTES, CALIBRATION, LLAMA_CPP, PEFT, SCIPY

__all__ = ["METHODS", "Cell", "Made", "Method"]

LOW = (3, 2)  # of what the literature claims where bits are few


def base_16(bench: Bench, _cell: Cell, _folder: Path) -> Made:
    return Made(plain(bench.source), UNTRAINED, 16.0, SIXTEEN)


def rtn(bench: Bench, cell: Cell, _folder: Path) -> Made:
    return canonical(bench, bench.base(bits_of(cell), "rtn"), UNTRAINED)


def gptq(bench: Bench, cell: Cell, _folder: Path) -> Made:
    return canonical(bench, bench.base(bits_of(cell)), UNTRAINED)


def _sixteen_bits(bench: Bench, _bits: int | None) -> Path:
    return bench.gguf_16


def _canonical_gguf(bench: Bench, _bits: int | None) -> Path:
    """Q4_1 holds 2, 3 and 4 bits alike."""
    return bench.exact_gguf


def _mixed_gguf(bench: Bench, bits: int | None) -> Path:
    assert bits is not None
    return bench.gguf_of(with_qalora.mixed_base(bench, bits))


def _k_quants_gguf(bench: Bench, bits: int | None) -> Path:
    assert bits is not None
    return bench.k_quants(bits)


def _merged(id: str, title: str, make: Maker, *needs: str, trained: bool = True, widths: Widths = ALL) -> Method:
    """A method that ships as a canonical checkpoint."""
    return Method(id, title, "each", trained, make, needs, _canonical_gguf, exact=True, widths=widths)


def _beside(id: str, title: str, make: Maker, *needs: str, widths: Widths = ALL) -> Method:
    """A method whose adapter stays beside the quantized weights."""
    return Method(id, title, "each", True, make, needs, widths=widths)


def _by_llama_cpp(id: str, title: str, make: Maker, *needs: str, trained: bool = True) -> Method:
    return Method(id, title, "each", trained, make, (*needs, LLAMA_CPP), _k_quants_gguf)


def _variant(of: str, method: Method) -> Method:
    return replace(method, varies=of)


METHODS = {
    method.id: method
    for method in (
        Method("base", "16-bit base", "16", False, base_16, (), _sixteen_bits),
        Method("lora", "16-bit LoRA, merged", "16", True, with_lora.lora_16, (PEFT,), _sixteen_bits),
        _merged("rtn", "base, round to nearest", rtn, trained=False),
        _merged("gptq", "base, GPTQ", gptq, CALIBRATION, trained=False),
        _by_llama_cpp("k-quants", "base, llama.cpp's K-quants", with_lora.k_quants_of_base, trained=False),
        Method("qlora", "QLoRA, unmerged", "nf4", True, with_lora.qlora, (PEFT, BITSANDBYTES)),
        _merged("qlora+gptq", "QLoRA merged, then GPTQ", with_lora.qlora_gptq, PEFT, BITSANDBYTES, CALIBRATION),
        _by_llama_cpp("qlora+k-quants", "QLoRA merged, then K-quants", with_lora.qlora_k_quants, PEFT, BITSANDBYTES),
        _beside("lq-lora", "LQ-LoRA, unmerged", with_lora.lq_lora, PEFT),
        _variant(
            "lq-lora",
            _beside("lq-lora-fisher", "LQ-LoRA by Fisher information", with_lora.lq_lora_fisher, PEFT, widths=LOW),
        ),
        _variant(
            "lq-lora",
            _beside("lq-lora-mixed", "LQ-LoRA, bits by matrix", with_lora.lq_lora_mixed, PEFT, SCIPY, widths=LOW),
        ),
        _merged("qa-lora", "QA-LoRA", with_qalora.qa_lora, CALIBRATION),
        replace(
            _merged(
                *("qa-lora-mixed", "QA-LoRA, bits by matrix", with_qalora.qa_lora_mixed, CALIBRATION, SCIPY),
                widths=(4, 3),  # at 2 bits there is nothing to choose
            ),
            artifact=_mixed_gguf,
            varies="qa-lora",
        ),
        _merged(
            *("qa-lora-coarse", f"QA-LoRA, groups of {with_qalora.COARSE}", with_qalora.qa_lora_coarse, CALIBRATION),
            widths=(4, 2),
        ),
        _variant(
            "qa-lora",
            _merged("qa-lora-plain", "QA-LoRA from plain GPTQ", with_qalora.qa_lora_plain, CALIBRATION, widths=LOW),
        ),
        _variant(
            "qa-lora",
            _merged(
                "qa-lora-refit", "the same, offsets refitted first", with_qalora.qa_lora_refit, CALIBRATION, widths=LOW
            ),
        ),
        _merged("qa-lora+", "QA-LoRA+ (scales too)", with_qalora.qa_lora_plus, CALIBRATION),
    )
}
