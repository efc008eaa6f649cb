from __future__ import annotations

import asyncio
import http.client
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fave_fast import checkpoint as checkpoints
from fave_fast import serve
from fave_fast.batching import Engine, MicroBatcher
from fave_fast.engine import History, ItemId, Recommendation, Recommender
from fave_fast.errors import InputError
from fave_fast.serving.api import Limits, RecommendResponse
from fave_fast.serving.app import OPEN_ROUTES, RECOMMEND, create_app
from fave_fast.serving.gateway import Gateway
from fave_fast.serving.service import Model, Service
from fave_fast.serving.telemetry import JsonLines

PATIENCE = 60.0  # seconds until a test gives up; no test waits for time to pass
LIMITS = Limits(k=30, deny=5, histories=4, history=12, body_bytes=4000)
TOKEN = "a.secret"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


class Held:
    """An engine that answers when it is let through, or ends with an error."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.entered, self.allowed = engine, threading.Semaphore(0), threading.Semaphore(0)
        self.end: BaseException | None = None

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
    ) -> list[Recommendation]:
        self.entered.release()
        assert self.allowed.acquire(timeout=PATIENCE)
        if self.end is not None:
            raise self.end
        return self.engine.recommend(histories, k, exclude_history, deny)


class Server:
    """The app over a copy of a checkpoint, and what the tests look at."""

    def __init__(self, checkpoint: Path, *, held: bool = False, max_queue: int = 64, **options: Any) -> None:
        self.path = checkpoint
        self.held: list[Held] = []
        self._hold, self._max_queue = held, max_queue
        self.service = Service(self.load, self.batcher)
        self.app: Gateway = create_app(self.service, limits=options.pop("limits", LIMITS), **options)

    def load(self) -> Model:
        kept = checkpoints.load(self.path)
        return Model(checkpoints.content_digest(kept), str(self.path), Recommender(kept))

    def batcher(self, engine: Engine) -> MicroBatcher:
        if self._hold:
            engine = Held(engine)
            self.held.append(engine)
        return MicroBatcher(engine, max_queue=self._max_queue)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client
        for held in self.held:
            held.allowed.release(1000)
        await self.service.close()

    def ask(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Requests one after the other."""

        async def work() -> list[httpx.Response]:
            async with self.client() as client:
                return [await client.request(method, path, **options) for method, path, options in requests]

        return asyncio.run(work())


def post(body: object, path: str = RECOMMEND, **options: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", path, {"json": body, **options}


def get(path: str, **options: Any) -> tuple[str, str, dict[str, Any]]:
    return "GET", path, options


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Prometheus's text as (name, labels' values in order) to value."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def copied(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_checkpoint, tmp_path / "served.pt"))


@pytest.fixture(scope="module")
def recommender(tiny_checkpoint: Path) -> Recommender:
    return Recommender.from_pretrained(tiny_checkpoint)


def changed(path: Path) -> None:
    """Another model of the same kind in the place of the one at `path`."""
    kept = checkpoints.load(path)
    weights = {name: -weight if "item_embedding" in name else weight for name, weight in kept.weights.items()}
    checkpoints.save(replace(kept, weights=weights), path)


def test_lists_are_those_of_the_engine(tiny_checkpoint: Path, recommender: Recommender) -> None:
    histories: list[list[Any]] = [[101, 103, 105], ["101", 107.0], [], ["never", 109, 10**30]]
    asks: list[dict[str, Any]] = [
        {},
        {"k": 3.0},
        {"k": 30, "exclude_history": False},
        {"k": 5, "deny": [102, "104", 104, "never", 111]},
        {"k": 1, "deny": recommender.recommend([histories[0]], 5)[0].items},
    ]
    answers = Server(tiny_checkpoint).ask(*(post({"histories": histories, **ask}) for ask in asks))
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.status_code == 200
        found = RecommendResponse.model_validate_json(answer.content, strict=True)
        assert found.model == checkpoints.content_digest(recommender.checkpoint)
        expected = recommender.recommend(
            histories, int(ask.get("k", 20)), ask.get("exclude_history", True), deny=ask.get("deny")
        )
        assert [Recommendation(**one.model_dump()) for one in found.lists] == expected
    assert [one["popular"] for one in answers[0].json()["lists"]] == [False, False, True, False]


