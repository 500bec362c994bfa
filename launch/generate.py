"""`dist-vlm generate`: pictures and a prompt in, one answer out."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_load import add_config_flags, config_flags, load_config

if TYPE_CHECKING:
    from dist_vlm import LLM, SamplingParams, TextPrompt

_TEXT = (
    "one answer to a prompt. <image> in the prompt marks the place of each picture, in order, and the prompt is then "
    "taken as it stands; pictures without it go before the text in the checkpoint's chat template"
)


def add_command(commands: Any) -> None:
    generate = commands.add_parser("generate", help="answer one prompt", description=_TEXT, allow_abbrev=False)
    generate.add_argument("--config", metavar="FILE", help="YAML file; without it --model is needed")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text; see above")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    generate.add_argument("--no-progress", action="store_true", help="show no progress bar")
    sampling = generate.add_argument_group("sampling (--seed, below, also seeds the request)")
    sampling.add_argument("--max-tokens", type=_whole, default=128, metavar="N", help="longest answer (128)")
    sampling.add_argument("--temperature", type=_number, default=0.0, metavar="X", help="0, the default, is greedy")
    sampling.add_argument("--top-p", type=_number, default=1.0, metavar="X", help="nucleus to sample from (1)")
    sampling.add_argument("--top-k", type=_whole, default=-1, metavar="N", help="tokens to sample from (-1: all)")
    add_config_flags(generate)
    generate.set_defaults(run=run)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer") from None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number")
    return number


def run(arguments: argparse.Namespace) -> None:
    flags = config_flags(arguments)
    config = load_config(arguments.config, flags).resolve()
    for path in arguments.image:
        if not os.path.isfile(path):
            raise ConfigError("must be an existing file", field="image", value=path, source="--image")
    params = _sampling_params(arguments, seed=config.model.seed if "seed" in flags else None)
    pictures = _open_pictures(arguments.image, config)
    print(_answer(config, arguments.prompt, pictures, params, progress=not arguments.no_progress))


def _sampling_params(arguments: argparse.Namespace, *, seed: int | None) -> SamplingParams:
    from dist_vlm import SamplingParams

    try:
        return SamplingParams(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _open_pictures(paths: list[str], config: EngineConfig) -> list[Any]:
    from dist_vlm.media import load_image

    return [load_image(path, max_pixels=config.vision.max_image_pixels) for path in paths]


def _inputs(tokenizer: Any, image_token_id: int | None, prompt: str, pictures: list[Any]) -> TextPrompt:
    """The prompt as typed where it places its pictures, else as one turn of the checkpoint's chat template."""
    if not pictures:
        return {"prompt": prompt}
    if image_token_id is not None and tokenizer.convert_ids_to_tokens(image_token_id) not in prompt:
        prompt = _chat_turn(tokenizer, prompt, len(pictures))
    return {"prompt": prompt, "multi_modal_data": {"image": pictures}}


def _chat_turn(tokenizer: Any, text: str, num_pictures: int) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the checkpoint has no chat template: mark the place of each picture in --prompt with <image>")
    content = [{"type": "image"}] * num_pictures + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    turn: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return turn


def _answer(config: EngineConfig, prompt: str, pictures: list[Any], params: SamplingParams, *, progress: bool) -> str:
    from tqdm import tqdm

    from dist_vlm import LLM

    with tqdm(
        total=params.max_tokens, desc="starting", unit="tok", file=sys.stderr, disable=not progress, mininterval=0.2
    ) as bar:
        llm = LLM.from_config(config)
        try:
            inputs = _inputs(llm.get_tokenizer(), config.vision.image_token_id, prompt, pictures)
            return _stream(llm, inputs, params, bar)
        finally:
            llm.shutdown()


def _stream(llm: LLM, inputs: TextPrompt, params: SamplingParams, bar: Any) -> str:
    """Follows the growing answer with the bar and returns its final text."""
    bar.reset()  # so that the rate leaves the start out
    bar.set_description("generating")
    text = ""
    for output in llm.stream(inputs, params):
        answer = output.outputs[0]
        text = answer.text
        bar.update(len(answer.token_ids) - bar.n)
    bar.set_description("done")
    return text
