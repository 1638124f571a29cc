"""Data-parallel judging inside a training job: a prompt's group may lie on several ranks.

flow_grpo's sampler and accelerate's spread the images of one prompt over the ranks of
torch.distributed, each of which holds a judge. `GroupGather` brings each group to one rank:

1. the ranks exchange the keys of their images (prompt, and for edits the source's content hash);
2. every group gets an owner, the largest first, to the rank with the fewest pairs so far;
3. an image travels to its owner, and to nobody else;
4. owners judge side by side, and the rewards travel back to where the images came from.

Groups of different prompts are never joined, and a group of one is refused on every rank alike. A
rank that fails makes all of them raise, so none is left waiting in a collective.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from arr_fast.errors import BadImageError, VerdictError
from arr_fast.images import CanonicalImage, to_image
from arr_fast.integrations.groups import (
    fill_abstentions,
    group_keys,
    group_rewards,
    places_by_key,
)

if TYPE_CHECKING:
    from arr_fast.judge import Judge

logger = logging.getLogger("arr_fast.integrations")

# A candidate is known to all ranks as (rank, place in that rank's batch).
Candidate = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Batch:
    """One rank's images, read: what the others must know of them, and the pixels."""

    prompts: list[str]
    keys: list[Hashable]
    images: list[CanonicalImage | None]
    sources: list[CanonicalImage] | None


