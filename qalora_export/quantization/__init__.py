"""A model folder becomes a canonical checkpoint: GPTQ, round to nearest, import of GPTQ checkpoints."""
