"""Asks a running server about a picture, with OpenAI's own client: pip install openai

python examples/openai_vision_client.py --image PICTURE --question "What's in this image?" [--stream]

PICTURE is a file, which is sent along, or a URL, which the server fetches.
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
from pathlib import Path
from typing import Any

from openai import OpenAI


def url_of(image: str) -> str:
    """An http(s) or data: URL as it is; a file as a data: URL."""
    if image.startswith(("http://", "https://", "data:")):
        return image
    kind = mimetypes.guess_type(image)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def messages_of(image: str, question: str) -> list[Any]:
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url_of(image)}}]
    return [{"role": "user", "content": content}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://localhost:8000/v1", metavar="URL")
    parser.add_argument("--api-key", default="EMPTY", metavar="KEY", help="the server's key, where it asks for one")
    parser.add_argument("--model", metavar="NAME", help="the model's name (the first that the server has)")
    parser.add_argument("--image", required=True, metavar="PICTURE")
    parser.add_argument("--question", default="What's in this image?")
    parser.add_argument("--stream", action="store_true", help="print the answer as it grows")
    arguments = parser.parse_args()
    client = OpenAI(api_key=arguments.api_key, base_url=arguments.base_url)
    model = arguments.model or client.models.list().data[0].id
    messages = messages_of(arguments.image, arguments.question)
    if not arguments.stream:
        chat_response = client.chat.completions.create(model=model, messages=messages)
        print("Chat response:", chat_response.choices[0].message.content)
        return
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
