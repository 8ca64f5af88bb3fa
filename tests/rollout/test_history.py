"""What was seen of each prompt: the same bits from the journal, from the stored copy, or both."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.buffer import events
from slipstream.buffer.errors import CorruptData
from slipstream.buffer.events import Decision, Facts, Ref
from slipstream.buffer.journal import Journal
from slipstream.buffer.records import (
    Message,
    Prompt,
    SizingDecision,
    Ticket,
    Version,
    WeightsManifest,
)
from slipstream.rollout.history import FILE, FORGET, History


def ticket(uid: int, num_samples: int, items: int = 5, staged: bool = False) -> Ticket:
    prompt = Prompt(
        uid=uid,
        source_id=f"sum/{uid % items}",
        task="sum",
        messages=(Message(role="user", content="?"),),
    )
    sizing = SizingDecision(
        sizer="fixed", num_samples=num_samples, max_new_tokens=8, reason="by hand", staged=staged
    )
    return Ticket(prompt=prompt, sizing=sizing)


def facts(reward: float | None, tokens: int = 4, step: int = 0, norm: float = 2.0) -> Facts:
    return Facts(spans=((0, step, tokens),), reward=reward, score_norm=norm)


NOWHERE = Ref(segment=0, offset=0, length=0, digest=0)


def put(journal: Journal, uid: int, num_samples: int, *, staged: bool = False) -> events.Put:
    stored = journal.append(ticket(uid, num_samples, staged=staged))
    return events.Put(uid=uid, num_samples=num_samples, ticket=stored, staged=staged)


def finished(uid: int, index: int, **seen) -> events.Finished:
    return events.Finished(uid=uid, index=index, payload=NOWHERE, facts=facts(**seen))


def published(step: int) -> events.Published:
    return events.Published(
        manifest=WeightsManifest(version=Version(branch=0, step=step), shards=())
    )


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path)
    yield made
    made.close()


def history(half_life: float = 20.0, prior: float = 2.0) -> History:
    return History(half_life, prior)


def random_events(journal: Journal, draw) -> list[events.AnyEvent]:
    made, uid, step = [], 0, 0
    for kind in draw:
        if kind == 0:
            made.append(put(journal, uid, 2))
            uid += 1
        elif kind == 1:
            made.append(put(journal, uid, 0))
            uid += 1
        elif kind == 2:
            step += 1
            made.append(published(step))
        elif kind == 3:
            made.append(events.Checkpointed(step=step))
        elif kind == 4:
            step = max(0, step - 2)
            made.append(events.BranchOpened(branch=1, parents={}, resumed_at=step))
        elif kind == 5 and uid:
            decisions = (Decision(index=0, trained=True),)
            made.append(events.Taken(uid=uid - 1, step=step + 1, decisions=decisions))
        elif kind == 6:
            made.append(put(journal, uid, 2, staged=True))
            uid += 1
        elif kind == 7 and uid:
            made.append(events.Returned(uid=uid - 1, indices=(0,), attempt=1, reason="expired"))
        elif uid:
            seen = {"reward": (kind % 7) / 6, "tokens": kind, "step": step, "norm": kind / 3}
            made.append(finished(max(0, uid - 1 - kind % 3), kind % 2, **seen))
    return made


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 60))
def test_stored_copy_and_later_events_give_the_bits_of_the_whole_fold(tmp_path_factory, draw, cut):
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    made = random_events(journal, draw)
    journal.commit(made[:cut])
    first = history()
    first.catch_up(journal)
    first.save(folder)
    journal.commit(made[cut:])
    resumed, whole = history(), history()
    resumed.open(folder, journal.sequence)
    assert resumed.dump() == first.dump()
    resumed.catch_up(journal)
    whole.catch_up(journal)
    assert resumed.dump() == whole.dump()
    assert whole.sequence == len(made)
    journal.close()


def test_a_probe_is_decided_on_what_was_known_when_it_was_complete(journal):
    seen = history()

    def folded(*new: events.AnyEvent) -> list:
        journal.commit(list(new))
        seen.catch_up(journal)
        return seen.probed

    assert not folded(put(journal, 0, 2, staged=True), finished(0, 1, reward=1.0))
    ((uid, sizing, known),) = folded(finished(0, 0, reward=1.0))
    assert (uid, sizing.num_samples, known.evidence) == (0, 2, 2)
    later = put(journal, 5, 2), finished(5, 0, reward=0.0), published(40)
    assert folded(*later)[0][2] == known, "what comes later changes no decision"
    assert not folded(events.Returned(uid=0, indices=(1,), attempt=1, reason="lost"))
    voided = events.Voided(uid=0, indices=(1,), reason="quarantined", step=41)
    assert folded(voided)[0][2] != known
    assert not folded(events.Extended(uid=0, num_samples=4, ticket=NOWHERE))


def test_a_damaged_copy_is_refused_by_name_and_the_journal_or_priors_replace_it(journal, tmp_path):
    journal.commit([put(journal, 0, 2), finished(0, 0, reward=1.0), published(1)])
    before = history()
    before.catch_up(journal)
    before.save(tmp_path)
    path: Path = tmp_path / FILE
    good = path.read_bytes()
    for bad in (good[:-1], good[:10], b"", good[:60] + bytes([good[60] ^ 1]) + good[61:]):
        path.write_bytes(bad)
        with pytest.raises(CorruptData, match=rf"{FILE} is not what was written.*{FORGET}"):
            history().open(tmp_path, journal.sequence)
    path.unlink()
    rebuilt = history()
    rebuilt.open(tmp_path, journal.sequence)
    rebuilt.catch_up(journal)
    assert rebuilt.dump() == before.dump()
    path.write_bytes(b"damaged")
    (tmp_path / FORGET).touch()
    fresh = history()
    fresh.open(tmp_path, journal.sequence)
    fresh.catch_up(journal)
    assert fresh.known("sum/0", 8).evidence == 0
    assert not (tmp_path / FORGET).exists()
    again = history()
    again.open(tmp_path, journal.sequence)
    assert again.dump() == fresh.dump(), "what was forgotten stays forgotten"


def test_a_copy_made_under_another_half_life_is_not_used(journal, tmp_path):
    journal.commit([put(journal, 0, 2), finished(0, 0, reward=1.0)])
    other = history(half_life=5.0)
    other.catch_up(journal)
    other.save(tmp_path)
    for half_life, used in ((20.0, False), (5.0, True)):
        opened = history(half_life)
        opened.open(tmp_path, journal.sequence)
        assert (opened.dump() == other.dump()) == used


def test_evidence_halves_with_the_half_life_and_the_task_is_the_prior(journal):
    made = [put(journal, 0, 4), put(journal, 1, 4)]
    made += [finished(0, i, reward=1.0, tokens=4) for i in range(4)]
    made += [finished(1, i, reward=0.0, tokens=12) for i in range(4)]
    journal.commit([*made, published(20)])
    seen = history(half_life=20.0, prior=2.0)
    seen.catch_up(journal)
    known = seen.known("sum/0", 100)
    # Own: 4 passes at half weight. Task: (4 + 4) at half weight = 2 of 4, with the uniform 3 of 6.
    assert (known.passes, known.fails, known.evidence) == (2 + 1, 0 + 1, 2)
    assert (known.pass_rate, known.spread) == (0.75, 3 * 1 / (4 * 5))
    assert known.tokens == (4 * 4 * 0.5 + 8 * 2) / (4 * 0.5 + 2)
    unseen = seen.known("sum/3", 100)
    assert (unseen.passes, unseen.fails, unseen.last_step) == (1, 1, None)
    assert seen.known("product/1", 100).tokens == 100
    assert seen.length_quantile("sum/3", 0.5) == 4
    assert seen.length_quantile("sum/3", 0.9) == 14, "12, rounded up by a quarter octave"


def test_failed_rewards_count_as_lengths_only_and_graded_ones_by_their_value(journal):
    journal.commit(
        [put(journal, 0, 3)] + [finished(0, i, reward=r) for i, r in enumerate((None, 0.25, 7.0))]
    )
    seen = history()
    seen.catch_up(journal)
    known = seen.known("sum/0", 8)
    task_share = (1.25 + 1) / (2 + 2)
    assert known.passes == pytest.approx(1.25 + 2 * task_share)
    assert known.evidence == 3


def test_skips_are_counted_in_a_row_and_end_when_it_is_issued(journal):
    journal.commit([put(journal, 0, 2), put(journal, 5, 0), put(journal, 10, 0)])
    seen = history()
    seen.catch_up(journal)
    assert seen.known("sum/0", 8).skips == 2
    journal.commit([put(journal, 15, 2)])
    seen.catch_up(journal)
    assert seen.known("sum/0", 8).skips == 0


def test_memory_of_prompts_in_flight_ends_with_the_checkpoint(journal):
    decisions = (Decision(index=0, trained=True),)
    journal.commit(
        [
            put(journal, 0, 1),
            put(journal, 1, 1),
            finished(0, 0, reward=1.0),
            events.Taken(uid=0, step=1, decisions=decisions),
            events.Checkpointed(step=1),
        ]
    )
    seen = history()
    seen.catch_up(journal)
    assert set(seen._now.issued) == {1}


def test_the_score_norm_proxy_is_unbiased_for_the_squared_norm_of_the_logits_gradient():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    exact = sum(p * ((np.eye(4)[a] - probabilities) ** 2).sum()
                for a, p in enumerate(probabilities))  # fmt: skip
    proxy = sum(p * -np.expm1(np.log(p)) for p in probabilities)
    assert proxy == pytest.approx(exact)
