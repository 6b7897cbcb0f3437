"""Builds csrc with g++ (a plain C interface, no torch headers) beside the Python packages."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class BuildWithNative(build_py):
    """build_py that first compiles csrc/*.cpp into csrc/libwizard.so."""

    def run(self) -> None:
        sys.path.insert(0, str(ROOT))
        import csrc

        csrc.build()
        super().run()


def has_compiler() -> bool:
    return subprocess.run(["g++", "--version"], capture_output=True).returncode == 0


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithNative})
