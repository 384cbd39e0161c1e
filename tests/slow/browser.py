"""`make test-slow` runs this: Debian's Chromium is installed where no browser of its kind is on the path."""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Playwright gives it --headless and a profile of its own that is thrown away. Nothing here asks another host for anything.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
NEEDED = f"The slow tests need Chromium or Chrome; install it, so that one of {', '.join(NAMES)} is on the path"


def program() -> str | None:
    """The path of a browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    if shutil.which("apt-get") is None:
        sys.exit(f"{NEEDED}; there is no apt-get here to do it.")
    root = [] if os.geteuid() == 0 else ["sudo"]
    if root and shutil.which("sudo") is None:
        sys.exit(f"{NEEDED}; here it takes root: apt-get install chromium.")
    print("installing Chromium", flush=True)
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run([*root, "apt-get", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{NEEDED}; `apt-get {' '.join(command)}` failed.")
    if program() is None:
        sys.exit(f"{NEEDED}; the package chromium brought none.")


if __name__ == "__main__":
    if program() is None:
        install()
    print("browser:", program())
