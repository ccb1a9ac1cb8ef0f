"""Hidden tokens: how many, as what, which never, and the same again by the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compress.data.masking import Masking
from compress.errors import StageFailed
from compress.models.folder import lacks_mask_token
from compress.models.load import load_tokenizer
from pico import VOCAB_SIZE, make_pico

SPECIAL, MASK = 0, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico("bert", tmp_path_factory.mktemp("masked") / "model", architecture="BertForMaskedLM")


@pytest.fixture(scope="module")
def masking(folder: Path) -> Masking:
    return Masking.of(load_tokenizer(folder), VOCAB_SIZE)


def test_a_share_is_asked_for_and_shown_as_the_mask_as_another_token_or_as_it_is(masking: Masking) -> None:
    ids_T = np.random.default_rng(0).integers(0, VOCAB_SIZE, 40_000)
    shown_T, asked_T = masking.hide(ids_T, (0, 0))
    plain_T = ids_T > MASK
    assert asked_T.sum() == round(0.15 * plain_T.sum())
    assert not asked_T[~plain_T].any()
    assert (shown_T[~asked_T] == ids_T[~asked_T]).all()
    given, true = shown_T[asked_T], ids_T[asked_T]
    assert (given == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (given == true).mean() == pytest.approx(0.1, abs=0.02)
    replaced = given[(given != MASK) & (given != true)]
    assert len(replaced) / len(given) == pytest.approx(0.1, abs=0.02)
    assert replaced.min() > MASK
    assert len(np.unique(replaced)) > VOCAB_SIZE / 2
    places = np.flatnonzero(asked_T)
    assert np.histogram(places, 10, (0, len(ids_T)))[0] == pytest.approx(len(places) / 10, rel=0.15)


def test_the_same_seed_hides_the_same_and_another_something_else(masking: Masking) -> None:
    ids_T = np.arange(2, 200)
    first, again, other = (masking.hide(ids_T, seed) for seed in ((3, 7), (3, 7), (3, 8)))
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert (first[1] != other[1]).any()
    assert (ids_T == np.arange(2, 200)).all(), "the text itself stays"


def test_something_is_asked_for_in_short_texts_and_nothing_where_nothing_may_be(masking: Masking) -> None:
    _, asked_T = masking.hide(np.array([SPECIAL, 9, MASK]), (0,))
    assert asked_T.tolist() == [False, True, False]
    shown_T, asked_T = masking.hide(np.array([SPECIAL, SPECIAL]), (0,))
    assert shown_T.tolist() == [SPECIAL, SPECIAL]
    assert not asked_T.any()
    blocks_NT = np.array([[SPECIAL, SPECIAL], [SPECIAL, 5]])
    assert masking.maskable(blocks_NT).tolist() == [[SPECIAL, 5]]
    with pytest.raises(StageFailed, match="no token but special ones"):
        masking.maskable(blocks_NT[:1])


def test_a_tokenizer_without_a_mask_token_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    without = make_pico("bert", tmp_path / "without")
    assert (lacks_mask_token(without), lacks_mask_token(folder)) == (True, False)
    for tokenizer, size in ((load_tokenizer(without), VOCAB_SIZE), (load_tokenizer(folder), MASK)):
        with pytest.raises(StageFailed, match=r"no mask token .* name it as mask_token in tokenizer_config\.json"):
            Masking.of(tokenizer, size)
    file = without / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "BertTokenizer"}))
    assert not lacks_mask_token(without), "that class has one where nothing is said"
