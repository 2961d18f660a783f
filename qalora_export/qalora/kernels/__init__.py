"""The layer's arithmetic on a GPU, in Triton; the torch code in qalora/dequant.py and qalora/function.py is the oracle.

    dequantize        codes, scale, offset, A, B → matrix, at memory speed       the same bits as torch
    effective_offset  fp16(m + α/r · B A) in one pass over the offsets           the same float64 sums, in another order
    group_sum         x → its sums over groups, in one pass over x               float32 sums, in another order
    fused_linear      x · dequant(…)ᵀ without writing the matrix, for few rows   the same products, in another order

Under torch.compile each is a custom op (ops.py), one opaque node with a known shape. dispatch.py says when they are
used. Triton is imported by the first launch, not before.
"""
