"""The adversarial head in a loop of one's own: both steps of the paper, on toy images that need no file.

Two domains of 12x12 pictures, three classes: a bar that lies, a bar that stands, a square. In the target they are pale
and lie on stripes. Run: python examples/own_loop.py
"""

import math

import torch
from torch import Tensor, nn

from gsda_fast import ClassGroups, Discriminators, discriminator_objective, encoder_objective
from gsda_fast.methods.objective import class_probabilities

CLASSES, SIDE, STEPS, WARMUP, BATCH = 3, 12, 300, 100, 32


def toy_images(count: int, *, target: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images (count, 1, 12, 12) float32 and labels (count,)."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.zeros(count, 1, SIDE, SIDE)
    places = torch.randint(1, 6, (count, 2), generator=generator)
    for image, label, (row, column) in zip(images, labels.tolist(), places.tolist()):
        height, width = [(2, 6), (6, 2), (4, 4)][label]
        image[0, row : row + height, column : column + width] = 1
    if target:
        images = 0.5 * images + 0.5 * (torch.arange(SIDE) % 2)
    return images + 0.15 * torch.randn(images.shape, generator=generator), labels


def train(adapt: bool, seed: int = 0) -> float:
    """Train on the labelled source, with or without the unlabelled target; return the accuracy on the target."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    source_images, source_labels = toy_images(600, target=False, generator=generator)
    target_images, target_labels = toy_images(600, target=True, generator=generator)

    encoder = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
        *(nn.Linear(16 * 9, 32), nn.ReLU()),
    )
    classifier = nn.Linear(32, CLASSES)
    groups = ClassGroups.random(num_classes=CLASSES, num_groups=2, seed=seed)
    discriminators = Discriminators(feature_dim=32, groups=groups, hidden_dim=32)
    encoder_optimizer = torch.optim.SGD([*encoder.parameters(), *classifier.parameters()], lr=0.05, momentum=0.9)
    discriminator_optimizer = torch.optim.SGD(discriminators.parameters(), lr=0.05, momentum=0.9)
    domain = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])  # source rows, then target rows

    for step in range(STEPS):
        chosen = torch.randint(600, (2, BATCH), generator=generator)
        labels = source_labels[chosen[0]]
        features = encoder(torch.cat([source_images[chosen[0]], target_images[chosen[1]]]))
        logits = classifier(features)
        if not adapt or step < WARMUP:
            loss = nn.functional.cross_entropy(logits[:BATCH], labels)
        else:
            p = class_probabilities(logits, labels)  # the true class of source rows, the predicted one of target rows
            # The discriminators' step, equations 13-15. It does not move the encoder.
            terms = discriminators(features.detach(), p, domain, num_source=BATCH)
            discriminator_objective(terms, groups, beta=1.0).total.backward()
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
            # The encoder's and the classifier's, equations 16-17. It does not move the discriminators.
            terms = discriminators(features, p, domain, num_source=BATCH, frozen=True)
            progress = (step - WARMUP) / (STEPS - WARMUP)
            ramp = 2 / (1 + math.exp(-10 * progress)) - 1
            loss = encoder_objective(logits, labels, terms, groups, alpha=0.1, beta=1.0, adversarial_ramp=ramp).total
        loss.backward()
        encoder_optimizer.step()
        encoder_optimizer.zero_grad()
    with torch.no_grad():
        right = classifier(encoder(target_images)).argmax(1) == target_labels
    return 100 * right.float().mean().item()


def main() -> None:
    for name, adapt in (("source alone", False), ("adapted", True)):
        print(f"{name}: {train(adapt):.1f} % of the target are right")


if __name__ == "__main__":
    main()
