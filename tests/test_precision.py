from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.data.batches import Batch
from gsda_fast.errors import UsageError
from gsda_fast.methods import Method, Step, TaskFacts, build_method
from gsda_fast.methods.gsda import GSDA, GSDASettings
from gsda_fast.methods.objective import synchronization_loss
from gsda_fast.model import ModelSettings, build_model
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.precision import AUTOCAST_DTYPES, PrecisionSettings, set_arithmetic

LENET = ModelSettings(backbone="lenet", weights="none", bottleneck_dim=16)


def build(precision: str = "fp32") -> Method:
    torch.manual_seed(0)
    model = build_model(LENET, 4)
    model.autocast_dtype = AUTOCAST_DTYPES[precision]
    return build_method("gsda", model, GSDASettings(groups=2, hidden_dim=16, backend="torch"), TaskFacts(4))


def inputs() -> Batch:
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, 8, 1, 16, 16, generator=generator)
    return Batch(source, torch.arange(8) % 4, target, torch.arange(8), torch.arange(8))


KNOWN = Step(ramp=torch.tensor(0.5), progress=torch.tensor(0.1))


def test_automatic_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PrecisionSettings().resolved("cpu") == PrecisionSettings("fp32", "off")
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert PrecisionSettings().resolved("cuda") == PrecisionSettings(precision, "on")  # type: ignore[arg-type]
    chosen = PrecisionSettings("fp16", "on")
    assert chosen.resolved("cpu") == chosen


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_network_runs_in_half_precision_and_losses_in_float32(precision: str, dtype: torch.dtype) -> None:
    method, exact = build(precision), build()
    features, logits = method.model(inputs().source_images)
    assert features.dtype == dtype
    assert logits.dtype == torch.float32
    for update, same in zip(method.updates(inputs(), KNOWN), exact.updates(inputs(), KNOWN), strict=True):
        assert {term.dtype for term in update.terms.values()} == {torch.float32}
        assert_close(dict(update.terms), dict(same.terms), rtol=0.05, atol=2e-3)
        update.loss.backward()
    assert {parameter.grad.dtype for parameter in method.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_images_arrive_in_the_dtype_of_the_first_product_which_changes_no_number(
    precision: str, dtype: torch.dtype
) -> None:
    arguments = ["digits", "--synthetic", "--precision", precision, "--batch-size", "8", "--no-compile"]
    trainer = build_trainer(*resolve(parse_config(arguments, "train")))
    (batch,) = trainer.loader.train(trainer.plan, range(1))
    (evaluated, _), *_ = trainer.loader.evaluate("target")
    assert batch.source_images.dtype == batch.target_images.dtype == evaluated.dtype == dtype
    images = inputs().source_images
    for once, as_before in zip(trainer.method.model(images.to(dtype)), trainer.method.model(images)):
        assert torch.equal(once, as_before)


def terms_of(method: Any, images: Tensor, probabilities: Tensor, ranks: Ranks) -> Tensor:
    """The whole head, and the network before it, as one function."""
    features, logits = method.model(images)
    domain = (torch.arange(len(images)) < len(images) // 2).float()
    terms = method.discriminators(features, probabilities, domain, len(images) // 2)
    mean = ranks.mean if ranks.several else None
    return (
        terms.loss.sum() + synchronization_loss(terms.gradient_norm, method.discriminators.groups, mean) + logits.sum()
    )


def check_compiled(backend: str) -> None:
    method, batch = build(), inputs()
    images = torch.cat([batch.source_images, batch.target_images])
    probabilities = torch.cat([torch.eye(4)[batch.source_labels], torch.rand(8, 4).softmax(1)])
    torch._dynamo.reset()
    compiled = torch.compile(terms_of, backend=backend, fullgraph=True, dynamic=False)
    found = []
    for function in (terms_of, compiled):
        method.zero_grad()
        total = function(method, images, probabilities, Ranks())
        total.backward()
        gradients = {name: each.grad.clone() for name, each in method.named_parameters() if each.grad is not None}
        found.append((total.detach(), gradients))
    assert len(found[0][1]) == len(list(method.parameters()))
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_network_and_head_are_one_graph() -> None:
    check_compiled("aot_eager")


@pytest.mark.slow
def test_network_and_head_compile_to_the_same_numbers() -> None:
    check_compiled("inductor")


def test_the_mean_over_ranks_breaks_no_graph() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        torch._dynamo.reset()
        method = build()
        assert isinstance(method, GSDA)
        groups = method.discriminators.groups
        norm = torch.rand(7, requires_grad=True)
        compiled = torch.compile(synchronization_loss, backend="aot_eager", fullgraph=True)
        compiled(norm, groups, Ranks(0, 2).mean).backward()
        assert norm.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_compiling_the_parts_keeps_their_names_and_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    method, plain = build(), build()
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    method.compile_parts()
    assert isinstance(method, GSDA)
    assert [module for module, _ in compiled] == [method.model, method.discriminators]
    assert all(options == {"dynamic": False, "mode": None} for _, options in compiled)
    assert list(method.state_dict()) == list(plain.state_dict())


def test_cuda_graphs_want_a_gpu_and_compilation() -> None:
    graphs = PrecisionSettings("bf16", cuda_graphs=True)
    with pytest.raises(UsageError, match="--cuda-graphs: found device cpu; expected a GPU, and compilation"):
        graphs.resolved("cpu")
    with pytest.raises(UsageError, match="--cuda-graphs: found --no-compile; expected a GPU, and compilation"):
        replace(graphs, compile="off").resolved("cuda")
    assert graphs.resolved("cuda") == PrecisionSettings("bf16", "on", cuda_graphs=True)
    with pytest.raises(UsageError, match="--cuda-graphs: found device cpu"):
        resolve(parse_config(["digits", "--synthetic", "--cuda-graphs", "--compile", "--device", "cpu"], "train"))


@pytest.mark.parametrize("asked", [True, False])
def test_cuda_graphs_are_asked_for_and_told_of_each_step(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    marks: list[int] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: modes.append(options["mode"]))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(trainer.step))
    config, source, target = resolve(parse_config(["digits", "--synthetic", "--steps", "3", "--warmup", "1"], "train"))
    # What `resolve` gives on a GPU.
    config = replace(config, precision=PrecisionSettings("fp32", "on", cuda_graphs=asked))
    trainer = build_trainer(config, source, target)
    assert modes == 2 * ["reduce-overhead" if asked else None]
    list(trainer.run(lambda: None))
    assert marks == ([0, 1, 2] if asked else [])


def test_tf32_wants_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--precision: found tf32 on a CPU; expected fp32, or a GPU of compute"):
        PrecisionSettings("tf32").resolved("cpu")
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    with pytest.raises(UsageError, match="--precision: found tf32 on a GPU without it"):
        PrecisionSettings("tf32").resolved("cuda")
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    assert PrecisionSettings("tf32").resolved("cuda") == PrecisionSettings("tf32", "on")


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_float32_is_float32_on_a_gpu_unless_tf32_is_asked_for(precision: str, tf32: bool) -> None:
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = not tf32
        products.allow_tf32 = True  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does
        set_arithmetic(torch.device("cpu"), precision)
        assert (cudnn.benchmark, cudnn.allow_tf32) == (before[0], not tf32)
        set_arithmetic(torch.device("cuda"), precision)
        assert cudnn.benchmark
        # Both of PyTorch's ways to ask, the second of which fails where the two have come apart.
        assert (cudnn.conv.fp32_precision == "tf32", cudnn.allow_tf32) == (tf32, tf32)
        assert (products.fp32_precision == "tf32", products.allow_tf32) == (False, False)
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before
        products.allow_tf32 = False


@pytest.mark.parametrize("asked", ["--compile", "--cuda-graphs"])
def test_no_compiled_graph_spans_processes(asked: str) -> None:
    settings = PrecisionSettings("bf16", "on" if asked == "--compile" else "auto", cuda_graphs=asked == "--cuda-graphs")
    with pytest.raises(UsageError, match=f"{asked}: found --sync-batchnorm; expected one of the two"):
        settings.resolved("cuda", sync_batchnorm=True)
    assert PrecisionSettings("bf16").resolved("cuda", sync_batchnorm=True).compile == "off"


def test_batchnorm_over_processes_needs_gpus() -> None:
    with pytest.raises(UsageError, match="--sync-batchnorm: found device cpu; expected GPUs"):
        build_trainer(*resolve(parse_config(["digits", "--sync-batchnorm"], "train")))
