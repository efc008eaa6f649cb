"""The model that is served: a recommender behind a micro-batcher, which a newer checkpoint can replace at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from fave_fast.batching import MicroBatcher
from fave_fast.engine import Recommendation, Recommender
from fave_fast.errors import Closed, InputError, Overloaded
from fave_fast.serving.api import RankedList, RecommendRequest, RecommendResponse, Reloaded
from fave_fast.serving.telemetry import ObservedEngine, Snapshot, Telemetry, Totals

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What a checkpoint became."""

    sha256: str
    path: str
    recommender: Recommender


@dataclass(frozen=True)
class _Served:
    model: Model
    batcher: MicroBatcher

    def totals(self, past: Totals) -> Totals:
        """Its counts added to those of its predecessors."""
        return past.with_one(self.batcher.statistics, self.model.recommender.batches)

    def snapshot(self, past: Totals) -> Snapshot:
        """Its state, with the counts of its predecessors."""
        catalogue = self.model.recommender.catalogue
        return Snapshot(
            self.model.sha256,
            self.model.path,
            catalogue.version,
            int((~catalogue.gone).sum()),
            self.batcher.statistics.waiting,
            self.model.recommender.fallback_share,
            self.totals(past),
        )


class Service:
    """Answers requests by the present model. All methods but `snapshot` belong to one event loop's thread."""

    def __init__(
        self,
        load: Callable[[], Model],
        batcher: Callable[[ObservedEngine], MicroBatcher],
    ) -> None:
        """Load the first model.

        Args:
            load: reads the checkpoint and makes it ready to answer, at the start and at each reload.
            batcher: starts the micro-batcher of a model's engine.

        Raises:
            InputError: as `load`.
        """
        self._load, self._batcher = load, batcher
        self.telemetry = Telemetry()
        self.stopping = False  # still answers, but is not ready
        self._past = Totals()
        self._retiring: _Served | None = None
        self._reloading = asyncio.Lock()
        self._served = self._open()
        self.telemetry.watch(self.snapshot)

    def _open(self) -> _Served:
        model = self._load()
        model.recommender.on_step = self.telemetry.step
        return _Served(model, self._batcher(ObservedEngine(model.recommender, self.telemetry)))

    def snapshot(self) -> Snapshot:
        """The state of the present model, with all counts since the start."""
        past = self._past if self._retiring is None else self._retiring.totals(self._past)
        return self._served.snapshot(past)

    @property
    def healthy(self) -> bool:
        """Whether the worker lives; it ends before the service does only by an error."""
        return self.stopping or not self._served.batcher.closed

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return not self.stopping and not self._served.batcher.closed

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """One list a history, all by one model; if the queue has no room for all histories, none is begun.

        Denied items are dropped from lists that are longer by their number, which gives what the engine's own `deny`
        would: the best of what remains. So requests with other denied items share a call of the engine.

        Raises:
            Overloaded: too many histories wait.
            Closed: the server is stopping.
        """
        served = self._served
        denied = {str(item) for item in request.deny}
        waiting: list[Future[Recommendation]] = []
        try:
            for history in request.histories:
                waiting.append(
                    served.batcher.submit(history, k=request.k + len(denied), exclude_history=request.exclude_history)
                )
        except (Overloaded, Closed):
            for future in waiting:
                future.cancel()
            raise
        answers = await asyncio.gather(*map(asyncio.wrap_future, waiting), return_exceptions=True)
        lists = [_ranked(_answered(answer), request.k, denied) for answer in answers]
        return RecommendResponse.model_construct(model=served.model.sha256, lists=lists)

    async def reload(self) -> Reloaded:
        """Load the checkpoint anew, then serve it; what waits for the old model is still answered by it.

        Reloads wait for one another. Both models are in memory while one replaces the other.

        Raises:
            InputError: the checkpoint cannot be served; the old model stays.
        """
        async with self._reloading:
            try:
                new = await asyncio.to_thread(self._open)
            except Exception as error:
                self.telemetry.reloads.labels("failed").inc()
                if isinstance(error, InputError):
                    _log.warning("reload failed", extra={"fields": {"reason": str(error)}})
                raise
            # No request is between its choice of a model and its place in the queue: both are one step of this loop.
            old, self._served = self._served, new
            self._retiring = old
            await asyncio.to_thread(old.batcher.close)
            self._past, self._retiring = old.totals(self._past), None
            self.telemetry.reloads.labels("done").inc()
            now = Reloaded(model=new.model.sha256, items=new.snapshot(self._past).items)
            _log.info("reloaded", extra={"fields": now.model_dump()})
            return now

    async def close(self) -> None:
        """Answer what waits, and take no more."""
        self.stopping = True
        async with self._reloading:
            await asyncio.to_thread(self._served.batcher.close)


def _answered(outcome: Recommendation | BaseException) -> Recommendation:
    if isinstance(outcome, Exception):
        raise outcome
    if isinstance(outcome, BaseException):  # would end the event loop, and with it all other requests
        raise Closed("the batcher's worker ended by an error") from outcome
    return outcome


def _ranked(answer: Recommendation, k: int, denied: set[str]) -> RankedList:
    """The first `k` items that are not denied; ids are compared as text, as "12" and 12 name the same item."""
    items, scores = answer.items, answer.scores
    if denied:
        kept = [at for at, item in enumerate(items) if str(item) not in denied]
        items, scores = [items[at] for at in kept], [scores[at] for at in kept]
    return RankedList.model_construct(
        items=items[:k], scores=scores[:k], unknown=answer.unknown, popular=answer.popular, version=answer.version
    )
