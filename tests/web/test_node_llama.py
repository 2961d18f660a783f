"""The exported GGUF file in node-llama-cpp: ids, chats, greedy answers, and logits where it tells them.

Where nothing is rounded (the F32 twin) logits lie within gate G2's bound of PyTorch's, else they are away by what
llama.cpp in Python is, which verify-parity has judged (assert_as_noisy).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import make_job
from qalora_runtimes.scoring import log_softmax

import qalora_export as q
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.runtimes.twin import write_twin
from tests.formats.onnx.test_genai import CHATS, TEXTS
from tests.web.node import run
from tests.web.reference import ANSWER, G2_NMSE, NEW_TOKENS, assert_as_noisy, expected, nmse

CONTEXT = 512


def as_node_llama_renders(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
    """It renders the model's own template with placeholders and puts the texts in afterwards, untrimmed.

    So a text that begins or ends with white space keeps it, which Transformers and llama.cpp cut here.
    """
    template = tokenizer.chat_template
    assert "| trim" in template
    rendered = tokenizer.apply_chat_template(
        chat, chat_template=template.replace("| trim", ""), add_generation_prompt=True
    )
    return list(rendered["input_ids"])


@pytest.mark.parametrize("path", ["exact", "q4_1", "split"])
def test_the_gguf_file(path: str, tuned: Path, installed: Path, tmp_path: Path) -> None:
    artifact, adapter = tmp_path / "model.gguf", None
    if path == "split":
        q.export_gguf(tuned, artifact, q.GgufSettings(layout="split"))
        adapter = artifact.with_suffix(".lora.gguf")
    else:
        q.export_gguf(tuned, artifact)
    served = artifact
    if path == "exact":
        served = tmp_path / "twin.gguf"
        write_twin(artifact, served)
    tokenizer = load_tokenizer(tuned)
    job = {"model": str(served), "adapter": adapter and str(adapter), "exact": path == "exact", "context": CONTEXT}
    job |= {"texts": TEXTS, "chats": CHATS, "answer": ANSWER, "new_tokens": NEW_TOKENS}
    found = run(installed, "llama.mjs", tmp_path / "work", job, len(tokenizer))
    assert found.said["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found.said["rendered_ids"] == [as_node_llama_renders(tokenizer, chat) for chat in CHATS]
    logits, greedy = expected(tuned, ANSWER, NEW_TOKENS)
    assert found.said["greedy"] == greedy
    assert found.said["text"] == tokenizer.decode(greedy, skip_special_tokens=True)

    reference = log_softmax(logits[0])
    away = nmse(reference, found.logits["node"])
    if path == "exact":
        assert away.max() <= G2_NMSE, away
    else:
        ids = tokenizer.apply_chat_template(ANSWER, add_generation_prompt=True)["input_ids"]
        here = run_runner(
            "llama.cpp", model=artifact, lora=adapter, job=make_job([ids]), workdir=tmp_path / "here", threads=1
        )
        assert here.logprobs is not None, here.message
        assert_as_noisy(away, nmse(reference, here.logprobs))
