"""Models that are no Transformer: image classifiers, with or without a head that says how far to trust them.

`_classifier` holds what they share: what they give, batch normalisation, the auxiliary head.
"""

from __future__ import annotations
