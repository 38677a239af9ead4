"""What `torch.compile` needs to know, and whether it can build code on this machine."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["compiler_works", "constant_for_compiler"]

_F = TypeVar("_F", bound=Callable[..., object])


def constant_for_compiler(function: _F) -> _F:
    """Mark a function of constants whose result a compiler may take as a constant instead of looking inside.

    What `torch.compiler.assume_constant_result` does, without the two seconds of importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def compiler_works() -> str | None:
    """None if a C++ compiler works, else why not, for a line that says that compiling steps aside.

    Looks at ``CXX`` first, as Inductor does, and compiles one line to be sure.
    """
    wanted = os.environ.get("CXX")
    command = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if command is None:
        return f"no C++ compiler at CXX={wanted}" if wanted else "no C++ compiler (g++ or clang++) on this machine"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text('#include <cmath>\nextern "C" double probe(double x) { return std::sqrt(x); }\n')
        try:
            result = subprocess.run(
                [command, "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))],
                capture_output=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C++ compiler {command} does not run ({error})"
    return None if result.returncode == 0 else f"the C++ compiler {command} cannot build a shared library"
