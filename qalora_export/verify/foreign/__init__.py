"""verify-parity for any file of anyone: which part of an artifact broke, found by isolating each.

weights             every tensor against the source's, by what its type can hold        weights.py, causes.py
graph and metadata  the artifact's own numbers in Transformers against the runtime      graph.py, metadata.py
tokenizer, chat     ids of texts, rendered conversations, end tokens, sampling          text.py, ends.py
kernels             the exact path against the shipped one, what the quantization costs graph.py
diagnosis           the parts in this order, one sentence                               diagnosis.py, stage.py
"""
