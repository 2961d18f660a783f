"""Chat templates are programs that come with a model: they render in a confined process, with a clear end.

Transformers' own sandbox keeps a template from touching anything; nothing in it keeps one from looping for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.confined import ConfinedTogether, FailedError, OutOfBoundsError


class TemplateRefusal(InputError, TemplateError):
    """The template raised: it does not accept this conversation, or it is broken."""


class BoundedTemplate:
    """Stands in for a tokenizer's apply_chat_template, with the same arguments; answers are str, list and dict.

    process: in which it renders, beside the tokenizer's own calls.

    Raises TemplateRefusal when the template raises, UnsafeInputError when it takes more time or memory than a call may.
    """

    def __init__(self, tokenizer: Any, folder: Path, process: ConfinedTogether) -> None:
        self._tokenizer, self._folder, self._process = tokenizer, folder, process
        self._template, self._render = tokenizer.chat_template, process.add(_plain(tokenizer.apply_chat_template))

    def __call__(self, conversation: Any, **options: Any) -> Any:
        if self._tokenizer.chat_template != self._template:  # another one was set since
            self._process.close()
            self._template = self._tokenizer.chat_template
        try:
            return self._render(conversation, **options)
        except FailedError as error:
            raise TemplateRefusal(
                "the chat template does not accept this conversation",
                where=f"{self._folder}: chat template",
                why=str(error),
                fix="check the order of roles that the model's template expects",
            ) from error
        except OutOfBoundsError as error:
            raise UnsafeInputError(
                "the chat template does not come to an end",
                where=f"{self._folder}: chat template",
                why=f"rendering one conversation, {error}",
                fix="a template is a program that came with the model: look at it, or fetch the model again",
            ) from error


def _plain(render: Any) -> Any:
    def call(conversation: Any, **options: Any) -> Any:
        found = render(conversation, **options)
        return dict(found) if isinstance(found, Mapping) else found

    return call
