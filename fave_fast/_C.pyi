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
def launch_graph(graph: int, stream: int) -> None: ...
def wait_flag(flag: int, expected: int, stream: int, timeout: float) -> None: ...
def run_graph(graph: int, stream: int, flag: int, expected: int, timeout: float) -> None: ...
