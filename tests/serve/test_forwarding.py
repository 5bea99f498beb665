"""Two servers over one store: requests go to the holder of the user's lease, and learning happens nowhere else."""

import contextlib
import socket
import threading
import time

import httpx
import openai
import pytest
from tiny_chat_model import service_of
from web import NAME, client_of, listening

import ttt
from ttt.serve.http.app import create_app
from ttt.serve.http.forwarding import Claims, Forwarding
from ttt.serve.http.limits import RateLimits
from ttt.serve.http.metrics import Metrics
from ttt.serve.http.state import Server
from ttt.serve.keys import Keys, NoKeys, add_key
from ttt.store import StaleLease

CHAT = [{"role": "user", "content": "My dog is called Biscuit."}]
ASK = {"model": NAME, "messages": CHAT, "max_tokens": 3, "temperature": 0}


class InMemory:
    """A directory for servers of one process."""

    def __init__(self, claims):
        self.claims = claims

    async def claim(self, user, address):
        return self.claims.claim(user, address)

    async def gone(self, address):
        self.claims.gone(address)


class Replica:
    def __init__(self, service, url, address):
        self.service, self.url, self.address = service, url, address


@contextlib.contextmanager
def replica(model, store, claims, keys=None, lease_seconds=30.0, **options):
    service = service_of(model, store, lease_seconds=lease_seconds)
    server = Server(service, keys or NoKeys(), NAME, Metrics(), RateLimits(), 60.0)
    app = create_app(server, **options)
    try:
        with listening(app) as address:
            claims.alive(address)
            with listening(Forwarding(app, server, InMemory(claims), address, **_largest(options))) as url:
                yield Replica(service, url, address)
    finally:
        if service.alive:
            service.drain()


def _largest(options):
    return {"largest": options["largest_body"]} if "largest_body" in options else {}


@pytest.fixture
def pair(model, tmp_path):
    claims = Claims(30.0)
    with replica(model, tmp_path / "s", claims) as one, replica(model, tmp_path / "s", claims) as two:
        yield one, two


def test_all_turns_of_a_user_are_learnt_by_the_server_that_was_asked_first(pair):
    one, two = pair
    for number, url in enumerate([one.url, two.url, two.url, one.url], 1):
        found = client_of(url, user="ada", learn="wait").chat.completions.create(**ASK)
        assert (found.ttt["learning"], found.ttt["updates"]) == ("stored", number)
    assert one.service.sessions.users == ("ada",)
    assert two.service.sessions.users == ()
    assert client_of(two.url, user="bob", learn="wait").chat.completions.create(**ASK).ttt["learning"] == "stored"
    assert two.service.sessions.users == ("bob",)
    shown = httpx.get(f"{one.url}/v1/users/bob", params={"x": "1"}).json()
    assert (shown["online"], shown["updates"]) == (True, 1)
    assert httpx.delete(f"{one.url}/v1/users/bob").json() == {"id": "bob", "deleted": True}
    assert two.service.sessions.users == ()


def test_streams_errors_and_other_answers_come_through_as_they_are(pair):
    one, two = pair
    client_of(one.url, user="ada").chat.completions.create(**ASK)
    stream = list(client_of(two.url, user="ada", learn="wait").chat.completions.create(stream=True, **ASK))
    assert stream[-1].ttt["learning"] == "stored"
    plain = client_of(one.url, user="ada", learn="off").chat.completions.create(**ASK)
    there = client_of(two.url, user="ada", learn="off").chat.completions.create(**ASK)
    assert there.choices[0].message.content == plain.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client_of(two.url, user="ada").chat.completions.create(**{**ASK, "model": "other"})
    zipped = httpx.get(f"{two.url}/v1/users/ada/export")
    assert zipped.content[:2] == b"PK"
    assert int(zipped.headers["content-length"]) == len(zipped.content)
    assert two.service.sessions.users == ()