def test_text_ids_are_denied_as_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    kept = checkpoints.load(tiny_checkpoint)
    names = [*(str(number) for number in range(101, 124)), "x"]
    path = tmp_path / "texts.pt"
    checkpoints.save(replace(kept, item_ids=kept.item_ids.from_ids(names)), path)
    (answer,) = Server(path).ask(post({"histories": [["x", 101]], "deny": ["102", 103]}))
    (expected,) = Recommender.from_pretrained(path).recommend([["x", 101]], deny=["102", "103"])
    assert answer.json()["lists"][0]["items"] == expected.items
    assert {"102", "103", "x", "101"}.isdisjoint(expected.items)


BAD_BODIES = [
    ({}, ["histories"]),
    ({"histories": []}, ["histories"]),
    ({"histories": [[1]] * 5}, ["histories"]),
    ({"histories": [list(range(13))]}, ["histories", 0]),
    ({"histories": [1]}, ["histories", 0]),
    ({"histories": "101"}, ["histories"]),
    ({"histories": [[101], [102, 1.5]]}, ["histories", 1, 1]),
    ({"histories": [[True]]}, ["histories", 0, 0]),
    ({"histories": [[None]]}, ["histories", 0, 0]),
    ({"histories": [[""]]}, ["histories", 0, 0]),
    ({"histories": [["x" * 257]]}, ["histories", 0, 0]),
    ({"histories": [[101]], "k": 0}, ["k"]),
    ({"histories": [[101]], "k": 31}, ["k"]),
    ({"histories": [[101]], "k": "5"}, ["k"]),
    ({"histories": [[101]], "k": True}, ["k"]),
    ({"histories": [[101]], "exclude_history": 1}, ["exclude_history"]),
    ({"histories": [[101]], "deny": [1, [2]]}, ["deny", 1]),
    ({"histories": [[101]], "deny": list(range(6))}, ["deny"]),
    ({"histories": [[101]], "topk": 5}, ["topk"]),
    ([[101]], []),
    (None, []),
]


def test_bad_input_is_named(tiny_checkpoint: Path) -> None:
    answers = Server(tiny_checkpoint).ask(*(post(body) for body, _ in BAD_BODIES))
    for (body, place), answer in zip(BAD_BODIES, answers, strict=True):
        assert answer.status_code == 422, body
        assert [problem["loc"] for problem in answer.json()["detail"]] == [["body", *place]], body
        assert all(problem["msg"] for problem in answer.json()["detail"])


RAW_BODIES = [
    (b"", 422),
    (b"{", 422),
    (b'{"histories": [["\xff"]]}', 400),
    (b'{"histories": [["\\ud800"]]}', 422),
    (b'{"histories": [[NaN]]}', 422),
    (b'{"histories": [[' + b"1" * 3900 + b"]]}", 200),
    (json.dumps({"histories": [[101]]}).encode("utf-16"), 200),
    (b'{"histories": [[101]], "k": 0, "k": 5}', 200),
    (b'{"histories": [[101]], "k": 5, "k": 0}', 422),
    (b"[" * 3900, 400),
    (b" " * 4001, 413),
]


