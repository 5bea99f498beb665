"""`ttt.load` of randomly changed files: refused with nothing changed, or a model that goes on learning.

TTT_FUZZ_EXAMPLES sets the number of files for each test.
"""

import json
import math
import os

import torch
from forged import forge, refused_or_sound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ENDS = [0, 1, -1, 2, -2, 5, 6, 7, 64, 2**31, -(2**31), 2**32, 10**6, -(10**6), 2**62, 2**62 + 1, 2**63 - 1, -(2**63)]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-45, 1e-30, -1e-3, 1.0, 7.0, 1e5, 1e12, 1e13, 1e19, 1e30,
          3e38, -3e38, 1e308]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(ENDS) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SETTINGS = settings(
    max_examples=int(os.environ.get("TTT_FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@SETTINGS
@given(data=st.data())
def test_bytes(case, tmp_path, data):
    content = bytearray(case.path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header + 64) | st.integers(0, max(0, len(content) - 1)))
        at = min(at, len(content))
        kind = data.draw(st.sampled_from(["change", "insert", "remove", "cut"]))
        if kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        elif at < len(content):
            content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bytes(content))
    refused_or_sound(case, path)


@SETTINGS
@given(data=st.data())
def test_values_of_tensors(case, tmp_path, data):
    tensors = {key: t.clone() for key, t in case.tensors.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        flat = tensors[data.draw(st.sampled_from(sorted(tensors)))].view(-1)
        if flat.dtype == torch.uint8:
            values = st.integers(0, 255)
        elif flat.is_floating_point():
            values = st.sampled_from(FLOATS) | st.floats(width=32)
        else:
            values = st.sampled_from(ENDS) | st.integers(-(2**63), 2**63 - 1)
        value = data.draw(values)
        where = slice(None) if data.draw(st.booleans()) else data.draw(st.integers(0, len(flat) - 1))
        flat[where] = torch.tensor(value, dtype=torch.float64 if flat.is_floating_point() else flat.dtype).to(flat)
    refused_or_sound(case, forge(tmp_path / "bad.safetensors", tensors, case.metadata))


@SETTINGS
@given(data=st.data())
def test_names_shapes_and_dtypes_of_tensors(case, tmp_path, data):
    tensors = dict(case.tensors)
    key = data.draw(st.sampled_from(sorted(tensors)))
    t = tensors.pop(key)
    kind = data.draw(st.sampled_from(["gone", "renamed", "shape", "dtype", "added"]))
    if kind == "renamed":
        tensors[data.draw(st.sampled_from([*sorted(case.tensors), "0:x", "x", ":", "0:base.weight", "9:weight"]))] = t
    elif kind == "shape":
        tensors[key] = torch.zeros(data.draw(st.lists(st.integers(0, 9), max_size=3)), dtype=t.dtype)
    elif kind == "dtype":
        tensors[key] = t.to(data.draw(st.sampled_from([torch.float16, torch.float64, torch.int32, torch.complex64])))
    elif kind == "added":
        tensors[key] = t
        tensors[data.draw(st.sampled_from(["0:x", "x", "0:base.weight", "0:base.base.anchor"]))] = t.clone()
    refused_or_sound(case, forge(tmp_path / "bad.safetensors", tensors, case.metadata))


@SETTINGS
@given(data=st.data())
def test_metadata(case, tmp_path, data):
    metadata = dict(case.metadata)
    key = data.draw(st.sampled_from(sorted(metadata)))
    if data.draw(st.booleans()):
        metadata[key] = data.draw(st.text(max_size=20) | VALUES.map(json.dumps))
    if data.draw(st.booleans()):
        metadata.pop(data.draw(st.sampled_from(sorted(metadata))))
    refused_or_sound(case, forge(tmp_path / "bad.safetensors", case.tensors, metadata))


@SETTINGS
@given(data=st.data())
def test_fields_of_the_configuration(case, tmp_path, data):
    config = json.loads(case.metadata["config"])
    config[data.draw(st.sampled_from([*sorted(config), "users", "per_user", "new"]))] = data.draw(
        VALUES | st.sampled_from(FLOATS) | st.just({"slots": 4})
    )
    refused_or_sound(
        case, forge(tmp_path / "bad.safetensors", case.tensors, {**case.metadata, "config": json.dumps(config)})
    )
