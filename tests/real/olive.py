"""Microsoft Olive as its users run it: `olive run` on a workflow, in a process of its own.

Olive 0.13 wants Transformers and GenAI of its time (torch.onnx and the builder's module that it patches), which are not
ours. They lie in a folder of the cache that comes before our packages on that process's path, torch and onnx among
those.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.real.packages import PackageUnavailableError, cache_folder

PINS = (
    "olive-ai==0.13.0",
    "onnxruntime-genai==0.14.1",
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface-hub==0.36.0",
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    # what olive-ai imports besides
    "alembic==1.20.1",
    "colorlog==6.12.0",
    "lightning-utilities==0.15.3",
    "Mako==1.4.3",
    "opentelemetry-api==1.45.2",
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-semantic-conventions==0.66b2",
    "optuna==5.0.0",
    "pandas==3.1.1",
    "prompt_toolkit==3.0.53",
    "questionary==2.1.1",
    "sqlalchemy==2.1.9",
    "torchmetrics==1.9.0",
    "wcwidth==0.9.4",
)
CPU = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}
QUIET = {"OLIVE_DISABLE_TELEMETRY": "1", "CI": "1", "HF_HUB_OFFLINE": "1"}


@cache
def packages() -> Path:
    """The folder of PINS, installed once. Raises PackageUnavailableError."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256("\n".join([python, *PINS]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"olive-{name}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made), *PINS]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise PackageUnavailableError(f"Olive cannot be installed; go online once: {ended.stderr[-1000:]}")
        if not folder.is_dir():
            made.rename(folder)
    return folder


def run(model: Path, out: Path, *passes: Mapping[str, Any]) -> Path:
    """The folder that Olive makes of a Transformers model by these passes, with the files it keeps beside the graph."""
    with TemporaryDirectory() as scratch:
        workflow = {
            "input_model": {"type": "HfModel", "model_path": str(model)},
            "systems": {"local_system": CPU},
            "target": "local_system",
            "passes": {f"pass{place}": dict(each) for place, each in enumerate(passes)},
            "cache_dir": f"{scratch}/cache",
            "output_dir": str(out),
        }
        (Path(scratch) / "workflow.json").write_text(json.dumps(workflow), encoding="utf-8")
        command = [sys.executable, "-m", "olive", "run", "--config", f"{scratch}/workflow.json"]
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(packages()), "HF_HOME": f"{scratch}/hub"}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment)
    assert (out / "model.onnx").is_file(), (ended.stdout + ended.stderr)[-3000:]
    return out


def with_tokenizer(folder: Path, model: Path) -> Path:
    """The same folder with the model's small files beside a graph that Olive left alone."""
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja") and not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder
