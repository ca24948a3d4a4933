"""The whole adversarial part of a training step, in turns: what the discriminators' step and the encoder's cost.

    OMP_NUM_THREADS=1 python -m benchmarks.adversarial_part --output benchmarks/results/adversarial-part-cpu.md

One visit: the discriminators' forward and backward pass, the guard's norm of all gradients, SGD with Nesterov momentum
and weight decay; then the encoder's forward and backward pass through the moved discriminators. Contenders take turns,
visit by visit, and a ratio is the median of the ratios within visits, so that it does not depend on what else the
machine was doing at the time.

`--before FOLDER` adds a former version of the package, a copy of it by the name of gsda_before in that folder.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gsda_kernels as gk
from benchmarks.contenders import BASELINE, strong_autograd_baseline
from benchmarks.shapes import SHAPES, HeadInputs, HeadShape, make_inputs

Step = Callable[[], object]

RATE, RULE = 1e-4, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
DEFAULT_SHAPES = ("visda", "office31", "office-home")


def objective_gradients(inputs: HeadInputs, terms: Any) -> tuple[Tensor, Tensor]:
    """gL = 1 and gS = a sign for each discriminator, as the synchronisation term makes them."""
    norm = terms[1]
    return torch.ones_like(norm), torch.where(norm > norm.mean(), 1.0, -1.0)


def backward_then_sgd(shape: HeadShape, terms: Callable[[HeadInputs], Any], with_copy: bool = False) -> Step:
    """Return gradients, their norm, torch.optim.SGD: the way of any optimizer.

    Args:
        with_copy: parameters and momentum are copied before they move, as training once did to take a step back.
    """
    inputs = make_inputs(shape).requires_grad_(False, True)
    copies = [torch.empty_like(parameter) for parameter in (*inputs.disc, *inputs.disc)] if with_copy else []
    optimizer = torch.optim.SGD(list(inputs.disc), lr=RATE, fused=True, **RULE)

    def step() -> None:
        inputs.requires_grad_(False, True)
        found = terms(inputs)
        optimizer.zero_grad()
        torch.autograd.backward(found, objective_gradients(inputs, found))
        gradients = [parameter.grad for parameter in inputs.disc if parameter.grad is not None]
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if copies and optimizer.state:
            momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in inputs.disc]
            torch._foreach_copy_(copies, [*(parameter.detach() for parameter in inputs.disc), *momentum])
        optimizer.step()
        del gradients
        encoder_step(inputs, terms)

    return step


def fused(shape: HeadShape, terms: Callable[[HeadInputs], Any], backend: str) -> Step:
    """`adversarial_update_`."""
    inputs = make_inputs(shape).requires_grad_(False, True)
    buffers = gk.DiscriminatorWeights(*(torch.zeros_like(parameter) for parameter in inputs.disc))

    def step() -> None:
        inputs.requires_grad_(False, True)
        gk.adversarial_update_(
            inputs.features, inputs.disc, buffers, inputs.sample_weight, inputs.domain,
            lambda found: objective_gradients(inputs, found),
            learning_rate=RATE, backend=backend, max_pairs=inputs.max_pairs, validate=False, **RULE,
        )  # fmt: skip
        encoder_step(inputs, terms)

    return step


def encoder_step(inputs: HeadInputs, terms: Callable[[HeadInputs], Any]) -> None:
    inputs.requires_grad_(True, False)
    inputs.features.grad = None
    found = terms(inputs)
    torch.autograd.backward(found, objective_gradients(inputs, found))


def terms_of(package: Any, backend: str) -> Callable[[HeadInputs], Any]:
    def terms(inputs: HeadInputs) -> Any:
        return package.adversarial_terms(
            inputs.features,
            inputs.disc,
            inputs.sample_weight,
            inputs.domain,
            backend=backend,
            max_pairs=inputs.max_pairs,
            validate=False,
        )

    return terms


def contenders(shape: HeadShape, before: Any = None) -> dict[str, Step]:
    """By name. Each has parameters of its own."""
    usable = [name for name, why in gk.available_backends("cpu").items() if why is None and name != "reference"]
    found: dict[str, Step] = {BASELINE: backward_then_sgd(shape, strong_autograd_baseline)}
    for name in usable:
        found[f"{name}, backward then SGD"] = backward_then_sgd(shape, terms_of(gk, name))
        found[f"{name}, fused"] = fused(shape, terms_of(gk, name), name)
    if before is not None:
        former = terms_of(before, "native")
        found["native before, backward then SGD"] = backward_then_sgd(shape, former)
        found["native before, backward, copy, SGD"] = backward_then_sgd(shape, former, with_copy=True)
    return found


def visited(steps: dict[str, Step], visits: int) -> dict[str, list[float]]:
    """Return seconds of every visit, by contender; each is warmed up beforehand."""
    # On one thread the processor's own time, which others on the machine do not add to.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(visits):
        for name, step in steps.items():
            step()  # takes back the buffers and caches that the one before has used
            start = clock()
            step()
            times[name].append(clock() - start)
    return times


def ratio(times: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def table(found: dict[str, dict[str, list[float]]], machine: str) -> str:
    """Return a Markdown page: shape by contender, milliseconds and ratios."""
    others = (BASELINE, "native before, backward then SGD", "native before, backward, copy, SGD")
    lines = [
        "# The adversarial part of a training step on a CPU",
        "",
        f"{machine}. Median of the visits; discriminators' forward, backward, norm of the gradients and SGD, encoder's",
        "forward and backward. Ratios are medians of those within visits: how many times faster than each.",
        "",
        f"| shape | contender | ms | than {' | than '.join(others)} |",
        f"|---|---|---:|{'---:|' * len(others)}",
    ]
    for shape, times in found.items():
        for name, own in times.items():
            ratios = [f"{ratio(times[other], own):.2f}" if other in times else "" for other in others]
            lines.append(f"| {shape} | {name} | {1e3 * statistics.median(own):.0f} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--leave-out", nargs="*", default=["torch"], help="contenders whose name begins so")
    parser.add_argument("--before", type=Path, help="folder with a former version by the name of gsda_before")
    parser.add_argument("--output", type=Path, help="a Markdown file beside what is printed")
    options = parser.parse_args(arguments)
    before = None
    if options.before is not None:
        sys.path.insert(0, str(options.before))
        before = importlib.import_module("gsda_before")
    cpu = torch.backends.cpu.get_cpu_capability()
    machine = f"{cpu}, {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"
    found: dict[str, dict[str, list[float]]] = {}
    for shape in options.shapes:
        steps = contenders(SHAPES[shape], before)
        kept = {name: step for name, step in steps.items() if not name.startswith(tuple(options.leave_out))}
        del steps
        found[shape] = visited(kept, options.visits)
        if options.output is not None:
            # After every shape, so that what was measured survives a run that is cut off.
            options.output.write_text(table(found, machine))
    print(table(found, machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
