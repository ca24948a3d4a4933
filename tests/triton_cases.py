"""What the Triton backend is tried on, in the interpreter and on a GPU alike. Each shape says which edge it hits."""

import pytest

SHAPES = [
    pytest.param({"num_source": 1, "num_target": 1, "num_discriminators": 1, "dim": 1, "hidden": 1}, id="all ones"),
    pytest.param({"num_source": 0, "num_target": 3}, id="no source sample"),
    pytest.param({"num_source": 3, "num_target": 0}, id="no target sample"),
    pytest.param({"num_source": 20, "num_target": 1, "zero_weights": 1.0}, id="a single target sample has pairs"),
    pytest.param({"dim": 33, "hidden": 70}, id="dimensions that align with nothing, several tiles and iterations"),
    pytest.param({"dim": 16, "hidden": 16}, id="exactly one tile"),
    pytest.param({"dim": 80, "hidden": 16}, id="several tiles of D"),
    pytest.param({"num_discriminators": 33, "num_source": 2, "num_target": 2}, id="more discriminators than a block"),
    pytest.param({"empty": [0, 3]}, id="first and last discriminator without pairs"),
    pytest.param({"empty": [0, 1, 2, 3]}, id="no active pair at all"),
    pytest.param({"dead": [1], "silent_sample": 0}, id="norms of exactly zero"),
    pytest.param(
        {"num_source": 36, "num_target": 36, "num_discriminators": 3, "zero_weights": 0.0, "dim": 16, "hidden": 48},
        id="small batch: two tiles of pairs, the second partly filled",
    ),
    pytest.param(
        {"num_source": 50, "num_target": 90, "num_discriminators": 2, "dim": 32, "hidden": 144},
        id="medium batch: two tiles of H",
    ),
    pytest.param(
        {"num_source": 300, "num_target": 220, "num_discriminators": 1, "dim": 16, "hidden": 16},
        id="large batch: samples routed in several blocks",
    ),
]
