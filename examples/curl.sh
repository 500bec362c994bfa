#!/usr/bin/env bash
# Asks a running server about a picture, and streams the answer, with curl alone.
#
#   examples/curl.sh PICTURE "What is in this picture?"
#
# BASE_URL (http://localhost:8000/v1), MODEL (the first that the server has) and API_KEY (none) may be set.
set -euo pipefail

picture=${1:?a picture is needed: examples/curl.sh PICTURE QUESTION}
question=${2:-What is in this picture?}
base_url=${BASE_URL:-http://localhost:8000/v1}
headers=(--header "Content-Type: application/json" --header "Authorization: Bearer ${API_KEY:-EMPTY}")

# A JSON string of a line of text.
quoted() { printf '"%s"' "$(printf '%s' "$1" | sed 's/\\/\\\\/g; s/"/\\"/g')"; }

first_model() {
    curl --silent --show-error --fail "${headers[@]}" "$base_url/models" |
        grep --only-matching '"id": *"[^"]*"' | sed --quiet '1s/^"id": *"\(.*\)"$/\1/p'
}

model=${MODEL:-$(first_model)}
extension=${picture##*.}
type=image/${extension/jpg/jpeg}

# A picture is too long for a command line: the body goes through a pipe.
{
    printf '{"model": %s, "temperature": 0, "max_tokens": 128, "stream": true, "messages": [{"role": "user", ' "$(quoted "$model")"
    printf '"content": [{"type": "text", "text": %s}, ' "$(quoted "$question")"
    printf '{"type": "image_url", "image_url": {"url": "data:%s;base64,' "$type"
    base64 --wrap=0 "$picture"
    printf '"}}]}]}'
} | curl --silent --show-error --fail-with-body --no-buffer "${headers[@]}" --data-binary @- "$base_url/chat/completions"
