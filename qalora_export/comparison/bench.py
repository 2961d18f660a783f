"""What every cell of a comparison shares: the data, the base checkpoints, the training loop, the way to score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qalora_export.checkpoint.canonical import CanonicalCheckpoint, parts_of
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.comparison.fisher import importance, squared_gradients
from qalora_export.comparison.k_quants import K_QUANTS, SIXTEEN_BITS, quantize_folder
from qalora_export.data.sequence_packing import Row, collate, one_per_row, pack
from qalora_export.errors import InputError
from qalora_export.evaluation import Prompt, end_ids, matches, network_answers, questions
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.progress import track
from qalora_export.qalora.training.arguments import Steps, arguments
from qalora_export.qalora.training.loop import kept_step, make_trainer, run_to_end
from qalora_export.qalora.training.plan import read_data
from qalora_export.qalora.training.trainer import learned_loss
from qalora_export.quantization.gptq import damped_hessian
from qalora_export.quantization.hessian import collect
from qalora_export.quantization.stage import calibration, quantize
from qalora_export.recipe import QuantizeSettings, Recipe, TrainSettings
from qalora_export.safety import scratch_folder

FISHER_ROWS = 128
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Trained:
    """validation_loss: of the step that was kept, nats per learned token; None without validation data."""

    validation_loss: float | None
    trainable: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """held_out_loss: nats per token of the answers; text_loss: of [compare] text. exact answers of total."""

    held_out_loss: float
    text_loss: float | None
    exact: int
    total: int


class Bench:
    """recipe: its [train], [quantize], [evaluate] and [compare]; source: the 16-bit model; work: a scratch folder."""

    def __init__(self, recipe: Recipe, source: Path, work: Path) -> None:
        if recipe.evaluate is None:
            raise InputError(
                "nothing to compare the methods on", where="[evaluate] data", fix="name held-out data with answers"
            )
        if recipe.train.validation is None:
            raise InputError(
                "no validation data to choose learning rates by", where="[train] validation", fix="name a file"
            )
        self.recipe, self.source, self.work = recipe, source, work
        self.evaluation = recipe.evaluate
        self._made = dict[str, object]()
        self.merged = dict[Path, Trained]()  # folders in `work` with a merged model, and how it was trained

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    @property
    def vocabulary(self) -> int:
        return int(ModelFolder(self.source).config["vocab_size"])

    @cached_property
    def modules(self) -> list[str]:
        """The linear layers that every method works on: those a base checkpoint holds quantized."""
        return list(self.forecast.modules)

    @cached_property
    def weights(self) -> int:
        """Weights of `modules` together."""
        return self.forecast.quantized_values

    @cached_property
    def forecast(self) -> Forecast:
        """Of the base with the most bits; which layers it holds quantized, and their sizes, is the same for all.

        Rounded to nearest, which needs no calibration text.
        """
        return Forecast.of(CanonicalCheckpoint(self._rounded))

    @cached_property
    def asked(self) -> list[Prompt]:
        """The questions of the held-out data."""
        return questions(self.tokenizer, self.evaluation, context=ModelFolder(self.source).context)

    def rows(self, file: str | None) -> list[Row]:
        """A data file as the train stage reads it, one sample a row."""
        settings = self.recipe.train.model_copy(update={"data": file})
        return one_per_row(read_data(self.forecast, settings, "data"))

    @cached_property
    def train_rows(self) -> list[Row]:
        rows, settings = self.rows(self.recipe.train.data), self.recipe.train
        return pack([row[0] for row in rows], settings.sequence_length) if settings.packing else rows

    @cached_property
    def validation_rows(self) -> list[Row]:
        return self.rows(self.recipe.train.validation)

    @cached_property
    def held_out_rows(self) -> list[Row]:
        return self.rows(self.evaluation.data)

    @cached_property
    def text_rows(self) -> list[Row] | None:
        """Of [compare] text; None without it."""
        text = self.recipe.compare.text
        return None if text is None else self.rows(text)

    @cached_property
    def fisher(self) -> dict[str, torch.Tensor]:
        """Fisher information of every weight of `modules` on the first training rows, up to a factor."""
        rows = self.train_rows[:FISHER_ROWS]
        return squared_gradients(plain(self.source), self.modules, track(rows, "Fisher information, rows"))

    @cached_property
    def importance(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The same, told by row and by column."""
        return importance(self.fisher)

    @cached_property
    def hessians(self) -> dict[str, torch.Tensor]:
        """Of `modules` in the 16-bit model on the calibration text, damped, float64 (in, in)."""
        settings, model = self.recipe.quantize, plain(self.source)
        windows = calibration(ModelFolder(self.source), settings)

        def run() -> None:
            for window in track(windows, "Hessians, windows"):
                with torch.no_grad():
                    model(torch.from_numpy(window)[None])

        found = collect({name: model.get_submodule(name) for name in self.modules}, run)
        return {name: damped_hessian(hessian.value(), settings.damp) for name, hessian in found.items()}

    def once(self, name: str, make: Callable[[], V]) -> V:
        """What `make` gives, made when first asked for by this name."""
        if name not in self._made:
            self._made[name] = make()
        return cast(V, self._made[name])

    def quantization(self, bits: int, method: str = "gptq") -> QuantizeSettings:
        """[quantize] at other bits."""
        return self.recipe.quantize.model_copy(update={"bits": bits, "method": method, "grid": "affine16"})

    def base(self, bits: int, method: str = "gptq") -> Path:
        """The source as a canonical checkpoint, made when first asked for."""
        return self.base_of(f"{method}.{bits}bit", self.quantization(bits, method))

    def base_of(self, name: str, settings: QuantizeSettings) -> Path:
        """The source as a canonical checkpoint of these settings, made when first asked for by this name."""
        path = self.work / f"base.{name}.qalora"
        if not path.exists():
            quantize(self.source, path, settings)
        return path

    @property
    def _rounded(self) -> Path:
        return self.base(max(self.recipe.compare.bits), "rtn")

    def gguf_of(self, checkpoint: Path) -> Path:
        """A canonical checkpoint in `work` as a GGUF file, made when first asked for."""
        path = checkpoint.with_suffix(".gguf")
        if not path.exists():
            export_gguf(checkpoint, path, self.recipe.export.gguf)
        return path

    @property
    def exact_gguf(self) -> Path:
        """A GGUF file with the source's metadata and tokenizer."""
        return self.gguf_of(self._rounded)

    @property
    def gguf_16(self) -> Path:
        """The source as a GGUF file of float16 matrices."""
        return self._by_llama_cpp(SIXTEEN_BITS)

    def k_quants(self, bits: int) -> Path:
        """The source as llama.cpp's own quantizer has it."""
        return self._by_llama_cpp(K_QUANTS[bits])

    def _by_llama_cpp(self, kind: str) -> Path:
        path = self.work / f"base.{kind}.gguf"
        return path if path.exists() else quantize_folder(self.source, self.exact_gguf, path, kind)

    def settings(self, seed: int, rate: float) -> TrainSettings:
        return self.recipe.train.model_copy(update={"seed": seed, "learning_rate": rate})

    def fit(self, model: Any, seed: int, rate: float, *, optimizer: str | None = None) -> Trained:
        """Train what requires gradients in `model` as the train stage does; the best step stays in it.

        optimizer: instead of the one of [train]. Raises DivergedError when the loss is no longer finite.
        """
        settings = self.settings(seed, rate)
        settings = settings if optimizer is None else settings.model_copy(update={"optimizer": optimizer})
        steps = Steps.of(len(self.train_rows), settings)
        with self.scratch("fit") as folder:
            args = arguments(folder, settings, steps, evaluate=True, fresh=True)
            trainer, clock = make_trainer(model, args, self.train_rows, self.validation_rows)
            run_to_end(trainer, None)
            kept = kept_step(trainer)
            losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
        model.to("cpu")  # where every method's model is merged, packed and scored
        model.eval()
        model.config.use_cache = True
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Trained(losses[kept], trainable, clock.seconds)

    def score(self, model: nn.Module, name: str) -> Score:
        """Loss on the held-out answers and text, and the share of questions that greedy decoding answers exactly."""
        loss = self._loss(model, self.held_out_rows, f"held-out loss of {name}")
        text = None if self.text_rows is None else self._loss(model, self.text_rows, f"held-out text of {name}")
        prompts, ends = [ids for ids, _ in self.asked], end_ids(self.source, self.tokenizer)
        answers = network_answers(model, self.tokenizer, prompts, self.evaluation, ends, f"score of {name}")
        return Score(loss, text, self.right(answers), len(prompts))

    def _loss(self, model: nn.Module, rows: Sequence[Row], title: str) -> float:
        """Nats per learned token."""
        size, total, count = self.evaluation.batch_size, 0.0, 0
        for begin in track(range(0, len(rows), size), title):
            loss, learned = learned_loss(model, collate(rows[begin : begin + size]))
            total, count = total + loss * learned, count + learned
        return total / count

    def right(self, answers: Sequence[str]) -> int:
        """How many answers to `asked` are the expected ones."""
        pairs = zip(answers, self.asked, strict=True)
        return sum(matches(answer, record.expected(), self.evaluation.match) for answer, (_, record) in pairs)

    def bits_of(self, checkpoint: Path) -> float:
        """Bits per weight of `modules` in a canonical checkpoint: codes, scales, offsets, steps."""
        found = CanonicalCheckpoint(checkpoint)
        names = [f"{module}.{part}" for module in self.modules for part in parts_of(found.grids[module])]
        return 8 * sum(found.tensor(name).nbytes for name in names) / self.weights

    def gguf_bits(self, file: Path) -> float:
        """Bits per weight of `modules` in a GGUF file."""
        contents = GgufContents(file)
        return 8 * sum(contents.stored(f"{module}.weight")[1] for module in self.modules) / self.weights

    def scratch(self, name: str) -> AbstractContextManager[Path]:
        """A folder that is gone afterwards."""
        return scratch_folder(self.work / name)


def plain(folder: Path) -> Any:
    """The 16-bit model in float32, ready to be trained or scored."""
    model = load_model(folder, dtype=torch.float32)
    model.requires_grad_(False)
    return model