def test_bodies_that_are_no_json_or_too_large(tiny_checkpoint: Path) -> None:
    async def in_parts() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 1000

    typed = {"Content-Type": "application/json"}
    requests = [("POST", RECOMMEND, {"content": body, "headers": typed}) for body, _ in RAW_BODIES]
    requests += [("POST", RECOMMEND, {"content": in_parts(), "headers": typed}), post({"histories": [[101]]})]
    untyped, *answers = Server(tiny_checkpoint).ask(("POST", RECOMMEND, {"content": b"{}"}), *requests)
    assert [answer.status_code for answer in answers] == [status for _, status in RAW_BODIES] + [413, 200]
    assert "Content-Type: application/json" in untyped.json()["detail"][0]["msg"]
    assert "4,000" in answers[-2].json()["detail"]
    assert answers[-2].headers["Connection"] == "close"


IDS = st.one_of(st.integers(), st.sampled_from([101, 105, "110"]), st.text(max_size=300), st.none(), st.floats())
ANYTHING = st.recursive(IDS | st.booleans(), lambda inner: st.lists(inner, max_size=6), max_leaves=20)
NEAR = st.fixed_dictionaries(
    {"histories": st.lists(st.lists(IDS, max_size=14), max_size=5) | ANYTHING},
    optional={
        "k": st.integers(-1, 40) | ANYTHING,
        "exclude_history": st.booleans() | ANYTHING,
        "deny": st.lists(IDS, max_size=7) | ANYTHING,
        "more": ANYTHING,
    },
)
GOOD = st.fixed_dictionaries(
    {"histories": st.lists(st.lists(st.integers(95, 130), max_size=12), min_size=1, max_size=4)},
    optional={
        "k": st.integers(1, 30),
        "exclude_history": st.booleans(),
        "deny": st.lists(st.integers(95, 130), max_size=5),
    },
)


def test_any_body_is_answered_or_refused_with_its_fault(tiny_checkpoint: Path, recommender: Recommender) -> None:
    server = Server(tiny_checkpoint)

    async def asked(body: object) -> httpx.Response:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            content = json.dumps(body).encode()
            return await client.post(RECOMMEND, content=content, headers={"Content-Type": "application/json"})

    @settings(max_examples=150, deadline=None)
    @given(body=NEAR | GOOD | ANYTHING)
    def check(body: Any) -> None:
        answer = asyncio.run(asked(body))
        assert answer.status_code in (200, 413, 422)
        if answer.status_code == 422:
            assert all(problem["loc"][0] == "body" for problem in answer.json()["detail"])
        if answer.status_code == 200:
            found = RecommendResponse.model_validate_json(answer.content, strict=True)
            expected = recommender.recommend(
                body["histories"], int(body.get("k", 20)), body.get("exclude_history", True), deny=body.get("deny")
            )
            assert [Recommendation(**one.model_dump()) for one in found.lists] == expected

    check()
    asyncio.run(server.service.close())


def test_a_token_guards_all_but_probes_and_pages(tiny_checkpoint: Path) -> None:
    paths = [*sorted(OPEN_ROUTES), "/metrics", RECOMMEND, "/v1/reload", "/none"]
    wrong = [{}, {"Authorization": TOKEN}, {"Authorization": "Bearer a.secre"}, {"Authorization": "Basic YTpi"}]
    server = Server(tiny_checkpoint, token=TOKEN)
    answers = server.ask(
        *(get(path, headers=headers) for headers in wrong for path in paths), get("/metrics", headers=AUTHORIZED)
    )
    found = [answer.status_code for answer in answers]
    assert found == ([200] * len(OPEN_ROUTES) + [401] * 4) * len(wrong) + [200]
    assert answers[-2].headers["WWW-Authenticate"] == "Bearer"
    assert "Bearer" in answers[-2].json()["detail"]


def test_without_a_token_nobody_reloads(tiny_checkpoint: Path) -> None:
    assert [answer.status_code for answer in Server(tiny_checkpoint).ask(post(None, "/v1/reload"))] == [404]


