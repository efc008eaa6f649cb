import numpy as np
from numpy.typing import NDArray

compiler: str
has_cuda: bool

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
def encode_cluster(
    *,
    rows: int,
    bounds: int,
    table: int,
    input_norm: int,
    shift: int,
    scale: int,
    weights: int,
    norms: int,
    cos: int,
    sin: int,
    out: int,
    users: int,
    padded_length: int,
    longest: int,
    blocks: int,
    anchor: float,
    eps: float,
    input_eps: float,
    wide_rows: bool,
    wide_bounds: bool,
    layer_norm: bool,
    rotary: bool,
    causal: bool,
    tiles: int,
    device: int,
    stream: int,
) -> None: ...
