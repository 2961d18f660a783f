"""Mixes of grids by name: which modules get more bits, as rules that stand behind the user's own.

q4_k_m    llama.cpp's Q4_K_M (src/llama-quant.cpp, llama_tensor_get_type): Q4_K, more bits for attn_v and ffn_down in
          the first and last eighth of the layers and every third between, Q6_K for the output matrix, or for the
          embedding where both are one. There the many bits are Q6_K, which no adapter can move; here they are q5_k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qalora_export.recipe import Preset, QuantizeRule

HEAD = "lm_head"
MORE_BITS = ("v_proj", "qkv_proj", "down_proj")


def preset_rules(preset: Preset | None, modules: Sequence[str], *, inside: str, tied: bool) -> tuple[QuantizeRule, ...]:
    """The rules of a preset for a model with these modules, each of which they name literally.

    inside: prefix of the decoder layers. tied: whether lm_head is the embedding.
    """
    return () if preset is None else tuple(_q4_k_m(modules, inside=inside, tied=tied))


def _q4_k_m(modules: Sequence[str], *, inside: str, tied: bool) -> Iterator[QuantizeRule]:
    layers = {int(name.removeprefix(inside).partition(".")[0]) for name in modules if name.startswith(inside)}
    for name in modules:
        if not name.startswith(inside):
            if name != HEAD or not tied:
                yield QuantizeRule(match=name, grid="q6_k" if tied or name == HEAD else "q4_k")
        elif name.endswith(MORE_BITS) and more_bits(int(name.removeprefix(inside).partition(".")[0]), len(layers)):
            yield QuantizeRule(match=name, grid="q5_k")


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
