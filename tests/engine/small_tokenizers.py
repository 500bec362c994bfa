"""Tokenizers built like those of published checkpoints, from a few sentences: their boundaries are what counts."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
_CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "what does </s> mean in the text <image> of the page",
    "USER: tell me of the cat ASSISTANT: the cat sat",
] * 3


def metaspace(*, specials: Sequence[str] = (*SPECIAL, "<image>"), scheme: str = "first") -> PreTrainedTokenizerFast:
    """BPE over ▁ with byte fallback; a leading ▁ at the start ("first") or behind every special token ("always")."""
    tokenizer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    return _finished(tokenizer, specials, normalized=False)


def legacy(*, specials: Sequence[str] = (*SPECIAL, "<image>"), normalized: bool = False) -> PreTrainedTokenizerFast:
    """The older way to the same: a normalizer prepends ▁ to whatever stands between special tokens. normalized: special
    tokens are looked for in the normalized text."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finished(tokenizer, specials, normalized=normalized)


def lower_case() -> PreTrainedTokenizerFast:
    """Special tokens are found in lower-cased text."""
    tokenizer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    return _finished(tokenizer, (*SPECIAL, "<image>"), normalized=True)


def unigram() -> PreTrainedTokenizerFast:
    """A vocabulary of whole pieces, the special tokens' own text among them with the best score."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<image>", 0.0), ("▁the", -2.0), ("▁cat", -2.0)]
    pieces += [(letter, -6.0) for letter in "▁</>abcdefghijklmnopqrstuvwxyzUSER:.\n"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    return _finished(tokenizer, (*SPECIAL, "<image>"), normalized=False)


def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _finished(tokenizer: Tokenizer, specials: Sequence[str], *, normalized: bool) -> PreTrainedTokenizerFast:
    """With `specials` as its only added tokens; a trained tokenizer has those it was trained with as well."""
    bare = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(bare, part, getattr(tokenizer, part))
    bare.add_special_tokens([AddedToken(token, special=True, normalized=normalized) for token in specials])
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {f"{kind}_token": token for kind, token in zip(("unk", "bos", "eos"), SPECIAL, strict=True)}
    wanted = {kind: token for kind, token in names.items() if token in specials}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **wanted)
