"""What an exported artifact scores through its own runtime: a task, running text, and lm-eval's tasks.

running   one artifact in its runtime: texts and conversations to ids, greedy answers, log-probabilities   (running.py)
stage     task score and perplexity of any model, folders in PyTorch                                       (stage.py)
harness   an lm-eval model on an artifact; imports lm-eval when it is asked for                            (harness.py)
"""
