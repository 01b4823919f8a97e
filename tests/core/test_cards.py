"""Graphics cards: every row has its source, however its name is spelled."""

import pytest

from glmlab.core.cards import CardError, cards, find_card


def test_cards_have_sources_and_sizes():
    assert len(cards()) >= 15
    assert all(card.source and 4000 < card.memory_mib < 200_000 for card in cards().values())
    assert all(isinstance(card.memory_mib, int) for card in cards().values())
    assert cards()["RTX 3060"].cuda_context_mib is None


def test_a_card_is_found_by_the_drivers_name_and_missing_ones_are_named():
    assert find_card("NVIDIA GeForce RTX 4060 Laptop GPU").name == "RTX 4060 Laptop"
    assert find_card(find_card("rtx4060")).name == "RTX 4060"
    with pytest.raises(CardError, match=r"no card 'RTX 1'.*RTX 4090"):
        find_card("RTX 1")
