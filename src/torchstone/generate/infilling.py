"""Prompts for what stands between two texts, as the run was trained to be asked."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.data import Tokenizer
from torchstone.data.infilling import InfillingDataSpec, Mode, Sentinels, arranged, sentinels_of
from torchstone.errors import TorchstoneError
from torchstone.objectives.pseudo_masked import PseudoMaskedSpec
from torchstone.objectives.pseudo_masked_seq2seq import PseudoMaskedSeq2seqSpec
from torchstone.train.run import RunFolder

__all__ = ["infilling_prompts", "mode_of", "required_sentinels", "stand_in_of"]


def stand_in_of(run: RunFolder) -> int | None:
    """Id of the token that stands in for hidden ones in a run trained with pseudo masks; None for any other run."""
    objective = run.recipe.objective
    if not isinstance(objective, PseudoMaskedSpec | PseudoMaskedSeq2seqSpec):
        return None
    return run.tokenizer().pad if objective.stand_in is None else objective.stand_in


def mode_of(run: RunFolder) -> Mode:
    """The order of parts that a run was trained with; PSM, that of published models, where it does not say."""
    data = run.recipe.data
    return data.mode if isinstance(data, InfillingDataSpec) else "psm"


def required_sentinels(tokenizer: Tokenizer | None) -> Sentinels:
    """The sentinels of a run's vocabulary.

    Raises:
        TorchstoneError: it has none.
    """
    found = None if tokenizer is None else sentinels_of(tokenizer)
    if found is None:
        raise TorchstoneError(
            "infilling: the run's vocabulary has no sentinel tokens; what is trained with data.kind=infilling fills in"
        )
    return found


def infilling_prompts(
    run: RunFolder, tokenizer: Tokenizer | None, prefixes: Sequence[str], suffixes: Sequence[str], tokens: int
) -> list[list[int]]:
    """The ids of each prefix with its suffix: between sentinels, or for a run trained with pseudo masks around as many
    mask tokens as are to be written.

    Args:
        tokens: how many the middle has, where the model must be told.

    Raises:
        TorchstoneError: no sentinel tokens; another number of suffixes than of prefixes.
    """
    masked = stand_in_of(run) is not None
    sentinels, mode = None if masked else required_sentinels(tokenizer), mode_of(run)
    assert tokenizer is not None
    if len(prefixes) != len(suffixes):
        raise TorchstoneError(f"infilling: {len(suffixes)} suffixes for {len(prefixes)} prompts; one each is needed")
    start = tokenizer.front  # as a document begins
    if sentinels is None:
        assert tokenizer.mask is not None
        hole = [tokenizer.mask] * tokens
        return [
            [*start, *tokenizer.encode(prefix), *hole, *tokenizer.encode(suffix)]
            for prefix, suffix in zip(prefixes, suffixes, strict=True)
        ]
    return [
        [*start, *arranged(sentinels, mode, tokenizer.encode(prefix), tokenizer.encode(suffix))]
        for prefix, suffix in zip(prefixes, suffixes, strict=True)
    ]