def test_a_replica_names_itself_and_is_not_reloaded_alone(tiny_checkpoint: Path) -> None:
    server = Server(tiny_checkpoint, token=TOKEN, reloadable=False, labels={"replica": "r-1"})
    reload, metrics = server.ask(post(None, "/v1/reload", headers=AUTHORIZED), get("/metrics", headers=AUTHORIZED))
    assert reload.status_code == 404
    found = samples(metrics.text)
    assert found["fave_fast_http_requests_total", "r-1", "other", "404"] == 1
    assert found["fave_fast_catalogue_items", "r-1"] == 24
    assert all("r-1" in key for key in found)


def test_more_than_may_wait_is_refused_as_a_whole(tiny_checkpoint: Path) -> None:
    server = Server(tiny_checkpoint, held=True, max_queue=3)

    async def work() -> None:
        async with server.client() as client:
            first = asyncio.create_task(client.post(RECOMMEND, json={"histories": [[101]]}))
            await asyncio.to_thread(server.held[0].entered.acquire, timeout=PATIENCE)
            second = asyncio.create_task(client.post(RECOMMEND, json={"histories": [[102], [103]]}))
            while server.service.snapshot().waiting < 2:
                await asyncio.sleep(0)
            refused = await client.post(RECOMMEND, json={"histories": [[104], [105]]})
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "1"
            assert "max_queue is 3" in refused.json()["detail"]
            third = asyncio.create_task(client.post(RECOMMEND, json={"histories": [[106]]}))
            while server.service.snapshot().waiting < 3:
                await asyncio.sleep(0)
            server.held[0].allowed.release(1000)
            assert [answer.status_code for answer in await asyncio.gather(first, second, third)] == [200] * 3
            found = samples((await client.get("/metrics")).text)
        assert found["fave_fast_histories_total", "answered"] == 4
        assert found["fave_fast_histories_total", "refused"] == 1
        assert (
            found["fave_fast_histories_total", "cancelled"] == 1
        )  # of the refused request, the one there was room for
        assert found["fave_fast_http_requests_total", RECOMMEND, "503"] == 1

    asyncio.run(work())


def test_a_new_checkpoint_takes_over_and_what_waits_is_answered_by_the_old(copied: Path) -> None:
    old = Recommender.from_pretrained(copied)
    server = Server(copied, held=True, token=TOKEN)

    async def work() -> None:
        async with server.client() as client:
            client.headers.update(AUTHORIZED)
            before = asyncio.create_task(client.post(RECOMMEND, json={"histories": [[101]]}))
            await asyncio.to_thread(server.held[0].entered.acquire, timeout=PATIENCE)
            changed(copied)
            reload = asyncio.create_task(client.post("/v1/reload"))
            while len(server.held) < 2 or server.service.snapshot().model == checkpoints.content_digest(old.checkpoint):
                await asyncio.sleep(0)
            new = Recommender.from_pretrained(copied)
            server.held[1].allowed.release(1000)
            after = await client.post(RECOMMEND, json={"histories": [[101]]})
            assert not before.done()
            assert samples((await client.get("/metrics")).text)["fave_fast_histories_total", "answered"] == 1
            server.held[0].allowed.release(1000)
            for asked, model in (((await before), old), (after, new)):
                assert asked.json()["model"] == checkpoints.content_digest(model.checkpoint)
                assert asked.json()["lists"][0]["items"] == model.recommend([[101]])[0].items
            assert (await reload).json() == {"model": after.json()["model"], "items": 24}
            found = samples((await client.get("/metrics")).text)
        assert before.result().json()["lists"] != after.json()["lists"]
        assert found["fave_fast_histories_total", "answered"] == 2
        assert found["fave_fast_reloads_total", "done"] == 1
        assert found["fave_fast_model_info", str(copied), after.json()["model"]] == 1

    asyncio.run(work())