def test_the_other_server_checks_the_key_again(model, tmp_path):
    path, claims = tmp_path / "keys.json", Claims(30.0)
    ada, bob = add_key(path, "ada"), add_key(path, "bob")
    with (
        replica(model, tmp_path / "s", claims, Keys(path)) as one,
        replica(model, tmp_path / "s", claims, Keys(path)) as two,
    ):
        client_of(one.url, ada, learn="wait").chat.completions.create(**ASK)
        assert client_of(two.url, ada, learn="wait").chat.completions.create(**ASK).ttt["updates"] == 2
        routed = {"serve_multiplexed_model_id": "ada"}  # routes, but says nothing about who is asking
        found = client_of(two.url, bob, learn="wait").chat.completions.create(**ASK, extra_headers=routed)
        assert found.ttt["updates"] == 1
        assert httpx.get(f"{two.url}/v1/users/ada", headers={"authorization": f"Bearer {bob}"}).status_code == 403
        assert httpx.get(f"{two.url}/v1/users/ada").status_code == 401
        assert one.service.sessions.users == ("ada",)


def test_without_its_holder_a_user_is_read_and_learns_again_when_the_lease_has_ended(model, tmp_path):
    claims, store = Claims(30.0), ttt.Store(tmp_path / "s")
    with replica(model, store, claims, lease_seconds=1.0) as one:
        lease = store.lease("ada", 2.0)  # of a server that was killed
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            dead = "http://127.0.0.1:{}".format(*nobody.getsockname()[1:])
            claims.alive(dead, ["ada"])
            found = client_of(one.url, user="ada", learn="wait").chat.completions.create(**ASK)
        assert found.ttt["learning"].startswith("refused: another server holds the lease")
        assert claims.claim("ada", one.address) == one.address
        began = time.monotonic()
        while found.ttt["learning"] != "stored":
            assert time.monotonic() - began < 4
            time.sleep(0.05)
            found = client_of(one.url, user="ada", learn="wait").chat.completions.create(**ASK)
        assert found.ttt["updates"] == 1
        with pytest.raises(StaleLease):
            lease.renew()


def test_an_answer_that_is_lost_is_said_to_be_unknown(model, tmp_path):
    claims = Claims(30.0)
    with replica(model, tmp_path / "s", claims) as one, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        claims.alive("http://127.0.0.1:{}".format(*listener.getsockname()[1:]), ["ada"])

        def die():
            connection, _ = listener.accept()
            connection.recv(100)
            connection.close()

        threading.Thread(target=die, daemon=True).start()
        with pytest.raises(openai.APIStatusError) as lost:
            client_of(one.url, user="ada").chat.completions.create(**ASK)
        assert (lost.value.status_code, lost.value.code) == (502, "answer_lost")


def test_limits_hold_for_what_would_be_passed_on(model, tmp_path):
    claims = Claims(30.0)
    with (
        replica(model, tmp_path / "s", claims, largest_body=1000, hosts=["127.0.0.1"]) as one,
        replica(model, tmp_path / "s", claims, largest_body=1000, hosts=["127.0.0.1"]) as two,
    ):
        client_of(one.url, user="ada").chat.completions.create(**ASK)
        headers, path = {"x-ttt-user": "ada"}, f"{two.url}/v1/chat/completions"
        assert httpx.post(path, headers=headers, content=b"x" * 2000).status_code == 413
        assert httpx.post(path, headers={**headers, "host": "evil.example"}, json=ASK).status_code == 403
        assert httpx.post(path, headers=headers, content=b"{").status_code == 400


def test_a_client_that_hangs_up_is_noticed_by_the_other_server(pair):
    one, two = pair
    client_of(one.url, user="ada", learn="wait").chat.completions.create(**ASK)
    stream = client_of(two.url, user="ada").chat.completions.create(
        **{**ASK, "max_tokens": 400}, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks), next(chunks)  # the first one comes before anything is generated
    stream.close()
    began = time.monotonic()
    while not one.service.batch.idle:
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    assert one.service.sessions.get("ada").updates == 1


def test_claims_go_to_others_when_a_server_is_silent_or_gone():
    claims = Claims(0.2, most=2)
    claims.alive("one")
    claims.alive("two")
    assert [claims.claim("ada", each) for each in ("one", "two", "one")] == ["one"] * 3
    claims.alive("two", ["ada"])  # the lease decides
    assert claims.claim("ada", "one") == "two"
    claims.gone("two")
    assert claims.claim("ada", "one") == "one"
    time.sleep(0.25)
    claims.alive("two")
    assert claims.claim("ada", "two") == "two"
    for user in "abc":
        claims.claim(user, "two")
    assert len(claims._holders) == 2
