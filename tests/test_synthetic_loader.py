import numpy as np
import pytest
import torch

from gsda_fast.assemble import resolve
from gsda_fast.config import TASKS, parse_config
from gsda_fast.data.batches import Role
from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.synthetic_loader import SyntheticLoader, synthetic_pair


@pytest.mark.parametrize("task", TASKS)
def test_it_stands_in_for_every_task(task: str) -> None:
    benchmark = find_benchmark(task)
    source, target = synthetic_pair(benchmark)
    assert set(source.labels) == set(range(source.num_classes))
    assert source.classes == target.classes
    assert benchmark.classes is None or source.classes == benchmark.classes
    loader = SyntheticLoader(source, target, benchmark.preprocessing, batch_size=40, device=torch.device("cpu"))
    plan = SamplingPlan(source.labels, len(target), preprocessing=benchmark.preprocessing, batch_size=3, seed=0)
    (batch,) = loader.train(plan, range(5, 6))
    side = benchmark.preprocessing.crop
    for images in (batch.source_images, batch.target_images):
        assert images.shape == (3, benchmark.preprocessing.channels, side, side)
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(batch.source_images, batch.target_images)
    assert torch.equal(batch.source_labels, torch.from_numpy(source.labels[plan.batch(5).source_index]))


@pytest.mark.parametrize("domain", ["source", "target"])
def test_evaluation_hands_out_each_sample_once(domain: Role) -> None:
    benchmark = find_benchmark("digits")
    pair = synthetic_pair(benchmark)
    loader = SyntheticLoader(*pair, benchmark.preprocessing, batch_size=40, device=torch.device("cpu"))
    parts = list(loader.evaluate(domain))
    assert [len(images) for images, _ in parts] == [40, 24]
    assert torch.equal(torch.cat([index for _, index in parts]), torch.arange(64))
    chosen = np.array([5, 3, 60])
    ((images, index),) = loader.evaluate(domain, chosen)
    assert len(images) == 3
    assert index.tolist() == [5, 3, 60]
    assert [(len(images), len(index)) for images, index in loader.evaluate(domain, crops=10)] == [(40, 4)] * 16


def test_a_dry_run_needs_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSDA_DATA", raising=False)
    config, source, target = resolve(parse_config(["visda", "--synthetic"], "train"))
    assert (config.data.source, config.data.target) == ("synthetic-source", "synthetic-target")
    assert len(source) == len(target) == 64
