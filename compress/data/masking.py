"""Hiding tokens of a text, for a model that is trained to say which they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.errors import StageFailed
from compress.models.folder import NO_MASK_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int64]
SHARE = 0.15
"""Of a text's tokens, chosen to be asked for."""
_MASKED, _REPLACED = 0.8, 0.1
"""Of the chosen ones: shown as the mask token, and as any other token. The rest is shown as it is."""


@dataclass(frozen=True)
class Masking:
    """BERT's: Devlin et al. (2019), sec. 3.1; with other tokens for every pass over a text, as RoBERTa has it.

    plain: the ids, sorted, of the tokens that may be chosen and may take another's place: all but the special ones.
    """

    mask_id: int
    plain: Ids

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Masking:
        """That of a model of `vocab_size` embeddings. Raises StageFailed where its tokenizer has no mask token."""
        mask_id = tokenizer.mask_token_id
        if not isinstance(mask_id, int) or mask_id == tokenizer.unk_token_id or mask_id >= vocab_size:
            raise StageFailed("tokenizer", *NO_MASK_TOKEN)
        known = {id_ for id_ in tokenizer.get_vocab().values() if id_ < vocab_size}
        return cls(mask_id, np.array(sorted(known - {*tokenizer.all_special_ids}), np.int64))

    def maskable(self, blocks_NT: Ids) -> Ids:
        """The blocks that have a token to ask for. Raises StageFailed where none has."""
        found = np.isin(blocks_NT, self.plain).any(1)
        if not found.any():
            raise StageFailed("data", "holds no token but special ones", "is the tokenizer the model's own?")
        return blocks_NT[found]

    def hide(self, ids_T: Ids, seed: tuple[int, ...]) -> tuple[Ids, NDArray[np.bool_]]:
        """What is shown of a text, (T,), and where it is asked what stood there, (T,).

        At one place or more, where any may be chosen. The same seed hides the same.
        """
        drawn = np.random.default_rng(seed)
        places = np.flatnonzero(np.isin(ids_T, self.plain))
        num = min(len(places), max(1, round(SHARE * len(places))))
        chosen = drawn.choice(places, num, replace=False)
        fate = drawn.random(num)
        shown_T, asked_T = ids_T.copy(), np.zeros(len(ids_T), np.bool_)
        shown_T[chosen[fate < _MASKED]] = self.mask_id
        replaced = chosen[(fate >= _MASKED) & (fate < _MASKED + _REPLACED)]
        shown_T[replaced] = drawn.choice(self.plain, len(replaced))
        asked_T[chosen] = True
        return shown_T, asked_T
