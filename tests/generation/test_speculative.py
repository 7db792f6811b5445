"""Speculative decoding gives the tokens of plain decoding, whatever the drafts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from speechlm2_jax.generation.drafts import DraftText, Known, LookupDrafter, TextDrafter
from speechlm2_jax.generation.processors import (
    ForcedEnd,
    MinNewTokens,
    NoRepeatNgrams,
    RepetitionPenalty,
    Temperature,
)
from speechlm2_jax.layers.module import merge
from speechlm2_jax.llm.config import DecoderConfig, LayerKind
from speechlm2_jax.llm.decoder import Decoder
from tests.generation.speculative_case import (
    CLASSES,
    CONFIG,
    DRAFTED,
    GREEDY,
    NARROW,
    NEW,
    PROMPTS,
    VOCABULARY,
    WIDTH,
    Case,
    padded,
)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(CONFIG)


@pytest.fixture(scope="module")
def plain(case: Case) -> np.ndarray:
    """The greedy responses."""
    return np.asarray(case.run(GREEDY).ids)


def random_drafts(right: np.ndarray, seed: int) -> DraftText:
    """Right, half right, wrong and empty drafts, with tokens replaced, left out and added."""
    draw = np.random.default_rng(seed)
    drafts = []
    for n, row in enumerate(right.tolist()):
        kind = (n + seed) % 6
        ids = row[: draw.integers(1, NEW + 1)]
        if kind == 1:
            ids = ids[: len(ids) // 2] + draw.integers(0, VOCABULARY, 5).tolist()
        elif kind == 2:
            ids = draw.integers(0, VOCABULARY, draw.integers(0, NEW)).tolist()
        elif kind == 3:
            ids = [i for i in ids if draw.random() > 0.3]
        elif kind == 4:
            ids = [i if draw.random() > 0.3 else 29 for i in [17, *ids]]
        elif kind == 5:
            ids = []
        drafts.append(ids)
    return padded(drafts, WIDTH)


def test_tokens_are_those_of_plain_decoding_for_any_draft(case: Case, plain: np.ndarray) -> None:
    for seed in range(40):
        output = case.run(DRAFTED, drafts=random_drafts(plain, seed))
        np.testing.assert_array_equal(output.ids, plain)
        assert np.all(np.asarray(output.accepted) <= np.asarray(output.drafted))


def test_right_drafts_are_accepted_whole_and_wrong_ones_not_at_all(
    case: Case, plain: np.ndarray
) -> None:
    right = case.run(DRAFTED, drafts=padded(plain.tolist(), WIDTH))
    # 1 token from the prompt, then 5 per pass: 4 of the draft and one after them
    assert np.asarray(right.drafted).tolist() == [4 + 4 + 0] * len(plain)
    np.testing.assert_array_equal(right.accepted, right.drafted)
    never = next(i for i in range(1, VOCABULARY) if i not in plain)
    wrong = case.run(DRAFTED, drafts=padded([[never] * NEW] * len(plain), WIDTH))
    assert np.asarray(wrong.drafted).min() > 0 == np.asarray(wrong.accepted).max()
    # drafts of 4 tokens after 1, 2 and 3 tokens; then they are given up, but for 4 and 8 tokens
    assert np.asarray(wrong.drafted).max() <= 5 * 4
    np.testing.assert_array_equal(wrong.ids, plain)


def test_stop_tokens_and_limits_inside_a_draft_end_the_response(
    case: Case, plain: np.ndarray
) -> None:
    stops = (int(plain[0, 5]), int(plain[1, 6]), int(plain[2, 0]))
    limits = jnp.asarray([NEW, NEW, NEW, 3, 4, 1])
    expected = case.run(replace(GREEDY, stop_ids=stops), limits=limits)
    drafts = padded(plain.tolist(), WIDTH)
    output = case.run(replace(DRAFTED, stop_ids=stops), limits=limits, drafts=drafts)
    np.testing.assert_array_equal(output.ids, expected.ids)
    np.testing.assert_array_equal(output.lengths, expected.lengths)
    assert np.asarray(output.ended).all()
    assert len(set(np.asarray(output.lengths).tolist())) > 3


HELLO, WORLD, HOW, ARE, YOU, LLO, COMMA, CAPITAL_HELLO, CAPITAL_HOW, OTHER = range(1, 11)
WORD_CLASSES = np.array([0, 3, 5, 7, 9, 11, 12, 0, 3, 7, 15], np.int32)
"""Of a vocabulary in which `LLO` is the middle of a word, and capitals have twins without."""


@pytest.mark.parametrize(
    ("response", "next_tokens"),
    [
        ([], [HELLO, WORLD, HOW, ARE]),
        ([CAPITAL_HELLO], [WORLD, HOW, ARE, YOU]),
        ([CAPITAL_HELLO, COMMA], [WORLD, HOW, ARE, YOU]),
        ([CAPITAL_HELLO, COMMA, WORLD, COMMA, CAPITAL_HOW], [ARE, YOU]),
        ([HELLO, OTHER], [HOW, ARE, YOU]),  # another word
        ([HELLO, HOW], [ARE, YOU]),  # the draft has a word too many
        ([HELLO, OTHER, WORLD], [HOW, ARE, YOU]),  # it lacks one
        ([OTHER, LLO], [WORLD, HOW, ARE, YOU]),  # a word in other tokens
        ([HELLO, WORLD, HOW, ARE, YOU], []),
    ],
)
def test_a_draft_resumes_at_the_word_that_aligns(response, next_tokens) -> None:
    drafter = TextDrafter(tokens=4, classes=WORD_CLASSES)
    state = drafter.start(padded([[HELLO, WORLD, HOW, ARE, YOU]], 7), NEW)
    ids, lengths = (jnp.asarray(x) for x in padded([response], 6))
    state = drafter.observe(state, ids, lengths)
    found, _ = drafter.propose(state, Known(ids, lengths, choose=None))
    assert np.asarray(found.ids)[0, : int(found.lengths[0])].tolist() == next_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "processors",
    [
        (RepetitionPenalty(1.7), NoRepeatNgrams(2)),
        (MinNewTokens(7, np.arange(12, 20)), ForcedEnd(np.array([5]))),
    ],
)
def test_processors_read_the_draft_before_each_position(case: Case, processors) -> None:
    config = replace(GREEDY, stop_ids=tuple(range(12, 20)), processors=processors)
    expected = case.run(config)
    drafted = replace(config, drafter=DRAFTED.drafter)
    for seed in range(6):
        drafts = random_drafts(np.asarray(expected.ids), seed)
        output = case.run(drafted, drafts=drafts)
        np.testing.assert_array_equal(output.ids, expected.ids)
        assert int(np.sum(output.accepted)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [NARROW, replace(CONFIG, pattern=(LayerKind(window=3),))])
def test_windows_and_chunks_forget_rejected_tokens(config: DecoderConfig) -> None:
    case = Case(config)
    expected = np.asarray(case.run(GREEDY).ids)
    for seed in range(12):
        output = case.run(DRAFTED, drafts=random_drafts(expected, seed))
        np.testing.assert_array_equal(output.ids, expected)
    assert int(np.sum(output.accepted)) > 0


def test_prompt_lookup_copies_what_followed_the_same_tokens() -> None:
    drafter = LookupDrafter(tokens=3, ngram=2)
    prompt = padded([[5, 6, 7, 8, 9], [1, 2], [4, 4, 5]])
    response = jnp.asarray([[3, 5, 6, 0, 0], [7, 1, 3, 0, 0], [9, 8, 0, 0, 0]])
    known = Known(response, jnp.asarray([3, 2, 2]), choose=None)
    found, _ = drafter.propose(drafter.start(prompt, NEW), known)
    assert np.asarray(found.lengths).tolist() == [3, 3, 0]
    assert np.asarray(found.ids)[0].tolist() == [7, 8, 9]
    assert np.asarray(found.ids)[1].tolist() == [2, 7, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CONFIG, NARROW, replace(CONFIG, pattern=(LayerKind(window=3),))]
)
def test_slots_give_the_tokens_of_plain_decoding(config: DecoderConfig) -> None:
    """Sequences come and go, and a slot holds what a longer one left behind."""
    case = Case(config)
    stops = np.asarray(case.run(GREEDY).ids)[:3, 6]
    asked = replace(GREEDY, stop_ids=tuple(int(i) for i in stops))
    plain = case.run(asked)
    lengths = np.asarray(plain.lengths)
    expected = {n: ids[: lengths[n]].tolist() for n, ids in enumerate(np.asarray(plain.ids))}
    assert len(set(lengths.tolist())) > 1
    for seed in range(4):
        drafts = random_drafts(np.asarray(plain.ids), seed)
        drafted = replace(asked, drafter=DRAFTED.drafter)
        assert case.run_in_slots(drafted, drafts) == expected
    looked_up = replace(asked, drafter=LookupDrafter(tokens=5))
    assert case.run_in_slots(looked_up, padded(PROMPTS)) == expected
    for layers in (config.layers, config.layers + 1):
        drafter, prompts = case.draft_llm(replace(config, layers=layers), 3)
        assert case.run_in_slots(replace(asked, drafter=drafter), prompts) == expected


@pytest.mark.slow
def test_prompt_lookup_gives_the_same_tokens(case: Case, plain: np.ndarray) -> None:
    config = replace(GREEDY, drafter=LookupDrafter(tokens=5))
    for text in (padded(PROMPTS), DraftText(plain, np.full(len(plain), NEW, np.int32))):
        output = case.run(config, drafts=text)
        np.testing.assert_array_equal(output.ids, plain)
    assert int(np.sum(output.accepted)) > 2 * len(plain)


@pytest.mark.slow
def test_an_llm_proposes_what_it_would_generate_itself(case: Case, plain: np.ndarray) -> None:
    drafter, prompts = case.draft_llm(CONFIG, 3)
    output = case.run(replace(GREEDY, drafter=drafter), drafts=prompts)
    np.testing.assert_array_equal(output.ids, plain)
    # 1 token from the prompt, then 4, 4 and 3: the last pass has room for two drafts
    assert np.asarray(output.drafted).tolist() == [3 + 3 + 2] * len(plain)
    np.testing.assert_array_equal(output.accepted, output.drafted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CONFIG, NARROW, replace(CONFIG, pattern=(LayerKind(window=3),))]
)
def test_another_llm_changes_no_token(config: DecoderConfig) -> None:
    case = Case(config)
    expected = np.asarray(case.run(GREEDY).ids)
    rates = []
    for number, changes in enumerate(
        ({}, dict(layers=4), dict(vocab_size=29), dict(vocab_size=40))
    ):
        drafter, prompts = case.draft_llm(replace(config, **changes), 1 + number)
        if "layers" in changes:  # half of the same layers: some proposals are right
            own = {path: 0.9 * x for path, x in case.network[1].items()}
            grown = {p: jnp.concatenate([x, 0 * x]) for p, x in own.items() if "layers." in p}
            drafter = replace(drafter, variables={**drafter.variables, **own, **grown})
            prompts = prompts._replace(embeds=0.9 * case.prompts.embeds)
        output = case.run(replace(GREEDY, drafter=drafter), drafts=prompts)
        np.testing.assert_array_equal(output.ids, expected)
        rates.append(float(np.sum(output.accepted) / np.sum(output.drafted)))
    assert rates[0] == 1.0 and 0.1 < min(rates) < 0.8


@pytest.mark.slow
def test_sampled_tokens_of_a_draft_llm_have_the_distribution_of_the_model() -> None:
    """Chi-square test; equal random keys make similar scores choose the same token."""
    count, new = 3000, 3
    config = replace(CONFIG, vocab_size=3)
    case = Case(config, [[1, 2, 0]])
    drawn = replace(
        GREEDY, max_new_tokens=new, do_sample=True, return_sequences=count,
        processors=(Temperature(2.0),),
    )  # fmt: skip
    drafter, prompts = case.draft_llm(config, 2)
    drafter = replace(drafter, variables={p: 0.8 * x for p, x in drafter.variables.items()})
    rngs = jax.random.split(jax.random.key(1), 1)
    output = case.run(replace(drawn, drafter=drafter), new, rngs=rngs, drafts=prompts)
    expected = joint_probabilities(case, new, temperature=2.0)
    cells = np.asarray(output.ids) @ (3 ** np.arange(new)[::-1])
    seen = np.bincount(cells, minlength=3**new)
    assert stats.chisquare(seen, expected / expected.sum() * count).pvalue > 0.01
    np.testing.assert_array_equal(output.ids, case.run(drawn, new, rngs=rngs).ids)
    assert 0.6 < np.sum(output.accepted) / np.sum(output.drafted) < 1


@pytest.mark.slow
def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    """Chi-square test of three sampled tokens against the probabilities of full passes."""
    count, new = 3000, 3
    case = Case(replace(CONFIG, vocab_size=3), [[1, 2, 0]])
    config = replace(
        GREEDY, max_new_tokens=new, do_sample=True, return_sequences=count,
        processors=(Temperature(2.0),),
    )  # fmt: skip
    drafter = TextDrafter(tokens=2, classes=CLASSES[:3])
    rngs = jax.random.split(jax.random.key(1), 1)
    output = case.run(
        replace(config, drafter=drafter), new, rngs=rngs, drafts=padded([[0, 0, 1, 2]])
    )
    expected = joint_probabilities(case, new, temperature=2.0)
    cells = np.asarray(output.ids) @ (3 ** np.arange(new)[::-1])
    expected /= expected.sum()
    seen = np.bincount(cells, minlength=3**new)
    assert 0.1 < np.sum(output.accepted) / np.sum(output.drafted) < 0.9
    assert stats.chisquare(seen, expected * count).pvalue > 0.01
    drawn_alone = case.run(config, new, rngs=rngs)
    np.testing.assert_array_equal(output.ids, drawn_alone.ids)


def joint_probabilities(case: Case, new: int, temperature: float) -> np.ndarray:
    """Probability of every sequence of `new` tokens of three, in lexicographic order."""
    decoder: Decoder = merge(*case.network)
    tails = np.stack(np.meshgrid(*[np.arange(3)] * new, indexing="ij"), -1).reshape(-1, new)
    prompt = jnp.repeat(case.prompts.embeds, len(tails), axis=0)
    embeds = jnp.concatenate([prompt, decoder.embed(jnp.asarray(tails))], axis=1)
    shape = embeds.shape[:2]
    hidden = decoder(
        embeds,
        positions=jnp.broadcast_to(jnp.arange(shape[1]), shape),
        segments=jnp.ones(shape, jnp.int32),
        attention_mask=jnp.ones(shape, bool),
    )
    scores = decoder.logits(hidden)[:, prompt.shape[1] - 1 : -1] / temperature
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.asarray(tails)[..., None], -1)
    return np.exp(np.asarray(chosen[..., 0], np.float64).sum(1))
