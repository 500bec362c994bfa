"""Serve vision-language models from tensor-parallel ranks placed by Ray.

The public names load on first use, so that `import dist_vlm` (and with it the command line) costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dist_vlm.version import __version__

if TYPE_CHECKING:
    from dist_vlm.async_llm import AsyncLLM
    from dist_vlm.config import ConfigError, EngineConfig
    from dist_vlm.inputs import PromptStrictInputs, TextPrompt, TokensPrompt
    from dist_vlm.llm import LLM
    from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData
    from dist_vlm.outputs import CompletionOutput, Logprob, RequestOutput
    from dist_vlm.sampling import SamplingParams

_HOMES = {
    "AsyncLLM": "dist_vlm.async_llm",
    "CompletionOutput": "dist_vlm.outputs",
    "ConfigError": "dist_vlm.config",
    "EngineConfig": "dist_vlm.config",
    "ImageFeatureData": "dist_vlm.multimodal.image",
    "ImagePixelData": "dist_vlm.multimodal.image",
    "LLM": "dist_vlm.llm",
    "Logprob": "dist_vlm.outputs",
    "PromptStrictInputs": "dist_vlm.inputs",
    "RequestOutput": "dist_vlm.outputs",
    "SamplingParams": "dist_vlm.sampling",
    "TextPrompt": "dist_vlm.inputs",
    "TokensPrompt": "dist_vlm.inputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "ImageFeatureData",
    "ImagePixelData",
    "Logprob",
    "PromptStrictInputs",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_vlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
