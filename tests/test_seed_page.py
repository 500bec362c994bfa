"""Code written against the seed's page, `vllm` replaced by `dist_vlm` in its text and the model by a local path."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dist_vlm.multimodal.image import ImagePixelData

# What the page's users wrote: its names, its arguments, its prompt with a placeholder for each feature row.
OFFLINE = """
from vllm import LLM
from vllm.inputs import PromptStrictInputs
from vllm.multimodal.image import ImageFeatureData, ImagePixelData

llm = LLM(
    model="MODEL",
    image_input_type="pixel_values",
    image_token_id=32000,
    image_input_shape="1,3,56,56",
    image_feature_size=16,
)
prompt = "<image>" * 16 + "\\nUSER: What does the picture show?\\nASSISTANT:"
outputs = llm.generate({"prompt": prompt, "multi_modal_data": ImagePixelData(image)})
texts = []
for o in outputs:
    texts.append(o.outputs[0].text)
"""


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((70, 50), 80).convert("RGB")


@pytest.mark.timeout(180)
def test_the_offline_example_runs_through_ray(tiny_checkpoint: Path, image: Image.Image) -> None:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from dist_vlm import LLM, SamplingParams

    scope: dict = {"image": image}
    exec(OFFLINE.replace("vllm", "dist_vlm").replace("MODEL", str(tiny_checkpoint)), scope)
    try:
        (text,) = scope["texts"]
        assert text, "sampled by default, as in the seed: 16 tokens at temperature 1"
        assert len(scope["outputs"][0].outputs[0].token_ids) == 16
        assert isinstance(scope["llm"], LLM)
        inputs = {"prompt": scope["prompt"], "multi_modal_data": ImagePixelData(image)}
        (greedy,) = scope["llm"].generate(inputs, SamplingParams(temperature=0), use_tqdm=False)
    finally:
        scope["llm"].shutdown()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    prepared = processor(images=[image], text=[scope["prompt"].replace("<image>" * 16, "<image>")], return_tensors="pt")
    tokens = model.generate(**prepared, max_new_tokens=16, do_sample=False)
    assert greedy.outputs[0].token_ids == tokens[0, prepared["input_ids"].shape[1] :].tolist()


def test_the_engine_arguments_of_the_page() -> None:
    from dist_vlm.engine.arg_utils import _vlm_engine_args_parser

    flags = {flag for action in _vlm_engine_args_parser()._actions for flag in action.option_strings}
    assert {flag for flag in flags if not flag.startswith(("-h", "--help", "--no-"))} == {
        "--image-input-type", "--image-token-id", "--image-input-shape", "--image-feature-size", "--image-processor",
        "--image-processor-revision", "--disable-image-processor",
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["image_token_id", "image_input_shape", "image_feature_size"])
def test_image_input_type_needs_its_three_companions(missing: str, tiny_facts: Path) -> None:
    from dist_vlm import LLM

    values = {"image_token_id": 32000, "image_input_shape": "1,3,56,56", "image_feature_size": 16}
    del values[missing]
    with pytest.raises(ValueError, match="Specify .* together with image_input_type"):
        LLM(str(tiny_facts), image_input_type="pixel_values", **values)


def test_the_module_paths_of_the_seed() -> None:
    import dist_vlm.inputs
    import dist_vlm.outputs
    import dist_vlm.sampling_params

    assert dist_vlm.sampling_params.SamplingParams is dist_vlm.SamplingParams
    assert dist_vlm.inputs.PromptStrictInputs
    assert dist_vlm.outputs.RequestOutput
