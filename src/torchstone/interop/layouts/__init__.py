"""Published checkpoint layouts, one file each, named as `model_type` in their config.json ("-" written "_").

A file defines `LAYOUT`: a table of names, and the config in both directions. `torchstone.interop.layout` reads it.
"""

from __future__ import annotations
