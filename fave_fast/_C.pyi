from typing import Any

import numpy as np
from numpy.typing import NDArray

compiler: str
has_cuda: bool

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]
_Rows = NDArray[Any]  # float32, or uint16 with the bits of bfloat16

def rank_count(
    scores: _Floats,
    first_id: int,
    target_scores: _Floats,
    target_ids: _Ints,
    counts: _Ints,
    threads: int = 1,
) -> None: ...
def launch_graph(graph: int, stream: int) -> None: ...
def wait_flag(flag: int, expected: int, stream: int, timeout: float) -> None: ...
def raise_flag(flag: int, value: int) -> None: ...

class Numbering:
    def __init__(
        self,
        *,
        ids: _Ints | None,
        positions: _Ints | None,
        texts: dict[str, int] | None,
        gone: NDArray[np.bool_],
        complete: bool,
    ) -> None: ...
    def number(self, histories: object) -> tuple[NDArray[np.int32], _Ints, _Ints] | None: ...

class Line:
    def __init__(self, flag: int, count: int, stream: int) -> None: ...
    def run(self, graph: int, timeout: float) -> None: ...

class Request:
    def __init__(
        self,
        line: Line,
        graph: int,
        offsets: int,
        exclude_offsets: int,
        ids: int,
        scores: int,
        best: int,
        batch: int,
        items: int,
        k: int,
        timeout: float,
    ) -> None: ...
    def run(self, ids: NDArray[np.int32], offsets: _Ints, exclude: bool) -> tuple[_Floats, _Ints]: ...

class EncoderCall:
    def __init__(
        self,
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
        order: int,
        programs: int,
        users: int,
        padded_length: int,
        longest: int,
        blocks: int,
        program_count: int,
        anchor: float,
        eps: float,
        input_eps: float,
        wide_rows: bool,
        wide_bounds: bool,
        layer_norm: bool,
        rotary: bool,
        causal: bool,
    ) -> None: ...

def encode_cluster(call: EncoderCall, *, tiles: int, overlap: bool, device: int, stream: int) -> None: ...
def encode_pair(call: EncoderCall, *, overlap: bool, device: int, stream: int) -> None: ...
def encode_tile(call: EncoderCall, *, tiles: int, overlap: bool, device: int, stream: int) -> None: ...

class ListsCall:
    def __init__(
        self,
        *,
        queries: int,
        table: int,
        deny: int,
        excluded: int,
        excluded_offsets: int,
        entries: int,
        scores: int,
        ids: int,
        rows: int,
        d: int,
        items: int,
        k: int,
        tile: int,
        wide_excluded: bool,
        wide_offsets: bool,
    ) -> None: ...

def score_topk_on_gpu(call: ListsCall, *, overlap: bool, device: int, stream: int) -> None: ...
def instruction_sets() -> list[str]: ...

class Encoder:
    def __init__(
        self,
        *,
        d: int,
        heads: int,
        hidden: int,
        blocks: int,
        max_length: int,
        layer_norm: bool,
        rotary: bool,
        causal: bool,
        eps: float,
        input_eps: float,
        half: bool,
        isa: str = "",
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def load_block(
        self,
        block: int,
        qkv: _Floats,
        attention_out: _Floats,
        ffn_in: _Floats,
        ffn_out: _Floats,
        attention_norm: _Floats,
        ffn_norm: _Floats,
    ) -> None: ...
    def load_ends(self, final_norm: _Floats, cos: _Floats, sin: _Floats) -> None: ...
    def encode(self, rows: _Rows, bounds: _Ints, padded_length: int, out: _Rows, threads: int) -> None: ...
    def encode_ids(
        self,
        ids: _Ints,
        bounds: _Ints,
        padded_length: int,
        table: _Rows,
        norm: _Floats,
        shift: _Floats,
        scale: _Floats | None,
        anchor: float,
        out: _Rows,
        threads: int,
    ) -> None: ...

def score_topk(
    queries: _Rows,
    table: _Rows,
    k: int,
    excluded: _Ints | None,
    offsets: _Ints | None,
    deny: NDArray[np.bool_] | None,
    scores: _Floats,
    ids: _Ints,
    threads: int,
    isa: str = "",
) -> None: ...

class Step:
    def __init__(
        self, encoder: Encoder, table: _Rows, norm: _Floats, shift: _Floats, scale: _Floats | None, anchor: float
    ) -> None: ...
    def run(
        self,
        ids: NDArray[np.int32],
        offsets: _Ints,
        k: int,
        exclude: bool,
        deny: NDArray[np.bool_] | None,
        threads: int,
    ) -> tuple[_Floats, _Ints, float, float]: ...

class ByteTable:
    def __init__(self, table: _Rows, isa: str = "", threads: int = 1) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def asked(self) -> int: ...
    @property
    def fallen_back(self) -> int: ...
    def score_topk(
        self,
        queries: _Rows,
        table: _Rows,
        k: int,
        excluded: _Ints | None,
        offsets: _Ints | None,
        deny: NDArray[np.bool_] | None,
        scores: _Floats,
        ids: _Ints,
        threads: int,
    ) -> None: ...
