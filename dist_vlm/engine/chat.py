"""From a conversation in OpenAI's form to a prompt: its text, its tokens, its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from PIL import Image

from dist_vlm.engine.chat_content import REASONING_KEYS, Message, Picture, parse_messages, plain_json, texts_of
from dist_vlm.engine.chat_template import ChatTemplates, ContentForm, TemplateRefusalError
from dist_vlm.engine.disguised_tokenizer import DisguisedTokenizer
from dist_vlm.engine.special_text import Marks, Rendered, SpecialText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_IMAGE_PART = {"type": "image"}
# Arguments of transformers' `apply_chat_template`, which no name in `template_kwargs` may take.
_RESERVED = frozenset(
    {
        "conversation", "conversations", "messages", "tools", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered.

    chat_template: Jinja, or the name of one of the tokenizer's templates; None takes the renderer's own.
    add_generation_prompt: whether the template begins the assistant's answer.
    tools: tools the assistant may call, as JSON data. template_kwargs: more names for the template, as JSON data.
    """

    chat_template: str | None = None
    add_generation_prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """prompt: the rendered text. prompt_token_ids: with one placeholder for each picture, in their order.
    images: opened, their pixels not decoded yet."""

    prompt: str
    prompt_token_ids: list[int]
    images: list[Image.Image]


