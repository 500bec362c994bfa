"""The OpenAI-compatible server, started as vLLM 0.5.0 starts its own:

python -m dist_vlm.entrypoints.openai.api_server --model DIR --image-input-type pixel_values ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dist_vlm.command_line import run_command
from dist_vlm.config_load import load_config
from dist_vlm.entrypoints.openai.cli_args import parse_args
from dist_vlm.entrypoints.start import start_server


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: this process's own) and returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: start_server(load_config(None, parse_args(words))))


if __name__ == "__main__":
    sys.exit(main())
