"""Runners for edge devices: numpy and one inference runtime each, no torch, one process per runtime.

`python -m qalora_runtimes` tells which runtimes are installed; `python -m qalora_runtimes llama.cpp | onnxruntime |
onnxruntime-genai` reads a job (`protocol`), runs an exported model and writes log-probabilities and a fingerprint.
`launch.run_runner` starts them and survives their crashes.
"""

from qalora_runtimes.version import __version__

__all__ = ["__version__"]
