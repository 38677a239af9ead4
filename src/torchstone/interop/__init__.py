"""Models from elsewhere, and ours for elsewhere: Hugging Face checkpoints, in and out.

`layout` holds the machinery, `layouts` one file per published layout. Neither needs `transformers`: a checkpoint is a
`config.json` and named tensors.
"""

from __future__ import annotations