def test_a_bad_checkpoint_changes_nothing(copied: Path) -> None:
    server = Server(copied, token=TOKEN)
    copied.write_bytes(copied.read_bytes()[:-1000])
    ask = post({"histories": [[101]]}, headers=AUTHORIZED)
    reload, answer, metrics = server.ask(
        post(None, "/v1/reload", headers=AUTHORIZED), ask, get("/metrics", headers=AUTHORIZED)
    )
    assert reload.status_code == 409
    assert "served.pt: truncated" in reload.json()["detail"]
    assert answer.status_code == 200
    assert samples(metrics.text)["fave_fast_reloads_total", "failed"] == 1


def test_probes_follow_the_worker_and_the_stop(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tiny_checkpoint, held=True)
    server.held[0].end = SystemExit("the worker dies")

    async def work() -> None:
        async with server.client() as client:
            assert [(await client.get(path)).status_code for path in ("/healthz", "/readyz")] == [200, 200]
            asked = asyncio.create_task(client.post(RECOMMEND, json={"histories": [[101]]}))
            server.held[0].allowed.release()
            assert (await asked).status_code == 503
            assert [(await client.get(path)).status_code for path in ("/healthz", "/readyz")] == [503, 503]
            late = await client.post(RECOMMEND, json={"histories": [[101]]})
            assert (late.status_code, late.headers["Retry-After"]) == (503, "1")

    with caplog.at_level(logging.CRITICAL + 1):
        asyncio.run(work())
    stopping = Server(tiny_checkpoint)
    stopping.service.stopping = True
    answers = stopping.ask(get("/healthz"), get("/readyz"), post({"histories": [[101]]}))
    assert [answer.status_code for answer in answers] == [200, 503, 200]


def test_a_failure_of_the_engine_is_a_500_and_the_next_request_is_answered(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tiny_checkpoint, held=True)
    server.held[0].allowed.release(1000)
    server.held[0].end = RuntimeError("out of luck")

    async def work() -> None:
        async with server.client() as client:
            failed = await client.post(RECOMMEND, json={"histories": [[101]]}, headers={"X-Request-ID": "r-1"})
            server.held[0].end = None
            assert (failed.status_code, failed.headers["X-Request-ID"]) == (500, "r-1")
            assert "out of luck" not in failed.text
            assert (await client.post(RECOMMEND, json={"histories": [[101]]})).status_code == 200

    with caplog.at_level(logging.ERROR):
        asyncio.run(work())
    assert [getattr(record, "fields", {}).get("request_id") for record in caplog.records] == ["r-1"]


def test_metrics_count_what_happened(tiny_checkpoint: Path) -> None:
    *_, answer = Server(tiny_checkpoint).ask(
        post({"histories": [[101, "never"], []]}), post({"histories": [[101]]}), post({}), get("/x"), get("/metrics")
    )
    found = samples(answer.text)
    expected = {
        ("fave_fast_http_requests_total", RECOMMEND, "200"): 2,
        ("fave_fast_http_requests_total", RECOMMEND, "422"): 1,
        ("fave_fast_http_requests_total", "other", "404"): 1,
        ("fave_fast_http_request_seconds_count", RECOMMEND): 3,
        ("fave_fast_http_requests_in_flight",): 1,
        ("fave_fast_histories_total", "answered"): 3,
        ("fave_fast_queue_seconds_count",): 3,
        ("fave_fast_queue_seconds_bucket", "+Inf"): 3,
        ("fave_fast_batch_histories_sum",): 3,
        ("fave_fast_popular_fallbacks_total",): 1,
        ("fave_fast_unknown_items_total",): 1,
        ("fave_fast_catalogue_items",): 24,
        ("fave_fast_catalogue_version",): 0,
        ("fave_fast_topk_fallback_share",): 0,
    }
    assert {key: found[key] for key in expected} == expected
    calls = found[("fave_fast_engine_seconds_count",)]
    assert found[("fave_fast_encoder_seconds_count",)] == found[("fave_fast_topk_seconds_count",)] == calls > 0
    parts = found[("fave_fast_encoder_seconds_sum",)] + found[("fave_fast_topk_seconds_sum",)]
    assert 0 < parts < found[("fave_fast_engine_seconds_sum",)]
    assert found[("fave_fast_queue_seconds_sum",)] > 0