class GroupGather:
    """Rewards of groups that are spread over ranks; the same call on every rank.

    Make it where all ranks make it (it is a collective): it opens a gloo group of its own, so that
    a reward thread may exchange images while the trainer's thread runs collectives of its own.
    Calls from several threads run in the order in which they came.

    Args:
        timeout_s: How long a rank waits for the others, in seconds.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._group: Any = None
        self.rank, self.world = 0, 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._turns = threading.Condition()
        self._taken = 0
        self._served = 0

    def rewards(
        self, judge: Judge, prompts: Sequence[str], images: Sequence[Any], **options: Any
    ) -> list[float | None]:
        """`group_rewards` over the images of all ranks; each rank gets its own images' rewards.

        Args:
            judge: This rank's judge.
            prompts: This rank's N captions or instructions; N may differ by rank.
            images: Its N images.
            **options: keys, sources, rubric, reward, lam, gamma and more of `group_rewards`; keys
                must mean the same on every rank.

        Returns:
            N rewards in the order of this rank's images; None where the judge abstained, and for a
            group with an image that cannot be read.

        Raises:
            VerdictError: On every rank alike: a group has one image in the whole job, its prompts
                differ, some ranks gave sources and others none, or a rank failed.
        """
        plan, found = self._gathered(judge, prompts, images, **options)
        return [found[candidate] for candidate in plan.keys if candidate[0] == self.rank]

    def filled_rewards(
        self,
        judge: Judge,
        prompts: Sequence[str],
        images: Sequence[Any],
        *,
        neutral: float = 0.0,
        **options: Any,
    ) -> list[float]:
        """The same as numbers: an abstention gets the mean of its group over all ranks.

        Args:
            judge, prompts, images, **options: See `rewards`.
            neutral: For a group without any verdict; see `fill_abstentions`.
        """
        plan, found = self._gathered(judge, prompts, images, **options)
        numbers = fill_abstentions(list(found.values()), list(plan.keys.values()), neutral)
        pairs = zip(plan.keys, numbers, strict=True)
        return [number for (rank, _), number in pairs if rank == self.rank]

    def _gathered(
        self,
        judge: Judge,
        prompts: Sequence[str],
        images: Sequence[Any],
        *,
        keys: Sequence[Hashable] | None = None,
        sources: Sequence[Any] | None = None,
        **options: Any,
    ) -> tuple[_Plan, dict[Candidate, float | None]]:
        """The plan, and the rewards of all candidates of all ranks in the plan's order."""
        with self._turn() as number:
            batch, problem = _read(prompts, images, keys, sources)
            plan = _plan(self._share(_Notice.of(number, batch, problem)))
            assert batch is not None
            mine = [plan.places(owner, self.rank) for owner in range(self.world)]
            received = self._to_owners([_chosen(batch, places) for places in mine])
            answers = self._share(self._judged(judge, plan, received, **options))
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]
        if failures:
            raise VerdictError("; ".join(failures))
        merged = {candidate: value for each, _ in answers for candidate, value in each.items()}
        return plan, {candidate: merged.get(candidate) for candidate in plan.keys}

    def _judged(
        self, judge: Judge, plan: _Plan, received: Sequence[_Batch], **options: Any
    ) -> tuple[dict[Candidate, float | None], str | None]:
        """This rank's groups, judged; the message instead of the error if that fails."""
        ranks = range(self.world)
        candidates = [(rank, place) for rank in ranks for place in plan.places(self.rank, rank)]
        if not candidates:
            return {}, None
        prompts = [prompt for batch in received for prompt in batch.prompts]
        sources = [source for batch in received for source in batch.sources or ()]
        try:
            values = group_rewards(
                judge,
                prompts,
                [image for batch in received for image in batch.images],
                keys=[key for batch in received for key in batch.keys],
                sources=sources or None,
                **options,
            )
        except Exception as error:
            # The others wait for an answer: it must be sent before anything is raised.
            logger.exception("judging failed on rank %d", self.rank)
            return {}, f"{type(error).__name__}: {error}"
        return dict(zip(candidates, values, strict=True)), None

    def _share(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _to_owners(self, sent: Sequence[_Batch]) -> list[_Batch]:
        """What each rank sends to this one; `sent` has one batch per receiving rank."""
        if self._group is None:
            return list(sent)
        received: list[Any] = [None] * self.world
        for owner in range(self.world):
            into = received if owner == self.rank else None
            dist.gather_object(sent[owner], into, dst=owner, group=self._group)
        return received

    @contextmanager
    def _turn(self) -> Iterator[int]:
        """Lets calls pass one by one, in the order in which they came; yields the call's number."""
        with self._turns:
            number = self._taken
            self._taken += 1
            self._turns.wait_for(lambda: self._served == number)
        try:
            yield number
        finally:
            with self._turns:
                self._served += 1
                self._turns.notify_all()


@dataclass(frozen=True, slots=True)
class _Notice:
    """What a rank tells the others about its batch, or why it has none."""

    call: int
    problem: str | None
    prompts: list[str]
    keys: list[Hashable]
    readable: list[bool]
    has_sources: bool

    @classmethod
    def of(cls, call: int, batch: _Batch | None, problem: str | None) -> _Notice:
        """The notice of a batch that was read, or of the problem with it."""
        if batch is None:
            return cls(call, problem, [], [], [], False)
        readable = [image is not None for image in batch.images]
        return cls(call, None, batch.prompts, batch.keys, readable, batch.sources is not None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which candidates make a group, and which groups each rank judges.

    Attributes:
        keys: The group's key of every candidate, rank by rank.
        groups: Candidates of each group that can be judged.
        owned: Per rank, the keys of the groups that it judges.
    """

    keys: dict[Candidate, Hashable]
    groups: dict[Hashable, list[Candidate]]
    owned: list[list[Hashable]]

    def places(self, owner: int, rank: int) -> list[int]:
        """Places of the images that `rank` sends to `owner`, in the order of sending."""
        candidates = [c for key in self.owned[owner] for c in self.groups[key]]
        return [place for sender, place in candidates if sender == rank]


def _read(
    prompts: Sequence[str],
    images: Sequence[Any],
    keys: Sequence[Hashable] | None,
    sources: Sequence[Any] | None,
) -> tuple[_Batch | None, str | None]:
    """Reads one rank's batch; a message instead where it makes no sense."""
    try:
        for name, values in (("images", images), ("keys", keys), ("sources", sources)):
            if values is not None and len(values) != len(prompts):
                raise VerdictError(f"{name} has {len(values)} items, prompts has {len(prompts)}")
        read = None
        if sources is not None:
            read = [to_image(source, name=f"sources[{n}]") for n, source in enumerate(sources)]
        found = group_keys(prompts, read) if keys is None else list(keys)
        pictures = [_image(image, f"images[{n}]") for n, image in enumerate(images)]
    except (VerdictError, BadImageError) as error:
        return None, str(error)
    return _Batch(list(prompts), found, pictures, read), None


def _image(value: Any, name: str) -> CanonicalImage | None:
    try:
        return to_image(value, name=name)
    except BadImageError as error:
        logger.warning("%s; its group abstains", error)
        return None


def _plan(notices: Sequence[_Notice]) -> _Plan:
    """The same plan on every rank, from what all of them told.

    Raises:
        VerdictError: See `GroupGather.rewards`.
    """
    problems = [f"rank {rank}: {n.problem}" for rank, n in enumerate(notices) if n.problem]
    if problems:
        raise VerdictError("; ".join(problems))
    if len({notice.call for notice in notices}) > 1:
        raise VerdictError("the ranks are at different reward calls; all must make the same ones")
    if len({notice.has_sources for notice in notices if notice.keys}) > 1:
        raise VerdictError("some ranks gave sources, others none")
    keys = {(rank, p): key for rank, n in enumerate(notices) for p, key in enumerate(n.keys)}
    flat = list(keys)
    everyone = places_by_key(list(keys.values()))
    groups: dict[Hashable, list[Candidate]] = {}
    for key, places in everyone.items():
        members = [flat[place] for place in places]
        if len(members) < 2:
            raise VerdictError(
                f"group {str(key)[:80]!r} has 1 image on all {len(notices)} ranks together; a "
                "pairwise judge needs at least two per prompt"
            )
        if len({notices[rank].prompts[place] for rank, place in members}) > 1:
            raise VerdictError(f"group {str(key)[:80]!r} holds different prompts")
        if all(notices[rank].readable[place] for rank, place in members):
            groups[key] = members
    owned: list[list[Hashable]] = [[] for _ in notices]
    load = [0] * len(notices)
    for key in sorted(groups, key=lambda each: -len(groups[each])):
        owner = load.index(min(load))
        owned[owner].append(key)
        load[owner] += len(groups[key]) * (len(groups[key]) - 1) // 2
    return _Plan(keys, groups, owned)


def _chosen(batch: _Batch, places: Sequence[int]) -> _Batch:
    sources = None if batch.sources is None else [batch.sources[place] for place in places]
    return _Batch(
        [batch.prompts[place] for place in places],
        [batch.keys[place] for place in places],
        [batch.images[place] for place in places],
        sources,
    )
