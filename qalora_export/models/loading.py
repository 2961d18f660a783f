"""Load a model the one way every stage uses: local files only, no remote code, eager float32 unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from qalora_export.errors import InputError, refused_by
from qalora_export.models.templates import BoundedTemplate
from qalora_export.models.tokenizers import FILE, Bounds, bind, bounds_of, require_declared_ids
from qalora_export.safety import StrPath
from qalora_export.safety.confined import ConfinedTogether
from qalora_export.safety.limits import byte_order_mark


def load_model(folder: StrPath, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A causal language model in eval mode from a local folder (canonical or plain safetensors)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from qalora_export.checkpoint.canonical import CanonicalCheckpoint, is_canonical

    folder = Path(folder)
    # Every header, and of a canonical checkpoint every shape, is checked before Transformers maps the files.
    if is_canonical(folder):
        CanonicalCheckpoint(folder)
    logging.disable_progress_bar()  # stages have their own
    with refused_by("Transformers", where=folder, doing="load the model"):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            attn_implementation=attention_for(config, attention),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise InputError(
            f"the checkpoint lacks {len(absent)} tensors of the model",
            where=f"{folder}: {absent[0]}",
            why="Transformers would fill them with random numbers",
            fix="fetch it again",
        )
    return model.eval()


_once: ContextVar[dict[Path, Any] | None] = ContextVar("tokenizers loaded once", default=None)


@contextmanager
def tokenizers_loaded_once() -> Iterator[None]:
    """Inside the block load_tokenizer gives one tokenizer per folder, which nobody may change."""
    token = _once.set({})
    try:
        yield
    finally:
        _once.reset(token)


def load_tokenizer(folder: StrPath) -> Any:
    """The model's fast tokenizer from local files: its tokenizer.json as it is, where there is one; its expressions
    and its chat template are bounded in time and memory.

    AutoTokenizer of Transformers 5 builds the tokenizer of some classes anew instead of reading tokenizer.json: with
    `LlamaTokenizer` the ids of Yi and Llama 2 were others than those the model was trained on.
    """
    folder, kept = Path(folder), _once.get()
    if kept is None:
        return _load_tokenizer(folder)
    if folder not in kept:
        kept[folder] = _load_tokenizer(folder)
    return kept[folder]


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = (folder / FILE).is_file()
    kind, bounds = (PreTrainedTokenizerFast, bounds_of(folder)) if ours else (AutoTokenizer, Bounds(False, False))
    with refused_by("Transformers", where=f"{folder}: tokenizer", doing="load the tokenizer"):
        tokenizer: Any = kind.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
        )
        process = ConfinedTogether()
        bind(tokenizer, bounds, folder, process)
        template = BoundedTemplate(tokenizer, folder, process)
        tokenizer.decode(tokenizer("a").input_ids)  # some damage shows only in use
    if ours:
        require_declared_ids(tokenizer, folder)
    if isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.startswith("\ufeff"):
        raise byte_order_mark(f"{folder}: chat template")
    tokenizer.apply_chat_template = template
    return tokenizer


def attention_for(config: Any, wanted: str) -> str:
    """`wanted`, or "eager" for a class without fused attention (Gemma 2 caps its scores)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return wanted if wanted != "sdpa" or getattr(model, "_supports_sdpa", True) else "eager"
