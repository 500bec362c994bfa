"""Chat templates: the operator's Jinja, through transformers' sandbox."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

_PROBE = "probe7Q"
# What a list of parts looks like where a template writes it out as it is.
_QUOTED = ("'text'", '"text"')
# Templates of a tokenizer that has several, which are taken where none is named.
_UNNAMED = {"default", "tool_use"}


@dataclass(frozen=True, slots=True)
class ContentForm:
    """The forms of a message's content that a template takes: a string, a list of parts."""

    takes_strings: bool
    takes_parts: bool


class TemplateRefusalError(ValueError):
    """What a template itself says against the messages."""


class ChatTemplates:
    """Finds, examines and renders the templates of one tokenizer.

    default: the template to take before the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, default: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._default = default
        self._forms: dict[str, ContentForm] = {}

    @property
    def has_default(self) -> bool:
        """Whether there is a template where none is named."""
        own = self._tokenizer.chat_template
        return self._default is not None or (bool(own.keys() & _UNNAMED) if isinstance(own, dict) else own is not None)

    def resolve(self, chat_template: str | None, tools: Any) -> str:
        """The template's text: the argument, or the name of one of the tokenizer's, else the default.

        Raises `ValueError` where there is none, or it has no place for the tools.
        """
        if chat_template is not None and not isinstance(chat_template, str):
            raise ValueError(f"chat_template of type {type(chat_template).__name__}: must be a string or None")
        own = self._tokenizer.chat_template
        chat_template = self._default if chat_template is None else chat_template
        if chat_template is None and own is None:
            raise ValueError("chat_template = None, and the tokenizer has no chat template: pass one")
        if chat_template is None and isinstance(own, dict) and not own.keys() & _UNNAMED:
            raise ValueError(f"chat_template = None, and the tokenizer has several: must be one of {', '.join(own)}")
        template: str = self._tokenizer.get_chat_template(chat_template, tools)
        if tools and "tools" not in template:
            raise ValueError("tools are given, but the chat template has no place for them")
        return template

    def form(self, template: str) -> ContentForm:
        """What contents the template takes, by how it renders one message in either form.

        One that writes neither out (it asks for more than a user's message) gets contents as they are given. Raises
        `ValueError` for a template that is not Jinja.
        """
        if template not in self._forms:
            string = self._probe(template, _PROBE)
            parts = self._probe(template, [{"type": "text", "text": _PROBE}])
            as_it_is = any(quoted in parts and quoted not in string for quoted in _QUOTED)
            form = ContentForm(_PROBE in string, _PROBE in parts and not as_it_is)
            neither = not form.takes_strings and not form.takes_parts
            self._forms[template] = ContentForm(True, True) if neither else form
        return self._forms[template]

    def _probe(self, template: str, content: Any) -> str:
        try:
            return self._apply(template, [{"role": "user", "content": content}])
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template is not Jinja: line {error.lineno}: {error.message}") from None
        except Exception:
            _log.debug("the chat template does not take a content like %r", content, exc_info=True)
            return ""

    def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """Raises `TemplateRefusalError` with what the template says, `ValueError` where it fails."""
        try:
            return self._apply(
                template, messages, tools=tools, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except jinja2.TemplateError as error:
            if type(error) is jinja2.TemplateError:  # raised by raise_exception() in the template
                raise TemplateRefusalError(f"the chat template refuses the messages: {error.message or ''}") from None
            raise self._failure(error) from error
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> ValueError:
        _log.debug("the chat template fails", exc_info=True)
        return ValueError(f"the chat template cannot render the messages ({type(error).__name__})")

    def _apply(self, template: str, messages: list[dict[str, Any]], **options: Any) -> str:
        text = self._tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        assert isinstance(text, str), "one conversation, untokenized"
        return text
