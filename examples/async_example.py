"""Several questions about one picture at once, in asyncio; each line is printed as its answer grows.

python examples/async_example.py MODEL_DIRECTORY PICTURE "First question?" "Second question?"
"""

from __future__ import annotations

import argparse
import asyncio

from PIL import Image

from dist_vlm import AsyncLLM, SamplingParams


async def ask(llm: AsyncLLM, image: Image.Image, question: str, *, name: str) -> str:
    """Prints the answer so far each time there is more of it, and returns the whole."""
    prompt = {"prompt": f"USER: <image>\n{question} ASSISTANT:", "multi_modal_data": {"image": image}}
    text = ""
    async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=64)):
        text = output.outputs[0].text
        print(f"{name}: {text}", flush=True)
    return text


async def ask_all(llm: AsyncLLM, image: Image.Image, questions: list[str]) -> list[str]:
    """The answers, in the order of the questions. The picture is encoded once for all of them."""
    names = (str(number) for number in range(1, len(questions) + 1))
    return await asyncio.gather(
        *(ask(llm, image, question, name=name) for name, question in zip(names, questions, strict=False))
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("image", help="file of a picture")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks (1)")
    arguments = parser.parse_args()
    image = Image.open(arguments.image)
    async with AsyncLLM(model=arguments.model, tensor_parallel_size=arguments.tensor_parallel_size) as llm:
        answers = await ask_all(llm, image, arguments.questions)
    print()
    for question, text in zip(arguments.questions, answers, strict=True):
        print(f"{question} {text.strip()}")


if __name__ == "__main__":
    asyncio.run(main())
