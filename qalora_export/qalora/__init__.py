"""QA-LoRA (arXiv 2309.14717): the layer, attaching it, training, adapter files, lossless merge."""
