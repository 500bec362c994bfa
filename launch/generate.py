"""`dist-vlm generate`: pictures and a prompt in, one answer out; or a file of requests in, a file of answers out."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dist_vlm.config import RULES, ConfigError, EngineConfig
from dist_vlm.config_load import add_config_flags, config_flags, load_config
from dist_vlm.launch.batch import Batch
from dist_vlm.launch.jsonl import read_lines
from dist_vlm.launch.jsonl_output import AnswerFile
from dist_vlm.launch.line_source import LineParts, part_size
from dist_vlm.launch.local_media import LocalMedia
from dist_vlm.launch.prompts import with_pictures
from dist_vlm.launch.remote_media import FLAGS, RemoteMedia

if TYPE_CHECKING:
    from dist_vlm import LLM, SamplingParams
    from dist_vlm.config_server import ServerConfig
    from dist_vlm.inputs import PromptInputs
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.jsonl_request import RequestReader
    from dist_vlm.launch.line_table import AnsweredLine
    from dist_vlm.launch.picture_setup import PictureSetup

_TEXT = """\
Answers one prompt (--prompt), or each line of a file of requests (--input).

One prompt: <image> in it marks the place of each picture, in order, and the prompt is then taken as it stands;
pictures without it go before the text in the chat template. The answer is printed.

A file: each line is a JSON object.
  prompt    the text, as for --prompt
  images    its pictures: names of files, http(s) or data: URLs. Names start at the directory of the input, or at
            --media-root, and no file outside of it is opened. URLs are fetched from public addresses alone, unless
            --allowed-media-networks says otherwise.
  messages  in place of both: a conversation in OpenAI's form, an image_url being such a name or URL
  id        a string or an integer, given back with the answer (without it: the number of the line). Ids may repeat.
  and any field of SamplingParams by its name; what a line does not set is as the flags say.
Each answer is one line of --output, written as it ends: {"id", "index": number of the line, "text", "token_ids",
"finish_reason", "stop_reason", "usage"}; where n is above 1, "outputs" is a list of such answers; with logprobs,
"logprobs" and "cumulative_logprob". A wrong line gets {"id", "index", "error"}, and the others are answered.

A run that ended early, however it ended, goes on with --resume: lines that have an answer are left alone, each other
line gets one. An error is an answer too; to have such a line tried again, take its answer out of the output.

With --replicas above 1 the lines are spread over so many engines, on the machines of the Ray cluster (--ray-address).
Pictures are then read by tasks on all of them: names of files must lead to the same files everywhere."""


def add_command(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="answer one prompt, or a file of them",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    generate.add_argument("--config", metavar="FILE", help="YAML file; without it --model is needed")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text of one prompt; see above")
    source.add_argument("--input", metavar="FILE", help="requests, one JSON object a line; see above")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    generate.add_argument("--output", metavar="FILE", help="with --input: where the answers go, a new file")
    generate.add_argument("--resume", action="store_true", help="with --input: go on with the --output that is there")
    generate.add_argument("--media-root", metavar="DIR", help="with --input: where its pictures are (beside the input)")
    generate.add_argument("--no-progress", action="store_true", help="show no progress bar")
    sampling = generate.add_argument_group("sampling (--seed, below, also seeds the request)")
    sampling.add_argument("--max-tokens", type=_whole, default=128, metavar="N", help="longest answer (128)")
    sampling.add_argument("--temperature", type=_number, default=0.0, metavar="X", help="0, the default, is greedy")
    sampling.add_argument("--top-p", type=_number, default=1.0, metavar="X", help="nucleus to sample from (1)")
    sampling.add_argument("--top-k", type=_whole, default=-1, metavar="N", help="tokens to sample from (-1: all)")
    add_config_flags(generate, (*RULES, *FLAGS))
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
    check_flags(arguments)
    _check_files(arguments)
    loaded = load_config(arguments.config, flags)
    # More than `replicas` are for a server, which adds them as the load asks for it.
    config = loaded.resolve().replace(max_replicas=None)
    params = _sampling_params(arguments, seed=config.model.seed if "seed" in flags else None)
    if arguments.input is not None:
        try:
            _answer_file(arguments, config, loaded.resolve_server(os.environ), params)
        except ConfigError as error:
            raise loaded.located(error) from None
        return
    pictures = _open_pictures(arguments.image, config)
    print(_answer(config, arguments.prompt, pictures, params, progress=not arguments.no_progress))


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for flags that do not go together, whatever files there are."""
    _sampling_params(arguments, seed=None)
    if arguments.input is None:
        flags = config_flags(arguments)
        for flag, value in (
            ("output", arguments.output),
            ("resume", arguments.resume),
            ("media-root", arguments.media_root),
            *((name.replace("_", "-"), name in flags) for name in FLAGS),
        ):
            if value:
                raise ConfigError(f"--{flag} goes with --input, and there is none")
    elif arguments.image:
        raise ConfigError("--image goes with --prompt; with --input each line names its own pictures")
    elif arguments.output is None:
        raise ConfigError("--input needs --output FILE, where the answers go")


