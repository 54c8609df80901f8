"""What a pattern is good for: bits, rows of the table, warnings."""

import pytest

from secateur.core.pattern import NM, Block, Unstructured, bits_per_weight
from secateur.report.runtimes import BRANCHES, CONV1D, EXPERTS, RUNTIMES, alternatives, runtimes_for, warnings_for


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [(Unstructured(0.5), 9), (NM(2, 4), 9), (NM(1, 4), 4.5), (NM(4, 8), 9), (Block(0.5, 4, 4), 8.0625)],
)
def test_bits(pattern, bits):
    assert bits_per_weight(pattern) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("inputs", "name", "bits"),
    [
        ((128, 256), "dense int4, groups of 128", 4.125),
        ((576, 1536), "dense int4, groups of 64", 4.25),
        ((96, 192), "dense int4, groups of 32", 4.5),
        ((48, 96), "dense int4, one scale a row", 4),
    ],
)
def test_the_int4_to_compete_with_is_one_that_can_be_made(inputs, name, bits):
    assert list(alternatives(inputs).items())[-1] == (name, bits)


def gains(pattern):
    return {row.name: row.gain for row in runtimes_for(pattern)}


def test_rows_that_fit():
    assert "1.2x" in gains(Unstructured(0.5))["OpenVINO, AMX Xeon"]
    assert "1.5x" in gains(Unstructured(0.6))["OpenVINO, AMX Xeon"]
    assert "OpenVINO, AMX Xeon" not in gains(Unstructured(0.3))
    assert "torch.sparse, CUDA sm_80+" in gains(NM(1, 4))
    assert "torch.sparse, CUDA sm_80+" not in gains(NM(4, 8)) | gains(Unstructured(0.5))
    assert all(RUNTIMES[-1].name in gains(p) for p in (Unstructured(0.1), NM(2, 4), Block(0.5, 4, 4)))


@pytest.mark.parametrize(
    ("held", "openvino", "torch"),
    [
        (set(), "in a prototype", "not measured yet"),
        ({BRANCHES}, "refuses low-rank", "refuses low-rank"),
        ({EXPERTS}, "refuses mixtures", "refuses mixtures"),
        ({CONV1D}, "in a prototype", "refuses Conv1D"),
    ],
)
def test_no_row_promises_what_its_export_refuses(held, openvino, torch):
    rows = {row.name: row.gain for row in runtimes_for(NM(2, 4), held)}
    assert openvino in rows["OpenVINO, AMX Xeon"]
    assert torch in rows["torch.sparse, CUDA sm_80+"]
    assert "refuses" not in rows["download"]


def test_warnings():
    assert "0.13 B parameters" in warnings_for(NM(2, 4), 134e6)[0]
    assert "reasoning" in warnings_for(NM(2, 4), 70e9)[0]
    assert warnings_for(Unstructured(0.5), 134e6) == []
