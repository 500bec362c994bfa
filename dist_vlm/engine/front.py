"""What the front needs of a checkpoint: its facts, tokenizer and processor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.config import EngineConfig
from dist_vlm.engine.chat import ChatRenderer
from dist_vlm.engine.images import ImagePreparer
from dist_vlm.engine.processor import Processor
from dist_vlm.engine.template_source import built_in_template, given_template, stored_template
from dist_vlm.workers.models import ModelSpec, get_family, read_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Front:
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    processor: Processor
    chat: ChatRenderer


def load_front(
    config: EngineConfig, *, serves_logits_processors: bool = False, chat_template: str | None = None
) -> Front:
    """Loads the tokenizer and the image processor of a resolved configuration. Raises `ValueError` naming the
    directory if one is missing or unreadable.

    serves_logits_processors: whether the executor does; without, requests that bring some are refused.
    chat_template: as in `load_chat`.
    """
    spec = read_spec(config.model.model)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.model)
    image_processor = None
    if spec.image_token_id is not None and not config.vision.disable_image_processor:
        image_processor = get_family(spec.family).image_processor(spec, config.vision.image_processor)
    assert config.model.max_model_len is not None, "resolve() decides it"
    processor = Processor(
        tokenizer=tokenizer,
        spec=spec,
        images=ImagePreparer(spec=spec, vision=config.vision, processor=image_processor),
        max_model_len=config.model.max_model_len,
        seed=config.model.seed,
        max_logprobs=config.scheduler.max_logprobs,
        serves_logits_processors=serves_logits_processors,
    )
    return Front(spec, tokenizer, processor, load_chat(config, tokenizer, chat_template=chat_template))


def load_chat(config: EngineConfig, tokenizer: Any, *, chat_template: str | None = None) -> ChatRenderer:
    """What renders conversations for a resolved configuration and its tokenizer.

    chat_template: a template, as its text or its file, which comes before all others. None takes the tokenizer's, else
    the one in a file chat_template.jinja or chat_template.json beside it or in the checkpoint's directory, else the
    family's. Raises `ValueError` (`ConfigError`) for one that cannot be read or is not Jinja.
    """
    spec = read_spec(config.model.model)
    if chat_template is not None:
        template: str | None = given_template(chat_template)
    elif tokenizer.chat_template is not None:
        template = None
    else:
        folders = [folder for folder in (config.model.tokenizer, config.model.model) if folder is not None]
        template = stored_template(folders)
        if template is None:
            template = built_in_template(spec.family, get_family(spec.family).chat_template)
    chat = ChatRenderer(
        tokenizer,
        image_token_id=spec.image_token_id,
        max_pixels=config.vision.max_image_pixels,
        default_template=template,
    )
    if template is not None:
        chat.check_template()
    return chat


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer, from local files alone."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = _tokenizer_class(path).from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ValueError(f"tokenizer = {path!r}: cannot be loaded ({type(error).__name__}: {error})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer = {path!r}: a {type(tokenizer).__name__}; must be a fast tokenizer")
    return tokenizer


def _tokenizer_class(path: str) -> Any:
    """The class to load with. Where the checkpoint names the generic one, asking `AutoTokenizer` for it would only
    cost seconds of imports."""
    import transformers

    file = Path(path) / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer
