"""Tiles of the Triton products, by chip, operands and shape class: see configs.py.

Written by benchmarks/tune_triton.py. ``any`` serves chips without rows of their own, and fits them all. Each
product: block_rows, block_columns, block_inner, num_warps, num_stages.
"""

TABLE: dict[tuple[str, str, str], dict[str, tuple[int, int, int, int, int]]] = {
    ("any", "half", "small"): {
        "layer": (64, 64, 64, 4, 4),
        "jacobian": (64, 32, 64, 4, 4),
        "weight": (64, 128, 64, 4, 2),
    },
    ("any", "half", "medium"): {
        "layer": (128, 128, 64, 8, 3),
        "jacobian": (128, 64, 64, 8, 3),
        "weight": (64, 128, 64, 4, 2),
    },
    ("any", "half", "large"): {
        "layer": (128, 128, 64, 8, 3),
        "jacobian": (128, 64, 64, 8, 3),
        "weight": (128, 128, 32, 8, 3),
    },
    ("any", "half", "unaligned"): {
        "layer": (64, 32, 32, 8, 2),
        "jacobian": (64, 32, 32, 8, 2),
        "weight": (64, 32, 32, 8, 2),
    },
    ("any", "mixed", "small"): {
        "layer": (64, 64, 32, 4, 4),
        "jacobian": (64, 32, 32, 4, 4),
        "weight": (64, 128, 32, 8, 2),
    },
    ("any", "mixed", "medium"): {
        "layer": (128, 128, 32, 8, 3),
        "jacobian": (128, 64, 32, 8, 3),
        "weight": (64, 128, 32, 8, 2),
    },
    ("any", "mixed", "large"): {
        "layer": (128, 128, 32, 8, 3),
        "jacobian": (128, 64, 32, 8, 3),
        "weight": (64, 128, 32, 8, 2),
    },
    ("any", "mixed", "unaligned"): {
        "layer": (64, 32, 32, 8, 2),
        "jacobian": (64, 32, 32, 8, 2),
        "weight": (64, 32, 32, 8, 2),
    },
    ("any", "tf32", "small"): {
        "layer": (64, 64, 32, 4, 4),
        "jacobian": (64, 32, 32, 4, 4),
        "weight": (64, 128, 32, 8, 2),
    },
    ("any", "tf32", "medium"): {
        "layer": (64, 128, 32, 8, 3),
        "jacobian": (64, 64, 32, 4, 4),
        "weight": (64, 128, 32, 8, 2),
    },
    ("any", "tf32", "large"): {
        "layer": (128, 64, 32, 8, 3),
        "jacobian": (128, 64, 32, 8, 3),
        "weight": (64, 128, 32, 8, 2),
    },
    ("any", "tf32", "unaligned"): {
        "layer": (64, 32, 32, 8, 2),
        "jacobian": (64, 32, 32, 8, 2),
        "weight": (64, 32, 32, 8, 2),
    },
    ("any", "float32", "small"): {
        "layer": (64, 64, 16, 8, 3),
        "jacobian": (64, 64, 16, 8, 3),
        "weight": (64, 64, 16, 8, 3),
    },
    ("any", "float32", "medium"): {
        "layer": (64, 64, 16, 8, 3),
        "jacobian": (64, 64, 16, 8, 3),
        "weight": (64, 64, 16, 8, 3),
    },
    ("any", "float32", "large"): {
        "layer": (64, 64, 16, 8, 3),
        "jacobian": (64, 64, 16, 8, 3),
        "weight": (64, 64, 16, 8, 3),
    },
    ("any", "float32", "unaligned"): {
        "layer": (64, 32, 16, 8, 3),
        "jacobian": (64, 32, 16, 8, 3),
        "weight": (64, 32, 16, 8, 3),
    },
}
