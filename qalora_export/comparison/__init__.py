"""QA-LoRA beside the methods it is compared with: same base, data, steps and seeds, one table.

cell      one model to make: a method, its bits, a seed, a learning rate        (cells.py)
bench     what all cells share: data, base checkpoints, how a model is scored   (bench.py)
method    bench + cell -> a model, and what it would take to ship it            (method.py, methods.py, with_*.py)
speed     llama.cpp on the deployed layout, beside the 16-bit base              (speed.py)
stage     every cell once, one JSON file each, so that a killed run goes on     (stage.py)
table     cells -> rows with mean and spread, markdown, plot                    (table.py, plot.py)
claims    what the papers say, held or not held by these rows                   (claims.py)
"""
