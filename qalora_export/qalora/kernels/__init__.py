"""The layer's arithmetic on a GPU, in Triton; the torch code in qalora/dequant.py and qalora/layer.py is the oracle.

    dequantize        codes, scale, offset → matrix, at the speed of memory      the same bits as torch
    effective_offset  fp16(m + α/r · B A) in one pass over the offsets           the same float64 sums, in another order
    group_sum         x → its sums over groups, in one pass over x               float32 sums, in another order
    fused_linear      x · dequant(…)ᵀ without writing the matrix, for few rows   the same products, in another order

Each is a torch custom op (ops.py), so torch.compile sees one opaque node with a known shape. dispatch.py says when
they are used. Triton is imported by the first launch, not before.
"""
