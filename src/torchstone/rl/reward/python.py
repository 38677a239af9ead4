"""A function of the user's own: ``file.py:function``, called as ``function(text, row)``."""

from __future__ import annotations

import runpy
from pathlib import Path

from pydantic import Field

from torchstone.errors import TorchstoneError
from torchstone.rl.reward import Reward, RewardSpec

__all__ = ["PythonSpec"]


class PythonSpec(RewardSpec):
    """What a function of one's own gives for the text and the prompt's fields: a number, or None."""

    function: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")
    """The function, as ``file.py:name``; the file is run once."""

    def build(self) -> Reward:
        file, _, name = self.function.rpartition(":")
        if not Path(file).is_file():
            raise TorchstoneError(f"reward python: no such file {file!r}")
        try:
            found = runpy.run_path(file)
        except Exception as error:
            raise TorchstoneError(f"reward python: {file!r} cannot be run ({type(error).__name__}: {error})") from None
        if not callable(found.get(name)):
            raise TorchstoneError(f"reward python: {file!r} has no function {name!r}")
        return found[name]
