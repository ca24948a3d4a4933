"""Options of the benchmarks, and what the results say about the machine they were taken on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gsda_kernels as gk


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device to measure on (default: cpu)")
    parser.addoption("--dtype", default="float32", help="dtype of features and parameters (default: float32)")
    parser.addoption("--task", default="digits", help="preset of the training step's benchmark (default: digits)")
    parser.addoption("--batch-size", type=int, default=32, help="images of each domain in a training step")
    parser.addoption("--steps", type=int, default=20, help="training steps to time")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = torch.device(config.getoption("--device"))
    cpu = machine_info["cpu"].get("brand_raw", "unknown CPU")
    for private in ("node", "cpu", "release", "system", "machine", "processor"):
        machine_info.pop(private, None)
    machine_info.update(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        torch=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        task=config.getoption("--task"),
        batch_size=config.getoption("--batch-size"),
        backends=gk.available_backends(device),
    )
