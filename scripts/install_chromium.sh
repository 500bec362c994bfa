#!/usr/bin/env bash
# Installs Debian's Chromium and its driver, for the test of the server's page. Does nothing where both are there.
#
#   scripts/install_chromium.sh
#
# Needs root, Debian's packages and a network. Without them it says so in one line and ends with status 1.
set -euo pipefail

browser=/usr/bin/chromium
driver=/usr/bin/chromedriver
if [[ -x $browser && -x $driver ]]; then exit 0; fi

give_up() { # WHY
    echo "$0: $browser and $driver are not installed: $1" >&2
    exit 1
}

[[ $(id -u) -eq 0 ]] || give_up "only root may install them"
command -v apt-get >/dev/null || give_up "there is no apt-get here"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { # ARGUMENTS...
    DEBIAN_FRONTEND=noninteractive timeout 300 \
        apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=1 "$@" >"$log" 2>&1 ||
        give_up "apt-get $1 failed: $(tail -n 1 "$log")"
}
apt update
apt install --yes --no-install-recommends chromium chromium-driver
[[ -x $browser && -x $driver ]] || give_up "these packages hold no such programs"
