"""llama-server inside this process, on loopback: started only when something is asked of it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from qalora_runtimes.llama_cpp.client import Client
from qalora_runtimes.llama_cpp.settings import LlamaSettings
from qalora_runtimes.scoring import RunnerError


class LocalServer:
    """xllamacpp.Server with the same settings as the C API path, and its HTTP client."""

    def __init__(self, module: Any, model: Path, lora: Path | None, settings: LlamaSettings) -> None:
        self._module, self._model, self._lora, self._settings = module, model, lora, settings
        self._server: Any = None
        self._key = secrets.token_urlsafe(32)  # other users of this machine reach loopback too

    def client(self) -> Client:
        """Raises RunnerError where llama.cpp cannot load the model or the adapter."""
        if self._server is None:
            try:
                self._server = self._module.Server(self._parameters())
            except RuntimeError as error:
                raise RunnerError(f"llama.cpp's server cannot load {self._model}: {error}") from error
        return Client(self._server.listening_address, owner=self._server, key=self._key)

    def _parameters(self) -> Any:
        xllamacpp, settings = self._module, self._settings
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self._model)
        parameters.api_keys = [self._key]
        parameters.n_ctx = settings.context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = settings.threads
        parameters.verbosity = 1  # errors, which say why a model or its chat template is refused
        parameters.warmup = False
        parameters.fit_params = False  # take these settings, do not shrink them to the memory that is free
        parameters.cache_ram_mib = 0
        parameters.ctx_shift = False
        parameters.use_jinja = True
        if self._lora is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(self._lora), 1.0)]
        if settings.exact:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.no_extra_bufts = True
            parameters.n_gpu_layers = 0
            parameters.no_kv_offload = parameters.no_op_offload = True
        return parameters
