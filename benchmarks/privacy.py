"""What privacy costs: accuracy on digits against epsilon, by mechanism. ``python benchmarks/privacy.py``.

200 clients with 7 rows each, i.i.d., a fifth of them a round, 40 rounds of FedAvg with an MLP of 32 units, clipping
norm 0.5, delta 1e-4; nothing is tuned. Results are cached in ``results/privacy.json``, run by run.
"""

from __future__ import annotations

import json
from pathlib import Path

from consilience.data.datasets import make_federation
from consilience.methods import make
from consilience.privacy.options import Privacy
from consilience.simulate import run

CACHE = Path(__file__).parent / "results" / "privacy.json"
EPSILONS = (None, 32.0, 8.0, 2.0)
MECHANISMS = ("poisson", "fixed", "tree")
SEEDS = (0, 1)


def measure(mechanism: str, epsilon: float | None, seed: int) -> dict[str, float]:
    """One run: accuracy, and the noise multiplier that it needed."""
    federation = make_federation("digits", clients=200, partition="iid", seed=seed)
    options = {"epsilon": epsilon} if epsilon is not None else {"noise": 0.0}
    done = run(
        make("fedavg", {"lr": 0.1, "batch_size": 8}), federation, model="mlp:32", rounds=40, participation=0.2,
        privacy=Privacy(delta=1e-4, clip="0.5", mechanism=mechanism, **options), eval_every=40, eval_clients_every=0,
        eval_clients=1, executor="serial", seed=seed,
    )  # fmt: skip
    last = done.history[-1]
    return {"accuracy": last["global"]["accuracy"], "noise": last["privacy"]["noise"]}


def main() -> None:
    """Measure what is missing, and print the table."""
    found = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    for seed in SEEDS:
        for epsilon in EPSILONS:
            for mechanism in MECHANISMS:
                key = f"{mechanism} {'none' if epsilon is None else f'{epsilon:g}'} {seed}"
                if key not in found:
                    found[key] = measure(mechanism, epsilon, seed)
                    CACHE.write_text(json.dumps(found, indent=1) + "\n")
    for key, row in found.items():
        print(f"{key:<20} {row['accuracy']:.3f}  noise {row['noise']:.3g}")


if __name__ == "__main__":
    main()
