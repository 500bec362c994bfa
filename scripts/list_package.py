"""Checks what a wheel and an sdist hold: every module of every floor and the files that modules read, once, as plain
files, under dist_vlm/ alone.

Run as `python scripts/list_package.py dist/x.whl dist/x.tar.gz`.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

FLOORS = ("workers", "kernels", "launch")
PATTERNS = ("*.py", "*.cpp", "*.h", "*.jinja", "dist_vlm/server/static/*")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    wheel, sdist = sys.argv[1:]
    with zipfile.ZipFile(wheel) as archive:
        links = [entry.filename for entry in archive.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]
        _check(wheel, set(archive.namelist()), links)
        top = {name.split("/")[0] for name in archive.namelist()}
    if stray := {name for name in top if name != "dist_vlm" and not name.endswith(".dist-info")}:
        sys.exit(f"{wheel} installs {', '.join(sorted(stray))} at the top level")
    with tarfile.open(sdist) as archive:
        links = [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
        _check(sdist, {name.partition("/")[2] for name in archive.getnames()}, links)


def _check(package: str, names: set[str], links: list[str]) -> None:
    needed = _needed()
    missing = sorted(needed - names)
    if links or missing:
        sys.exit(f"{package}: links {links}, missing {missing}")
    print(f"{Path(package).name}: {len(names)} entries, {len(needed)} modules and files that they read, no links")


def _needed() -> set[str]:
    """Every module in the tree and every file that one reads, under the name it has below dist_vlm/."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *PATTERNS]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    files = [file for file in files if (ROOT / file).exists()]
    floors = {f"dist_vlm/{file}" for file in files if file.split("/")[0] in FLOORS}
    return floors | {file for file in files if file.startswith("dist_vlm/")}


if __name__ == "__main__":
    main()