class ChatRenderer:
    """Renders conversations for one tokenizer.

    Only special tokens that the template writes, and the placeholders of pictures, become special tokens: where a
    client's text spells one it is tokenized as the text it is. Where nothing is spelled the tokens are those of
    transformers' processor, which adds the tokenizer's own (mostly a bos token) unless the template began with bos.

    A template that takes a list of parts gets {"type": "image"} and {"type": "text", "text": ...} in the order given.
    One that takes strings alone gets the parts joined with newlines, a placeholder for each picture. A string goes as
    it is, or as one part where the template takes no strings.

    image_token_id: None for a model without pictures. max_pixels: largest picture in a data: URL.
    default_template: Jinja, taken in place of the tokenizer's own template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_token_id: int | None,
        max_pixels: int,
        default_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._max_pixels = max_pixels
        self._templates = ChatTemplates(tokenizer, default_template)
        self._special = SpecialText(tokenizer, image_token_id=image_token_id)

    @property
    def has_template(self) -> bool:
        """Whether conversations that bring no template of their own can be rendered."""
        return self._templates.has_default

    @property
    def placeholder(self) -> str | None:
        """The text of the image placeholder; None for a model without pictures."""
        return None if self._image_token_id is None else self._placeholder

    def check_template(self) -> None:
        """Raises `ValueError` where there is no template to take, or it is not Jinja."""
        self._templates.form(self._templates.resolve(None, None))

    def render(self, messages: Any, options: ChatOptions | None = None) -> ChatPrompt:
        """Raises `ValueError` naming the message, the part, the value and what is allowed."""
        conversation = parse_messages(messages)
        prompt, token_ids = self.render_text(conversation, options or ChatOptions())
        return ChatPrompt(prompt, token_ids, self.open_images(conversation))

    def inputs(self, messages: Any, options: ChatOptions) -> ChatInputs | list[ChatInputs]:
        """One conversation, or a list of several, as prompts for `LLM.generate` that are rendered when they are read.
        Raises `ValueError` for what concerns all of them: the template, or no conversation at all."""
        self._templates.form(self._templates.resolve(options.chat_template, options.tools))
        if isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple)):
            return [ChatInputs(self, conversation, options) for conversation in messages]
        return ChatInputs(self, messages, options)

    def open_images(self, conversation: Sequence[Message]) -> list[Image.Image]:
        """The pictures in their order, not decoded yet. Raises `PictureError`."""
        pictures = (picture for message in conversation for picture in message.pictures)
        return [picture.open(max_pixels=self._max_pixels) for picture in pictures]

    def render_text(self, conversation: Sequence[Message], options: ChatOptions) -> tuple[str, list[int]]:
        """The prompt and its tokens, one placeholder for each picture."""
        num_pictures = sum(len(message.pictures) for message in conversation)
        if num_pictures and self._image_token_id is None:
            raise ValueError(f"messages have {num_pictures} picture(s), but this model takes none")
        rendered = self._rendered(conversation, options)
        token_ids = self._tokenize(rendered)
        num_placeholders = token_ids.count(self._image_token_id) if self._image_token_id is not None else 0
        if num_placeholders != num_pictures:
            raise ValueError(
                f"the chat template made {num_placeholders} image placeholders of {num_pictures} picture(s): "
                "must be one for each"
            )
        return rendered.text, token_ids

    def _rendered(self, conversation: Sequence[Message], options: ChatOptions) -> Rendered:
        template = self._templates.resolve(options.chat_template, options.tools)
        tools = _checked_tools(options.tools)
        kwargs = _checked_kwargs(options.template_kwargs)
        texts = [text for message in conversation for text in message.texts]
        marks = Marks(self._special, [template, *texts, *texts_of(tools), *texts_of(kwargs)])
        try:
            rendered = self._templates.render(
                template,
                [self._template_message(message, template, marks) for message in conversation],
                tools=marks.data(tools),
                add_generation_prompt=options.add_generation_prompt,
                template_kwargs=marks.data(kwargs),
            )
        except TemplateRefusalError as refusal:
            raise ValueError(marks.removed(str(refusal))) from None
        if not rendered:
            raise ValueError("the chat template made an empty prompt of the messages")
        return marks.read(rendered)

    def _template_message(self, message: Message, template: str, marks: Marks) -> dict[str, Any]:
        """A message as the template reads it, its texts marked."""
        fields = dict(message.fields)
        result = {"role": fields.pop("role")}
        for key in REASONING_KEYS & fields.keys():
            result[key] = marks.message_text(fields.pop(key))
        result.update(marks.data(fields))
        if message.content is not None:
            result["content"] = self._template_content(message.content, self._templates.form(template), marks)
        return result

    def _template_content(self, content: str | tuple[str | Picture, ...], form: ContentForm, marks: Marks) -> Any:
        if isinstance(content, str) and form.takes_strings:
            return marks.message_text(content)
        parts = (content,) if isinstance(content, str) else content
        texts = [marks.message_text(part) if isinstance(part, str) else None for part in parts]
        if form.takes_parts:
            return [_IMAGE_PART if text is None else {"type": "text", "text": text} for text in texts]
        return "\n".join(self._placeholder if text is None else text for text in texts)

    def _tokenize(self, rendered: Rendered) -> list[int]:
        spans, bos = rendered.special_spans, self._tokenizer.bos_token
        begins_with_bos = bool(bos and spans and spans[0][0] == 0 and rendered.text.startswith(bos))
        if not rendered.is_spelled:
            (encoding,) = self._tokenizer(
                rendered.text, add_special_tokens=not begins_with_bos, verbose=False
            ).encodings
            if not self._special.in_normalized or self._special.only_at(spans, encoding):
                token_ids: list[int] = encoding.ids
                return token_ids
        return self._disguised.encode(rendered.text, spans, add_special_tokens=not begins_with_bos)

    @property
    def _placeholder(self) -> str:
        assert self._image_token_id is not None, "a model without pictures has been refused them"
        token = self._tokenizer.backend_tokenizer.id_to_token(self._image_token_id)
        assert token is not None, "resolve() has checked it"
        return token

    @cached_property
    def _disguised(self) -> DisguisedTokenizer:
        return DisguisedTokenizer(self._tokenizer, self._special.ids)


_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data")


class ChatInputs(Mapping[str, Any]):
    """A conversation as a prompt of `dist_vlm.inputs.TextTokensPrompt`.

    It is rendered when a key is read first. Pictures are opened anew at each reading, so that many conversations that
    wait for their turn hold none.
    """

    def __init__(self, renderer: ChatRenderer, messages: Any, options: ChatOptions) -> None:
        self._renderer = renderer
        self._messages = messages
        self._options = options

    @cached_property
    def _text(self) -> tuple[str, list[int]]:
        return self._renderer.render_text(parse_messages(self._messages), self._options)

    def __getitem__(self, key: str) -> Any:
        if key == "prompt":
            return self._text[0]
        if key == "prompt_token_ids":
            return self._text[1]
        if key == "multi_modal_data":
            return {"image": self._renderer.open_images(parse_messages(self._messages))}
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return key in _KEYS  # a mapping's own would open the pictures to see

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)


def _checked_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    checked = plain_json(tools, "tools")
    if not isinstance(checked, list) or not all(isinstance(tool, dict) for tool in checked):
        raise ValueError("tools must be a list of maps, each the JSON description of a tool")
    return checked


def _checked_kwargs(kwargs: Any) -> dict[str, Any]:
    checked = plain_json(kwargs or {}, "template_kwargs")
    if not isinstance(checked, dict):
        raise ValueError(f"template_kwargs of type {type(kwargs).__name__}: must be a map")
    reserved = sorted(_RESERVED & checked.keys())
    if reserved:
        raise ValueError(f"template_kwargs has the key {reserved[0]!r}: it is no name for the template to read")
    return checked