def test_ids_and_log_lines(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fave_fast"):
        named, unnamed, forged = Server(tiny_checkpoint).ask(
            get("/readyz", headers={"X-Request-ID": "abc-1"}),
            get("/readyz"),
            get("/x", headers={"X-Request-ID": 'a"b c'}),
        )
    ids = [answer.headers["X-Request-ID"] for answer in (named, unnamed, forged)]
    assert ids[0] == "abc-1"
    assert [len(one) for one in ids[1:]] == [32, 32]
    assert named.headers["Server-Timing"].startswith("app;dur=")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert [(line["event"], line["request_id"], line["path"], line["status"]) for line in lines] == [
        ("request", ids[0], "/readyz", 200),
        ("request", ids[1], "/readyz", 200),
        ("request", ids[2], "/x", 404),
    ]
    with caplog.at_level(logging.INFO, logger="fave_fast"):
        caplog.clear()
        Server(tiny_checkpoint, log_requests=False).ask(get("/readyz"))
    assert caplog.records == []


def test_the_page_loads_nothing_from_elsewhere(tiny_checkpoint: Path) -> None:
    (page,) = Server(tiny_checkpoint).ask(get("/"))
    assert page.status_code == 200
    assert "http" not in page.text
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; connect-src 'self'; script-src 'sha256-")


def test_the_documentation_names_limits_and_refusals(tiny_checkpoint: Path) -> None:
    (answer,) = Server(tiny_checkpoint, k=7, token=TOKEN).ask(get("/openapi.json"))
    schema = answer.json()
    assert sorted(schema["paths"]) == ["/healthz", "/metrics", "/readyz", RECOMMEND, "/v1/reload"]
    asked = schema["components"]["schemas"]["RecommendRequest"]["properties"]
    assert (asked["k"]["default"], asked["k"]["maximum"], asked["histories"]["maxItems"]) == (7, 30, 4)
    operation = schema["paths"][RECOMMEND]["post"]
    assert sorted(operation["responses"]) == ["200", "400", "401", "408", "413", "422", "500", "503"]
    assert operation["security"]


def test_limits_that_fit() -> None:
    with pytest.raises(InputError, match="limits of k and deny are 1000 and 25; expected no more than 1024 together"):
        Limits(k=1000, deny=25)
    with pytest.raises(InputError, match="limit of history is 0; expected at least 1"):
        Limits(history=0)


BAD_COMMANDS = [
    ("--ckpt none.pt", "none.pt: cannot read the checkpoint"),
    ("--ckpt MODEL --port 65536", "--port is 65536; expected at most 65535"),
    ("--ckpt MODEL --host nowhere.invalid --port 0", "cannot listen on nowhere.invalid, port 0"),
    ("--ckpt MODEL --port 0 --topk 300", "--topk is 300; expected no more than --max-topk, 200"),
    ("--ckpt MODEL --port 0 --max-queue 9", "--max-histories is 256; expected no more than --max-queue, 9"),
    ("--ckpt MODEL --port 0 --max-topk 900", "limits of k and deny are 900 and 800"),
    ("--ckpt MODEL --port 0 --deny none.txt", "none.txt: cannot read the denied items"),
    ("--ckpt MODEL --port 0 --token-file none.txt", "none.txt: cannot read the token"),
    ("--ckpt MODEL --port 0 --token-file empty.txt", "empty.txt: holds no token"),
    ("--ckpt MODEL --port 0 --token-file blank.txt", "blank.txt: holds no token"),
]


@pytest.mark.parametrize(("options", "message"), BAD_COMMANDS)
def test_bad_usage(
    options: str, message: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("blank.txt").write_text("two words")
    with pytest.raises(InputError) as caught:
        serve.main(options.replace("MODEL", str(tiny_checkpoint)).split())
    assert message in str(caught.value)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAVE_FAST_TOKEN", raising=False)
    assert serve.read_token(None) is None
    monkeypatch.setenv("FAVE_FAST_TOKEN", "by-environment")
    assert serve.read_token(None) == "by-environment"
    (tmp_path / "token").write_text("by-file\n")
    assert serve.read_token(str(tmp_path / "token")) == "by-file"
    monkeypatch.setenv("FAVE_FAST_TOKEN", "")
    with pytest.raises(InputError, match="FAVE_FAST_TOKEN: holds no token"):
        serve.read_token(None)


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "fave_fast.serving.server", raising=False)
    with pytest.raises(InputError, match=r"uvicorn is not installed; expected pip install 'fave-fast\[serve\]'"):
        serve.main(["--ckpt", str(tiny_checkpoint)])


class Process:
    """`python -m fave_fast.serve` on a free port, and its log."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [sys.executable, "-m", "fave_fast.serve", "--ckpt", str(checkpoint), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.address = self.process.stderr.readline().split("http://")[1].split()[0]
        self.log: list[str] = []
        self._heard = threading.Condition()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                self.log.append(line)
                self._heard.notify_all()

    def wait_for(self, event: str) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: self._said(event), PATIENCE), self.log

    def ended(self) -> list[str]:
        """The whole log."""
        self._listener.join(PATIENCE)
        return self.log

    def _said(self, event: str) -> bool:
        return any(json.loads(line)["event"] == event for line in self.log)


def keep_asking(address: str, history: list[int], stop: threading.Event, found: list[tuple[str, list[int]]]) -> None:
    """Ask until told to stop, or until the server takes no more; anything but a whole answer raises."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    body = json.dumps({"histories": [history], "k": 5})
    while not stop.is_set():
        try:
            connection.request("POST", RECOMMEND, body, {"Content-Type": "application/json"})
        except OSError:
            return  # refused before it was accepted
        try:
            answer = connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return  # closed while idle: the request was never read
        assert answer.status == 200
        content = json.loads(answer.read())
        found.append((content["model"], content["lists"][0]["items"]))
        if answer.headers.get("Connection") == "close":
            return


def test_a_process_reloads_and_stops_under_load(copied: Path) -> None:
    old = Recommender.from_pretrained(copied)
    server = Process(copied)
    histories = [[101 + at, 103 + at] for at in range(6)]
    stop = threading.Event()
    found: list[list[tuple[str, list[int]]]] = [[] for _ in histories]
    failures: list[BaseException] = []

    def ask(at: int) -> None:
        try:
            keep_asking(server.address, histories[at], stop, found[at])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(histories))]
    for thread in threads:
        thread.start()
    while not all(found) and not failures:  # each has a list of the old model
        assert server.process.poll() is None
    changed(copied)
    new = Recommender.from_pretrained(copied)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("reloaded")
    seen = [len(one) for one in found]
    while any(len(one) < before + 5 for one, before in zip(found, seen, strict=True)) and not failures:
        assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
    stop.set()
    assert server.process.wait(PATIENCE) == 0
    assert failures == []
    digests = {checkpoints.content_digest(one.checkpoint): one for one in (old, new)}
    for history, answers in zip(histories, found, strict=True):
        lists = {digest: one.recommend([history], 5)[0].items for digest, one in digests.items()}
        assert all(items == lists[model] for model, items in answers)
        assert [model for model, _ in answers] == sorted((model for model, _ in answers), key=list(digests).index)
        assert len({model for model, _ in answers}) == 2
    lines = [json.loads(line) for line in server.ended()]
    assert [line["event"] for line in lines if line["event"] != "request"] == ["reloaded", "stopping"]
    # Whatever the server read has reached its asker: what a client took for a closed connection was never accepted.
    statuses = [line["status"] for line in lines if line["event"] == "request"]
    assert statuses == [200] * sum(map(len, found))
