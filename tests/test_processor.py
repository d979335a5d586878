"""What is told of the CPU."""

from collections.abc import Iterator

import pytest
import torch

from gacd import processor


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    processor.fast_bf16.cache_clear()
    yield
    processor.fast_bf16.cache_clear()


@pytest.mark.parametrize(
    ("has", "model", "fast"),
    [
        ({"avx2": True}, "Intel(R) Core(TM) i7", False),
        ({"avx512_bf16": True}, "Intel(R) Xeon(R) Processor", False),
        ({"avx512_bf16": True, "amx_bf16": True}, "Intel(R) Xeon(R) Processor", True),
        ({"avx512_bf16": True}, "AMD EPYC 9B14", True),
        ({"avx2": True}, "AMD Ryzen 7 5800U", False),
        ({"neon": True}, "", False),
        ({}, "", False),
    ],
)
def test_bf16_is_fast_where_it_was_measured_to_be(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], model: str, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(processor, "processor", lambda: model)
    assert processor.fast_bf16() is fast


def test_bf16_is_not_taken_for_fast_where_pytorch_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert processor.fast_bf16() is False
    assert processor.fast_bf16("cuda") is True
