"""The device and the precision are those that were asked for, or an error says which there are."""

from pathlib import Path

import pytest
import torch

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.compute.device import Device


def test_auto_is_the_first_gpu_where_there_is_one() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert Device.choose().device == torch.device(expected)
    assert str(Device.choose()) == expected


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", torch.bfloat16),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f", torch.float32),
        ("Features\t: fp asimd", torch.float32),
        ("", torch.float32),
    ],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(
    flags: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr("backboned.server.compute.device.CPU_INFO", file)
    assert Device.choose("cpu").dtype == dtype
    assert Device.choose("cpu").in_fp32().dtype == torch.float32


def test_without_word_of_the_cpu_auto_is_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backboned.server.compute.device.CPU_INFO", tmp_path / "none")
    assert Device.choose("cpu").precision == "fp32"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_precision_is_a_type(precision: str, dtype: torch.dtype) -> None:
    assert Device.choose("cpu", precision) == Device(torch.device("cpu"), dtype)
    assert Device.choose("cpu", precision).precision == precision


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu': use auto, cpu, cuda or cuda:N"),
        ("", "unknown device ''"),
        ("cuda:x", "unknown device 'cuda:x'"),
        ("cuda:99", "device 'cuda:99' is not there: "),
        ("meta", "device 'meta' can't be used"),
        ("mps", "device 'mps' can't be used"),
    ],
)
def test_another_device_is_refused(device: str, message: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        Device.choose(device)
    assert (caught.value.kind, caught.value.field) == (ErrorKind.INVALID_ARGUMENT, "device")
    assert caught.value.message.startswith(message)


def test_another_precision_is_refused() -> None:
    with pytest.raises(BackbonedError, match="unknown precision 'int8': use auto, fp32, bf16 or fp16") as caught:
        Device.choose("cpu", "int8")
    assert caught.value.field == "precision"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_without_a_number_is_a_device() -> None:
    assert Device.choose("cuda").device.type == "cuda"
