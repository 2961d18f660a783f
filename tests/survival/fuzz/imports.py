"""Imported before the children are forked, so that none of them has to: slow to import, and counted as memory."""

import matplotlib.pyplot  # noqa: F401
import mobius  # noqa: F401
import onnx  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import qalora_export
import qalora_export.cli.main
import qalora_export.cli.run_summary
import qalora_export.cli.verbs
import qalora_export.formats.onnx.graph
import qalora_export.verify.runtimes.record

for public in qalora_export.__all__:
    getattr(qalora_export, public)
