"""Versions, retention and forgetting, on every kind of store."""

import time
import warnings

import pytest
import torch
from states import assert_same_state, bits, put, small_state

import ttt
from ttt.store import DamagedState, LeaseHeld, StaleLease, UnknownUser, UnknownVersion


def test_any_dict_of_tensors_comes_back_to_the_bit(store):
    wide = torch.randn(6, 8)
    tensors = {
        "fp32": torch.randn(3, 5),
        "bf16": torch.randn(7, 1).bfloat16(),
        "fp16": torch.randn(1, 33).half(),
        "fp64": torch.randn(2, 2, 2).double(),
        "int64": torch.tensor([-1, 2**62]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": wide.T,
        "sliced": wide[::2, 1:3],
        "same storage": wide,
        "requires grad": torch.nn.Parameter(torch.randn(3)),
        "naïve/../name": torch.ones(1),
    }
    meta = {"tokens": 12, "layers": ["a", "b"], "nested": {"x": None, "é": 0.1}}
    with store.lease("ada") as lease:
        assert store.put(lease, tensors, meta) == 1
    state = store.get("ada")
    assert (state.user, state.version, state.meta, state.damaged) == ("ada", 1, meta, ())
    assert_same_state(state.tensors, tensors)
    assert abs(state.created - time.time()) < 60
    state.tensors["fp32"].zero_()  # its own memory
    assert bits(store.get("ada").tensors["fp32"]) == bits(tensors["fp32"])


def test_an_empty_state_is_a_state(store):
    with store.lease("ada") as lease:
        store.put(lease, {})
    assert store.get("ada").tensors == {}
    assert store.get("ada").meta == {}


def test_versions_count_up_and_stay_readable(store, url):
    for seed in range(1, 5):
        assert put(store, "ada", seed) == seed
    put(store, "bob", 9)
    with ttt.Store(url) as other:  # another process's view
        for seed in range(1, 5):
            assert_same_state(other.get("ada", seed).tensors, small_state(seed))
        assert other.get("ada").version == 4
        assert [v.number for v in other.history("ada")] == [4, 3, 2, 1]
        assert [(u.name, u.head, u.versions) for u in other.users()] == [("ada", 4, 4), ("bob", 1, 1)]
        assert next(u.bytes for u in other.users()) == sum(v.size for v in other.history("ada"))


def test_unknown_users_and_versions_are_errors(store):
    with pytest.raises(UnknownUser, match="'ada'"):
        store.get("ada")
    for call in (store.history, store.forget, lambda user: store.rollback(user, 1)):
        with pytest.raises(UnknownUser, match="'ada'"):
            call("ada")
    with store.lease("ada"), pytest.raises(UnknownUser):  # leased, never written
        store.get("ada")
    assert store.users() == []
    for seed in range(3):
        put(store, "ada", seed)
    with pytest.raises(UnknownVersion, match="no version 7; it has 1-3"):
        store.get("ada", 7)
    with pytest.raises(UnknownVersion):
        store.rollback("ada", 0)


def test_rollback_is_bit_exact_and_never_goes_back_in_number(store):
    for seed in (1, 2, 3):
        put(store, "ada", seed)
    assert store.rollback("ada", 1) == 4
    state = store.get("ada")
    assert (state.version, state.meta) == (4, {"seed": 1})
    assert_same_state(state.tensors, small_state(1))
    assert [v.source for v in store.history("ada")] == [1, None, None, None]
    assert store.history("ada")[0].key == store.history("ada")[-1].key  # nothing was copied
    assert put(store, "ada", 5) == 5
    assert store.rollback("ada", 4) == 6
    assert_same_state(store.get("ada").tensors, small_state(1))
    with store.lease("ada"):
        with pytest.raises(LeaseHeld):
            store.rollback("ada", 2)
        assert store.get("ada").version == 6
    with store.lease("ada") as lease:
        assert store.rollback("ada", 2, lease=lease) == 7
        with pytest.raises(ValueError, match="lease must be one of 'bob'"):
            store.rollback("bob", 1, lease=lease)


# -- retention and garbage ----------------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_the_young_versions(store):
    for seed in range(1, 7):
        put(store, "ada", seed)
    put(store, "bob", 1)
    assert store.gc(keep_last=2, keep_days=1, grace=0) == (0, 0, 0, 0)  # all are young
    sizes = {v.number: v.size for v in store.history("ada")}
    removed = store.gc(keep_last=2, keep_days=0, grace=0)
    assert removed == (4, 0, 4, sum(sizes[n] for n in (1, 2, 3, 4)))
    assert [v.number for v in store.history("ada")] == [6, 5]
    with pytest.raises(UnknownVersion, match="it has 5-6"):
        store.get("ada", 4)
    assert_same_state(store.get("ada").tensors, small_state(6))
    assert store.get("bob").version == 1
    assert put(store, "ada", 7) == 7


def test_a_blob_that_a_rollback_names_outlives_its_version(store):
    for seed in (1, 2):
        put(store, "ada", seed)
    store.rollback("ada", 1)
    assert store.gc(keep_last=1, keep_days=0, grace=0)[:3] == (2, 0, 1)
    assert_same_state(store.get("ada").tensors, small_state(1))
    assert store.verify().sound


def test_grace_keeps_young_garbage(local):
    put(local, "ada", 1)
    folder = local.history("ada")[0].key.rpartition("/")[0]
    local.blobs.write(f"{folder}/{'0' * 32}.safetensors", b"a write in progress")
    assert local.gc(keep_days=0, grace=60) == (0, 0, 0, 0)
    assert len(local.verify().orphans) == 1
    assert local.gc(keep_days=0, grace=0) == (0, 0, 1, 19)
    assert local.verify().orphans == []


def test_a_blob_collected_before_its_commit_refuses_the_commit(store, monkeypatch):
    """A writer that slept past the grace between its blob and its commit."""
    put(store, "ada", 1)
    write = store.blobs.write

    def write_then_sleep(key, data):
        write(key, data)
        assert store.gc(keep_days=0, grace=0).blobs == 1

    monkeypatch.setattr(store.blobs, "write", write_then_sleep)
    with store.lease("ada") as lease, pytest.raises(ttt.store.StorageFailure, match="gone or cut short"):
        store.put(lease, small_state(2))
    assert store.get("ada", strict=True).version == 1
    assert store.verify().sound


def test_users_that_never_wrote_are_collected(store):
    with store.lease("ada"):
        assert store.gc(grace=0).users == 0
    assert store.gc(grace=60).users == 0
    assert store.gc(grace=0).users == 1
    assert store.index.user_rows() == []


# -- forgetting ---------------------------------------------------------------------------------------------------


def test_forgotten_users_are_unknown_and_begin_anew(store):
    put(store, "ada", 1)
    put(store, "ada", 2)
    put(store, "bob", 3)
    lease = store.lease("ada")
    keys = [v.key for v in store.history("ada")]
    store.forget("ada")  # a live lease does not stop it
    for call in (store.get, store.history, store.forget):
        with pytest.raises(UnknownUser):
            call("ada")
    assert [store.blobs.size(key) for key in keys] == [None, None]
    assert [u.name for u in store.users()] == ["bob"]
    with store.lease("ada") as fresh:
        assert fresh.token > lease.token
        with pytest.raises(StaleLease):  # nor does it write into the new user of that name
            store.put(lease, small_state(4))
        assert store.put(fresh, small_state(5)) == 1
        lease.release()
        with pytest.raises(LeaseHeld):
            store.lease("ada")
    assert_same_state(store.get("bob").tensors, small_state(3))
    assert store.verify().orphans == []


def test_equal_states_of_two_users_share_no_name(local):
    put(local, "ada", 1)
    put(local, "bob", 1)
    a, b = (local.history(user)[0] for user in ("ada", "bob"))
    assert a.sha256 == b.sha256
    # The first part, two digits that spread the folders, is the same for one pair in 256.
    (_, folder_a, name_a), (_, folder_b, name_b) = (version.key.split("/") for version in (a, b))
    assert folder_a != folder_b
    assert name_a != name_b
    assert a.sha256 not in a.key


# -- input --------------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd", "/absolute", ".", "..", "a/b\\c", "'; DROP TABLE ttt_users; --", "%s ? :x $1", "é" * 256,
    "\n\r\t", "[red]ada[/red]", "CON", " ", "𝕒", "nul\u2028",
]  # fmt: skip


