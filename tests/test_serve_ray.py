from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench import replicas
from fave_fast import checkpoint as checkpoints
from fave_fast.engine import Recommender
from fave_fast.errors import InputError
from fave_fast.serve_ray import RayOptions, app, deployment

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({}, "ckpt: Field required"),
    ({"ckpt": "m.pt", "top": "5"}, "top: Unexpected keyword argument"),
    ({"ckpt": "m.pt", "replicas": "two"}, "replicas: Input should be a valid integer"),
    ({"ckpt": "m.pt", "replicas": "0"}, "replicas and cpus are 0 and 1; expected at least 1, and above 0"),
    ({"ckpt": "m.pt", "cpus": "0"}, "replicas and cpus are 1 and 0; expected at least 1, and above 0"),
    ({"ckpt": "m.pt", "max_queue": "9"}, "--max-histories is 256; expected no more than --max-queue, 9"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named_before_anything_is_deployed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        app(arguments)
    assert message in str(caught.value)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"expected pip install 'fave-fast\[ray\]'"):
        deployment(RayOptions("model.pt"))


@pytest.fixture(scope="module")
def port(tiny_checkpoint: Path) -> Iterator[int]:
    """Of two replicas on a Ray cluster of this machine."""
    pytest.importorskip("ray.serve", exc_type=ImportError)
    with replicas.deployed(RayOptions(str(tiny_checkpoint), topk=5, device="cpu")) as port:
        yield port


@pytest.mark.slow
def test_it_answers_as_the_server_alone(port: int, tiny_checkpoint: Path) -> None:
    recommender = Recommender.from_pretrained(tiny_checkpoint)
    histories: list[list[Any]] = [[101, 103, 105], ["never", 109], []]
    seen: set[str] = set()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=replicas.PATIENCE) as client:
        answer = client.post(
            "/v1/recommend", json={"histories": histories, "deny": [102]}, headers={"X-Request-ID": "r-1"}
        )
        expected = recommender.recommend(histories, 5, deny=[102])
        assert [(one["items"], one["scores"], one["popular"]) for one in answer.json()["lists"]] == [
            (one.items, one.scores, one.popular) for one in expected
        ]
        assert answer.headers["X-Request-ID"] == "r-1"
        bad = client.post("/v1/recommend", json={"histories": [[1.5]]})
        assert (bad.status_code, bad.json()["detail"][0]["loc"]) == (422, ["body", "histories", 0, 0])
        assert client.post("/v1/recommend", content=b" " * (2 << 20)).status_code == 413
        assert [client.get(path).status_code for path in ("/", "/healthz", "/readyz", "/docs")] == [200] * 4
        while len(seen) < replicas.REPLICAS:  # the proxy chooses among them at random
            families = text_string_to_metric_families(client.get("/metrics").text)
            seen |= {sample.labels["replica"] for family in families for sample in family.samples}


@pytest.mark.slow
def test_a_killed_replica_takes_only_what_it_was_answering_with_it(port: int, tiny_checkpoint: Path) -> None:
    histories = [[101 + at, 103 + at] for at in range(8)]
    callers = replicas.Callers(port, [Recommender.from_pretrained(tiny_checkpoint)], histories, k=5)
    outcome = replicas.kill_one(callers, lambda callers: callers.each_has(20))
    assert all(one.right for one in outcome.asked if one.status == 200)
    for one in outcome.failed:
        assert one.status == 500
        assert one.began <= outcome.dead
        assert one.ended >= outcome.killed
    assert any(one.status == 200 and outcome.killed < one.began < outcome.recovered for one in outcome.asked)


@pytest.mark.slow
def test_a_new_checkpoint_takes_over_and_no_request_is_lost(port: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    kept = checkpoints.load(tiny_checkpoint)
    weights = {name: -weight if "item_embedding" in name else weight for name, weight in kept.weights.items()}
    checkpoints.save(replace(kept, weights=weights), tmp_path / "new.pt")
    old, new = (Recommender.from_pretrained(path) for path in (tiny_checkpoint, tmp_path / "new.pt"))
    callers = replicas.Callers(port, [old, new], [[101 + at, 103 + at] for at in range(8)], k=5)
    try:
        callers.each_has(5)
        replicas.deploy(RayOptions(str(tmp_path / "new.pt"), topk=5, device="cpu"))
        callers.each_has(5)
    finally:
        asked = callers.stop()
    assert {(one.status, one.right) for one in asked} == {(200, True)}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/recommend", json={"histories": [[101]]})
    assert answer.json()["lists"][0]["items"] == new.recommend([[101]], 5)[0].items
