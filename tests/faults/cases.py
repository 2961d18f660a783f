"""The table of planted faults: what is damaged, where, and what verify-parity must say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults import plants as p
from tests.faults import wrong_stages as w
from tests.faults.line import MODULE
from tests.faults.plants import Plant
from tests.faults.runtime import SCALED_KERNEL

LLAMA, ORT, GENAI = "llama.cpp", "onnxruntime", "onnxruntime-genai"
KIND = {LLAMA: "gguf", ORT: "onnx", GENAI: "onnx"}
ATTENTION_0 = "model.layers.0.self_attn"


@dataclass(frozen=True)
class Fault:
    """One damage. plant: runtime -> how; red: gates that must fail, blind: that must not (they cannot see it).

    place: text that a finding of the first red gate must contain, by runtime where they differ. bisect: first tensor
    that must be named, for faults that reach the logits. runtime_fault: the damage is in the runner. context: damage
    that must stay in place while verifying.
    """

    name: str
    damaged: str
    plant: dict[str, Plant]
    red: str
    place: str | dict[str, str]
    bisect: str | None = None
    blind: str = ""
    runtime_fault: bool = False
    context: Callable[[], Any] | None = None

    @property
    def gates(self) -> list[str]:
        return self.red.split()

    def place_for(self, runtime: str) -> str:
        return self.place if isinstance(self.place, str) else self.place[runtime]


def in_both(change: Callable[[Any], None]) -> dict[str, Plant]:
    return {LLAMA: p.in_gguf(change), ORT: p.in_onnx(change)}


def merged(make: Callable[[str], Plant]) -> dict[str, Plant]:
    return {LLAMA: make("gguf"), ORT: make("onnx")}


FAULTS = (
    Fault("nibble order", "artifact", in_both(p.swap_nibbles), "G0 G1 G2", f"{MODULE}.codes", MODULE),
    Fault("offset sign", "artifact", in_both(p.negate_offset), "G0 G1 G2", f"{MODULE}.offset", MODULE),
    Fault("scales transposed", "artifact", in_both(p.transpose_scale), "G0 G1 G2", f"{MODULE}.scale", MODULE),
    Fault("groups shifted by one", "artifact", in_both(p.shift_groups), "G0 G1 G2", f"{MODULE}.offset", MODULE),
    Fault("one code ±1 in one tensor", "artifact", in_both(p.one_code), "G0 G1 G2", f"{MODULE}.codes: 1", MODULE),
    Fault(
        "NaN in one offset",
        "artifact",
        {**in_both(p.nan_offset), GENAI: p.in_onnx(p.nan_offset)},
        "G0 G1 G2 G3",
        MODULE,
        MODULE,
    ),
    Fault(
        "RoPE permutation missing",
        "exporter",
        {LLAMA: p.unpermuted_rows},
        "G0 G1 G2 G3",
        "model.layers.0.self_attn.q_proj.codes",
        "model.layers.0.self_attn.q_proj",
    ),
    Fault(
        "RoPE permutation missing, read back with the same fault",
        "exporter and reader",
        {LLAMA: w.exported_without_permutation},
        "G2 G3",
        ATTENTION_0,
        ATTENTION_0,
        blind="G0 G1",
        context=w.no_permutation,
    ),
    Fault(
        "RoPE pairs interleaved",
        "graph",
        {ORT: p.onnx_graph(p.interleaved_rope)},
        "G0 G2 G3",
        "rotary_interleaved",
        ATTENTION_0,
        blind="G1",
    ),
    Fault(
        "norm epsilon 1e-6 for 1e-5",
        "artifact",
        {
            LLAMA: p.gguf_metadata("llama.attention.layer_norm_rms_epsilon", p.float32(1e-6)),
            ORT: p.onnx_graph(p.other_epsilon),
        },
        "G0 G2",
        "norm epsilon: ",
        "model.layers.0.input_layernorm",
        blind="G1",
    ),
    Fault(
        "RoPE base 20,000 for 10,000",
        "artifact",
        {LLAMA: p.gguf_metadata("llama.rope.freq_base", p.float32(20_000.0)), ORT: p.other_rope_tables},
        "G0 G2 G3",
        "RoPE frequencies: ",
        ATTENTION_0,
        blind="G1",
    ),
    Fault(
        "one norm weight off by 1 %",
        "artifact",
        {
            LLAMA: p.other_norm_gguf("blk.1.ffn_norm.weight"),
            ORT: p.other_norm_onnx("model.layers.1.post_attention_layernorm.weight"),
        },
        "G0 G2",
        "model.layers.1.post_attention_layernorm.weight: 1",
        "model.layers.1.post_attention_layernorm",
        blind="G1",
    ),
    Fault("lm_head quantized", "exporter", merged(w.quantized_head), "G0 G2", "lm_head", "lm_head"),
    Fault(
        "BOS missing",
        "artifact",
        {
            LLAMA: p.gguf_metadata("tokenizer.ggml.add_bos_token", b"\x00"),
            ORT: p.onnx_text("tokenizer.json", p.no_bos),
        },
        "G0 G5",
        "ids around an empty text: ",
    ),
    Fault(
        "one merge rule of the tokenizer lost",
        "exporter",
        {
            LLAMA: w.lost_merge_gguf,
            ORT: p.onnx_text("tokenizer.json", p.lost_merge_onnx),
            GENAI: p.onnx_text("tokenizer.json", p.lost_merge_onnx),
        },
        "G0 G5",
        f"merges: item {p.LOST_RULE}",
    ),
    Fault(
        "chat template altered",
        "artifact",
        {
            LLAMA: p.altered_template_gguf,
            ORT: p.onnx_text("tokenizer_config.json", lambda t: t.replace("<|assistant|>", "<|Assistant|>")),
            GENAI: p.onnx_text("tokenizer_config.json", lambda t: t.replace("<|assistant|>", "<|Assistant|>")),
        },
        "G0 G5",
        "chat template: ",
    ),
    Fault(
        "KV cache off by one",
        "runtime",
        {LLAMA: p.unchanged, ORT: p.unchanged},
        "G4",
        "] NMSE",
        blind="G0 G1 G2 G3",
        runtime_fault=True,
    ),
    Fault(
        SCALED_KERNEL,
        "runtime",
        {LLAMA: p.unchanged, ORT: p.unchanged},
        "G3 G4",
        f"{MODULE} (",
        blind="G0 G1 G2",
        runtime_fault=True,
    ),
    Fault("pool mean merged as sum", "merge", merged(w.mean_pool), "G0", "q_proj.offset (not base + adapter)"),
    Fault("wrong alpha", "merge", merged(w.double_alpha), "G0", "q_proj.offset (not base + adapter)"),
    Fault("wrong rank", "merge", merged(w.half_rank), "G0", "down_proj.offset (not base + adapter)"),
    Fault("adapter of another base", "merge", merged(w.foreign_adapter), "G0", "trained on another base"),
)
CASES = [(fault, runtime) for fault in FAULTS for runtime in fault.plant]
