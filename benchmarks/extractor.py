"""Train the feature extractor that the model ``frozen`` comes with: ``python benchmarks/extractor.py``.

Fashion-MNIST's classes 0 to 4 (30,000 training rows) with a linear head that is thrown away; 4 epochs of SGD, one
thread, one seed, so that the same build of torch makes the same file. Prints the accuracy on the test rows of these
classes, and what a linear classifier on the features finds in classes 5 to 9, beside one on the untrained features.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.data.datasets import fashion_mnist
from consilience.models.frozen import FILE, WIDTH, layers

EPOCHS, BATCH, RATE, SEED = 4, 64, 0.05, 0
SEEN = 5
PROBE = 5000


def main() -> None:
    """Train, save, and tell how good it is."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    raw = fashion_mnist()
    assert raw.test_x is not None
    assert raw.test_y is not None
    x, y, test_x, test_y = (torch.as_tensor(part) for part in (raw.x, raw.y, raw.test_x, raw.test_y))
    features, head = layers(), nn.Linear(WIDTH, SEEN)
    fresh = {name: t.clone() for name, t in features.state_dict().items()}
    model = nn.Sequential(features, head)
    rows = (y < SEEN).nonzero().flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            loss = F.cross_entropy(model(x[batch].float()), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        known = test_y < SEEN
        with torch.no_grad():
            right = (model.eval()(test_x[known].float()).argmax(1) == test_y[known]).float().mean()
        print(f"epoch {epoch + 1}: {right:.4f} of classes 0 to {SEEN - 1}")
    FILE.parent.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in features.state_dict().items()}, FILE)
    print(f"{FILE.stat().st_size} bytes")
    print(f"classes 5 to 9, a linear classifier on {PROBE} rows: {probe(features, x, y, test_x, test_y):.4f}")
    features.load_state_dict(fresh)
    print(f"the same on the untrained features: {probe(features, x, y, test_x, test_y):.4f}")


def probe(features: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of a linear classifier on features, on classes that they were not trained on."""
    with torch.no_grad():
        train, test = (y >= SEEN).nonzero().flatten()[:PROBE], test_y >= SEEN
        z, z_test = features(x[train].float()).numpy(), features(test_x[test].float()).numpy()
    found = LogisticRegression(max_iter=2000).fit(z, y[train].numpy())
    return float(found.score(z_test, test_y[test].numpy()))


if __name__ == "__main__":
    main()