def test_any_text_is_an_id_and_none_is_part_of_a_path(store):
    for seed, user in enumerate(HOSTILE):
        put(store, user, seed)
    assert sorted(u.name for u in store.users()) == sorted(HOSTILE)
    for seed, user in enumerate(HOSTILE):
        assert_same_state(store.get(user).tensors, small_state(seed))
        store.forget(user)
    assert store.users() == []
    assert list(store.blobs.list_folders()) == []


@pytest.mark.parametrize("user", ["", "a\0b", "x" * 513, "é" * 257, "\ud800", 7, None, b"ada"])
def test_other_ids_are_refused(local, user):
    with pytest.raises(ValueError if user is None or isinstance(user, str) else TypeError, match="user must"):
        local.lease(user)
    assert local.index.user_rows() == []


@pytest.mark.parametrize(
    ("tensors", "meta", "match"),
    [
        ({"a": [1.0]}, None, r"tensors\['a'\] must be a dense tensor with data, got list"),
        ({"a": torch.ones(2).to_sparse()}, None, "dense tensor with data, got a torch.sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, None, "meta device"),
        ({1: torch.ones(1)}, None, "has the name 1"),
        ({"__metadata__": torch.ones(1)}, None, "__metadata__"),
        ({}, [1], "meta must be a dict"),
        ({}, {1: 2}, "gives back unchanged"),
        ({}, {"a": (1, 2)}, "gives back unchanged"),
        ({}, {"a": float("nan")}, "meta must be a dict that JSON can hold"),
        ({}, {"a": object()}, "meta must be a dict that JSON can hold"),
        ({}, {"a": "x" * 70000}, "at most 65536 bytes"),
    ],
)
def test_states_that_are_refused_change_nothing(local, tensors, meta, match):
    put(local, "ada", 1)
    with local.lease("ada") as lease, pytest.raises((TypeError, ValueError), match=match):
        local.put(lease, tensors, meta)
    assert local.get("ada", strict=True).version == 1
    assert local.verify().orphans == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mysql://host/db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///a.db?blob=x",
        "postgresql://host/db",
        "file://host/x",
    ],
)
def test_other_urls_are_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="url must be a path"):
        ttt.Store(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", [None, 3, True, b"bytes", ["list"]])
def test_a_url_that_is_no_text_is_refused_and_creates_nothing(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"url must be a path, file:///path.*, got"):
        ttt.Store(url)
    assert list(tmp_path.iterdir()) == []


def test_wrong_types_are_refused_by_name_and_change_nothing(local, tmp_path):
    put(local, "ada", 1)
    with local.lease("ada") as lease:
        for call, error, match in (
            (lambda: local.put(None, {}), TypeError, r"lease must be what Store.lease returns, got None"),
            (lambda: local.put("ada", {}), TypeError, r"lease must be what Store.lease returns, got str 'ada'"),
            (lambda: local.put(lease, None), TypeError, r"tensors must be a dict of tensors by name, got None"),
            (lambda: local.put(lease, [torch.ones(1)]), TypeError, "tensors must be a dict .* got list"),
            (lambda: local.put(lease, {}, 3), ValueError, r"meta must be a dict"),
            (lambda: local.rollback("ada", 1, lease="ada"), TypeError, "Store.lease returns, or None, got str"),
            (lambda: local.rollback("ada", "1"), TypeError, r"version must be a whole number, got '1'"),
            (lambda: local.get("ada", True), TypeError, r"version must be a whole number, got True"),
            (lambda: local.get("ada", [1]), TypeError, r"version must be a whole number, got \[1\]"),
            (lambda: local.get("ada", strict="no"), TypeError, r"strict must be True or False, got str 'no'"),
            (lambda: local.lease("ada", steal=1), TypeError, r"steal must be True or False, got int 1"),
            (lambda: local.get(None), ValueError, r"user must be the name of a user, got None"),
            (lambda: local.get(["ada"]), TypeError, r"user must be a string, got list"),
            (lambda: local.history(3), TypeError, r"user must be a string, got int 3"),
            (lambda: local.history("\ud800"), ValueError, r"user must be text that UTF-8 can hold"),
            (lambda: local.forget({}), TypeError, r"user must be a string, got dict {}"),
            (lambda: ttt.Store(tmp_path / "new", create="yes"), TypeError, r"create must be True or False"),
        ):  # fmt: skip
            with pytest.raises(error, match=match):
                call()
    assert [version.number for version in local.history("ada")] == [1]
    assert not (tmp_path / "new").exists()


def test_a_store_that_must_exist_is_not_created(url):
    with pytest.raises(ttt.store.StorageFailure, match="there is no store"):
        ttt.Store(url, create=False)
    with ttt.Store(url) as store:
        put(store, "ada", 1)
    with ttt.Store(url, create=False) as store:
        assert_same_state(store.get("ada").tensors, small_state(1))


def test_urls_of_sqlite_name_an_index_and_a_folder_of_blobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url, index, blobs in (
        ("plain", "plain/index.db", "plain/blobs"),
        (f"file://{tmp_path}/with%20space", "with space/index.db", "with space/blobs"),
        ("sqlite:///relative/x.db", "relative/x.db", "relative/blobs"),
        (f"sqlite:///{tmp_path}/absolute.db?blobs=file://{tmp_path}/there", "absolute.db", "there"),
    ):
        with ttt.Store(url) as store:
            put(store, "ada", 1)
        assert (tmp_path / index).is_file()
        assert len(list((tmp_path / blobs).glob("??/*/*.safetensors"))) == 1


def test_errors_do_not_show_a_password():
    with pytest.raises(ValueError, match="url must be") as refused:
        ttt.Store("postgresql://ada:secret@host/db")
    assert "secret" not in str(refused.value)


def test_other_schema_versions_are_refused(tmp_path):
    store = ttt.Store(tmp_path)
    store.index.connection().execute("PRAGMA user_version = 3")
    store.close()
    with pytest.raises(ttt.store.StorageFailure, match="schema version 3; this release reads 2"):
        ttt.Store(tmp_path)


def test_a_store_is_opened_and_read_while_another_writes(tmp_path):
    with ttt.Store(tmp_path) as store:
        put(store, "ada", 1)
        with store.index.transaction() as run:
            run("UPDATE ttt_users SET expires = 0")
            with ttt.Store(tmp_path, timeout=0.001) as other:
                assert_same_state(other.get("ada").tensors, small_state(1))


def test_reading_warns_of_nothing_when_all_is_well(local):
    put(local, "ada", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local.get("ada")
    with pytest.raises(UnknownVersion):
        local.get("ada", 2, strict=True)
    assert issubclass(DamagedState, ttt.store.StoreError)
