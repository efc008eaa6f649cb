"""The partitions of a bulk job over the workers of a Ray cluster, by Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fave_fast.bulk import Count, Options, Partition, Worker
from fave_fast.errors import DataError, InputError


class _Actor:
    """A `Worker` in a process of the cluster: a row with a partition in, a row with its count or its problem out."""

    def __init__(self, options: Options) -> None:
        self._worker = Worker(options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return asdict(self._worker.answer(Partition(**row))) | {"problem": ""}
        except InputError as error:  # raised, it would come out as one of Ray's own
            return asdict(Count()) | {"problem": str(error)}


def over_ray(address: str, workers: int) -> Callable[[Options, Sequence[Partition]], Iterator[Count]]:
    """For `bulk.run`: spread over a cluster.

    Args:
        address: of the cluster, as Ray takes it; `local`: one on this machine, for this job.
        workers: how many recommenders at a time; each takes one GPU where the job's device is one, else one CPU.

    Raises:
        InputError: Ray is not installed, or the cluster is not there.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; expected pip install 'fave-fast[ray]'") from None

    def spread(options: Options, left: Sequence[Partition]) -> Iterator[Count]:
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray is {address!r}: {str(error).splitlines()[0]}") from None
        on_gpu = options.device.startswith("cuda")
        rows = ray.data.from_items([asdict(partition) for partition in left], override_num_blocks=len(left))
        counts = rows.map(
            _Actor,
            fn_constructor_args=(options,),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(left))),
            num_gpus=1 if on_gpu else None,
            num_cpus=None if on_gpu else 1,
        )
        try:
            for row in counts.iter_rows():
                problem = row.pop("problem")
                if problem:
                    raise DataError(problem)
                yield Count(**row)
        finally:
            ray.shutdown()

    return spread
