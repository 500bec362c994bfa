"""One picture and one question, offline, as vLLM 0.5.0's page on vision-language models shows it.

python examples/llava_example.py MODEL_DIRECTORY PICTURE --question "What is the content of this image?"
"""

from __future__ import annotations

import argparse

from PIL import Image

from dist_vlm import LLM, SamplingParams
from dist_vlm.multimodal.image import ImagePixelData


def answer(llm: LLM, image: Image.Image, question: str) -> str:
    # A placeholder for each token that a picture takes; one for the whole picture would do as well.
    prompt = "<image>" * llm.config.vision.image_feature_size + f"\nUSER: {question}\nASSISTANT:"
    outputs = llm.generate(
        {"prompt": prompt, "multi_modal_data": ImagePixelData(image)}, SamplingParams(temperature=0, max_tokens=64)
    )
    return outputs[0].outputs[0].text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("image", help="file of a picture")
    parser.add_argument("--question", default="What is the content of this image?")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks (1)")
    arguments = parser.parse_args()
    # The page also gives image_input_type="pixel_values", image_token_id=32000, image_input_shape="1,3,336,336" and
    # image_feature_size=576. They may be given here too; left out, they are the checkpoint's.
    with LLM(model=arguments.model, tensor_parallel_size=arguments.tensor_parallel_size) as llm:
        print(answer(llm, Image.open(arguments.image), arguments.question))


if __name__ == "__main__":
    main()
