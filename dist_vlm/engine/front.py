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
from dist_vlm.workers.models import ModelSpec, get_family, read_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Front:
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    processor: Processor
    chat: ChatRenderer


def load_front(config: EngineConfig, *, serves_logits_processors: bool = False) -> Front:
    """Loads the tokenizer and the image processor of a resolved configuration. Raises `ValueError` naming the
    directory if one is missing or unreadable.

    serves_logits_processors: whether the executor does; without, requests that bring some are refused.
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
    chat = ChatRenderer(tokenizer, image_token_id=spec.image_token_id, max_pixels=config.vision.max_image_pixels)
    return Front(spec, tokenizer, processor, chat)


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
