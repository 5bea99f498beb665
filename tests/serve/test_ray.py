"""Replicas in a Ray cluster on this machine. ``make test-ray`` runs this in a virtual environment with Ray."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

import ttt
from bench import postgres
from bench.serving.account import account_for
from bench.serving.servers import free_port, tiny_folder
from bench.serving.talk import REFUSED, STORED, Talker
from ttt.serve.main import ServeOptions, build_learner

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
from ttt.serve.ray import RayOptions, build, options_from, options_from_environment  # noqa: E402

NAME = "tiny-chat"
LEASE = 3.0


def pids(app):
    """The processes of an application's replicas, by the title that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"ray::ServeReplica:{app}:".encode()):
                found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, configure_logging=False)
    port = free_port()
    ray.serve.start(http_options={"port": port})
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / NAME)


@contextlib.contextmanager
def serving(folder, tmp_path, store, **options):
    """The options and the application's name, while two replicas run."""
    calibration = tmp_path / "calibration"
    options = RayOptions(
        model=folder, store=store, context=512, calibration=calibration, study_after=0.0, lease_seconds=LEASE,
        cpus=1.0, drain_seconds=20.0, **options,
    )  # fmt: skip
    app = f"test{os.getpid()}"
    ray.serve.run(build(options), name=app, route_prefix="/")
    try:
        yield options, app
    finally:
        ray.serve.delete(app)


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize("index", ["sqlite", "postgresql"])
def test_killed_replicas_lose_nothing_and_their_users_move(cluster, folder, tmp_path, index):
    with contextlib.ExitStack() as stack:
        store = str(tmp_path / "store")
        if index == "postgresql":
            store = f"{stack.enter_context(postgres.running())()}&blobs=file://{tmp_path}/blobs"
        learner, tokenizer = build_learner(
            ServeOptions(model=folder, context=512, calibration=tmp_path / "calibration")
        )  # fmt: skip
        _, app = stack.enter_context(serving(folder, tmp_path, store))
        stop = threading.Event()
        talkers = [
            # Every second user tells Ray where to send their requests, and the others go to any replica.
            Talker(f"user-{at}", [cluster], NAME, pause=1.0, stray=0.0, stop=stop, seed=at,
                   headers={"serve_multiplexed_model_id": f"user-{at}"} if at % 2 else {})
            for at in range(8)
        ]  # fmt: skip
        for talker in talkers:
            talker.start()
        wait_for(lambda: all(talker.attempts for talker in talkers), 60)
        assert not [a.why for t in talkers for a in t.attempts if a.outcome == REFUSED]  # forwarded, not refused
        for _ in range(2):
            before = pids(app)
            assert len(before) == 2
            killed = time.monotonic()
            os.kill(before[0], signal.SIGKILL)
            wait_for(lambda before=before: len(set(pids(app)) - {before[0]}) == 2, 60)
            wait_for(
                lambda killed=killed: all(
                    any(a.outcome == STORED and a.began > killed for a in talker.attempts) for talker in talkers
                ),
                60,
            )
        stop.set()
        for talker in talkers:
            talker.join(60)
            assert not talker.is_alive()
        ray.serve.delete(app)  # drains the replicas
        attempts = {talker.user: talker.attempts for talker in talkers}
        with ttt.Store(store) as opened:
            found = account_for(opened, attempts, learner, tokenizer, 512)
            for talker in talkers:
                opened.lease(talker.user).release()  # nobody holds it
    print(found)
    assert found.faults == {}
    assert found.acknowledged >= 16


def test_options_are_read_from_the_environment_and_checked(tmp_path):
    found = options_from_environment(
        {"TTT_SERVE_STORE": "s", "TTT_SERVE_REPLICAS": "3", "TTT_SERVE_KEYS": "k", "A": "b"}
    )
    assert (found.store, found.replicas, found.keys) == ("s", 3, Path("k").resolve())
    assert options_from({"lr": "0.5", "cpus": 2}).lr == 0.5
    for wrong, why in [({"port": 1}, "port"), ({"slots": "x"}, "slots"), ({"replicas": 0}, "replicas"),
                       ({"most_replicas": 1}, "most_replicas")]:  # fmt: skip
        with pytest.raises(ValueError, match=why):
            options_from(wrong)


def test_scaling_down_drains_replicas(cluster, folder, tmp_path):
    store = str(tmp_path / "store")
    with serving(folder, tmp_path, store) as (options, app):
        body = {"model": NAME, "messages": [{"role": "user", "content": "I like tea."}], "max_tokens": 1}

        def say(user):
            answer = httpx.post(f"{cluster}/v1/chat/completions", json=body, headers={"x-ttt-user": user}, timeout=60)
            return answer.json()["ttt"]["learning"]

        assert [say(f"user-{at}") for at in range(6)] == ["queued"] * 6
        fewer = RayOptions(**{**options.__dict__, "replicas": 1})
        ray.serve.run(build(fewer), name=app, route_prefix="/")
        wait_for(lambda: len(pids(app)) == 1, 60)
    with ttt.Store(store) as opened:
        assert [opened.get(f"user-{at}").meta["updates"] for at in range(6)] == [1] * 6
