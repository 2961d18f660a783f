"""Runners for edge devices: numpy and one inference runtime each, no torch, one process per runtime.

`python -m qalora_runtimes.llama_cpp | .onnxruntime_ | .genai` read a job (`protocol`), run an exported model and
write log-probabilities and a fingerprint. `launch.run_runner` starts them and survives their crashes.
"""
