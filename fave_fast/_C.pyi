import numpy as np
from numpy.typing import NDArray

compiler: str

def rank_count(
    scores: NDArray[np.float32],
    first_id: int,
    target_scores: NDArray[np.float32],
    target_ids: NDArray[np.int64],
    counts: NDArray[np.int64],
    threads: int = 1,
) -> None: ...