def _check_files(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for files that are not there."""
    for path in arguments.image:
        _check(os.path.isfile(path), "must be an existing file", "image", path)
    if arguments.input is None:
        return
    _check(os.path.isfile(arguments.input), "must be an existing file", "input", arguments.input)
    root = arguments.media_root
    _check(root is None or os.path.isdir(root), "must be an existing directory", "media-root", root)
    same = os.path.exists(arguments.output) and os.path.samefile(arguments.input, arguments.output)
    _check(not same, "must be another file than --input", "output", arguments.output)


def _check(holds: bool, problem: str, name: str, value: Any) -> None:
    if not holds:
        raise ConfigError(problem, field=name, value=value, source=f"--{name}")


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


# ---- one prompt ----


def _open_pictures(paths: list[str], config: EngineConfig) -> list[Any]:
    from dist_vlm.media import load_image

    return [load_image(path, max_pixels=config.vision.max_image_pixels) for path in paths]


def _answer(config: EngineConfig, prompt: str, pictures: list[Any], params: SamplingParams, *, progress: bool) -> str:
    from tqdm import tqdm

    from dist_vlm import LLM
    from dist_vlm.engine.front import load_chat

    with tqdm(
        total=params.max_tokens, desc="starting", unit="tok", file=sys.stderr, disable=not progress, mininterval=0.2
    ) as bar:
        llm = LLM.from_config(config)
        try:
            inputs = with_pictures(load_chat(config, llm.get_tokenizer()), prompt, pictures)
            return _stream(llm, inputs, params, bar)
        finally:
            llm.shutdown()


def _stream(llm: LLM, inputs: PromptInputs, params: SamplingParams, bar: Any) -> str:
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


# ---- a file of requests ----


def _answer_file(
    arguments: argparse.Namespace, config: EngineConfig, server: ServerConfig, defaults: SamplingParams
) -> None:
    from tqdm import tqdm

    from dist_vlm.launch.jsonl_request import RequestReader
    from dist_vlm.launch.picture_setup import PictureSetup

    path = Path(arguments.input)
    root = Path(arguments.media_root or path.parent).resolve()
    local = LocalMedia(root, max_pixels=config.vision.max_image_pixels)
    remote = RemoteMedia(server)  # before anything starts: it checks the hosts
    # A line is at least one byte long.
    answers = AnswerFile(arguments.output, max_index=path.stat().st_size, resume=arguments.resume)
    with closing(answers), path.open("rb") as file:
        if answers.num_answered:
            answers.check_belongs_to(read_lines(file))
            file.seek(0)
        with tqdm(
            desc="starting",
            initial=answers.num_answered,
            unit="line",
            file=sys.stderr,
            disable=arguments.no_progress,
            mininterval=0.2,
        ) as bar:
            batch = Batch(answers, bar=bar)
            reader = RequestReader(vision=config.vision, defaults=defaults, seed=config.model.seed)
            try:
                if config.parallel.replicas == 1:
                    _answer_lines(config, batch, read_lines(file), reader, local, remote, bar=bar)
                else:
                    _spread_lines(config, batch, file, reader, PictureSetup(config, server, str(root)), bar=bar)
            finally:
                bar.close()
                if batch.num_answered or not sys.exc_info()[0]:
                    failed = f", {batch.num_failed} of them with an error" if batch.num_failed else ""
                    print(f"dist-vlm: {batch.num_answered} lines answered{failed}", file=sys.stderr)


def _answer_lines(
    config: EngineConfig,
    batch: Batch,
    lines: Iterator[Line],
    reader: RequestReader,
    local: LocalMedia,
    remote: RemoteMedia,
    *,
    bar: Any,
) -> None:
    """By one engine, in this process."""
    from dist_vlm import AsyncLLM
    from dist_vlm.launch.line_answers import LineAnswers
    from dist_vlm.launch.line_pictures import LinePictures, image_preparer

    async def run() -> None:
        pictures = LinePictures(image_preparer(config), config=config, local=local, remote=remote)
        try:
            asking = LineAnswers(llm, reader)
            await batch.run(lines, lambda line: asking.answer(line, pictures), most_at_once=asking.most_at_once)
        finally:
            await pictures.close()

    llm = AsyncLLM.from_config(config)
    try:
        bar.set_description("answering")
        asyncio.run(run())
    finally:
        llm.shutdown()


def _spread_lines(
    config: EngineConfig, batch: Batch, file: BinaryIO, reader: RequestReader, setup: PictureSetup, *, bar: Any
) -> None:
    """By several replicas, through Ray Data. Raises `RuntimeError` if lines are left without an answer."""
    missing = [name for name in ("pyarrow", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise RuntimeError(f"Ray Data, which several replicas need, lacks {names}: pip install 'dist-vlm[cluster]'")
    from dist_vlm.launch.batch_data import answer_by_replicas

    def write(answered: AnsweredLine) -> None:
        # Ray tries tasks again whose machine is lost, and a line may come twice.
        if not batch.has(answered.line.index):
            batch.write(answered.line, answered.answer)

    size = part_size(sum(1 for _ in file))
    file.seek(0)
    parts = LineParts(file, batch.has, size=size)
    if len(parts):
        answer_by_replicas(
            config,
            path=file.name,
            parts=parts,
            reader=reader,
            setup=setup,
            on_start=lambda: bar.set_description("answering"),
            write=write,
        )
    if missing_lines := parts.num_lines - batch.num_answered:
        raise RuntimeError(f"{missing_lines} lines of the input have no answer; --resume tries them again")
